// The kernels for x86-64 with AVX2 and FMA. Compiled with flags of its own; see setup.py.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace {
#define MI_VARIANT_AVX2
#include "variant.h"
}  // namespace

const Kernels* mi_kernels_avx2() {
  static constexpr Kernels table = table_named("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &table : nullptr;
}

#else

const Kernels* mi_kernels_avx2() { return nullptr; }

#endif
