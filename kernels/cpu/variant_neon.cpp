// The kernels for AArch64, whose baseline has NEON with FMA: no flags, and no CPU to ask.

#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

namespace {
#define MI_VARIANT_NEON
#include "variant.h"
}  // namespace

const Kernels* mi_kernels_neon() {
  static constexpr Kernels table = table_named("neon");
  return &table;
}

#else

const Kernels* mi_kernels_neon() { return nullptr; }

#endif
