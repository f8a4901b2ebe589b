// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL, VNNI). Compiled with flags of its own; see setup.py.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace {
#define MI_VARIANT_AVX512
#include "variant.h"
}  // namespace

const Kernels* mi_kernels_avx512() {
  static constexpr Kernels table = table_named("avx512");
  const bool is_here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni");
  return is_here ? &table : nullptr;
}

#else

const Kernels* mi_kernels_avx512() { return nullptr; }

#endif
