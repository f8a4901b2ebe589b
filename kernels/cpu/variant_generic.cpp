// The kernels in compiler vectors, for every CPU that has no variant of its own; slow where FMA is a library call.

#include "kernels.h"

namespace {
#include "variant.h"
}  // namespace

const Kernels* mi_kernels_generic() {
  static constexpr Kernels table = table_named("generic");
  return &table;
}
