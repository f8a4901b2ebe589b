// What the kernels are written in: V, 16 fp32 lanes of whatever this variant has, conversions and exp.
//
// A variant_*.cpp defines MI_VARIANT_<name> and includes the kernels inside an unnamed namespace, so that nothing here
// has external linkage. No op below may be reassociated or contracted; see the flags in setup.py.
#pragma once

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#define NO_UNROLL _Pragma("GCC unroll 1")
#endif

#if defined(MI_VARIANT_AVX512)
#include "vec_avx512.h"
#elif defined(MI_VARIANT_AVX2)
#include "vec_avx2.h"
#elif defined(MI_VARIANT_NEON)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

constexpr int kLanes = 16;
constexpr int64_t kVectorBytes = 64;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Round to nearest even; NaN stays NaN.
INLINE uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float float_of_fp16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The exponent is rebiased by a multiplication, which is exact and gets the subnormals right too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

INLINE float read_float(const void* p, int64_t i, int dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  return dtype == kBFloat16 ? float_of(static_cast<uint32_t>(half) << 16) : float_of_fp16(half);
}

// e^x within 1.1 ulp for x in [-87.3, 88]; larger x count as 88, smaller ones give 0, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 P(r) with P fitted at Chebyshev nodes.
INLINE V exp_(V x) {
  const V low = set1(-87.3f), high = set1(88.0f);
  V y = if_greater(x, high, high, x);
  y = if_greater(low, y, low, y);
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const V n = sub(fma(y, set1(0x1.715476p+0f), magic), magic);
  V r = fma(n, set1(-0x1.62e400p-1f), y);
  r = fma(n, set1(-0x1.7f7d1cp-20f), r);
  V p = fma(set1(0.0013934545f), r, set1(0.008363777f));
  p = fma(p, r, set1(0.041666456f));
  p = fma(p, r, set1(0.16666573f));
  p = fma(p, r, set1(0.5f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return if_greater(low, x, zero(), mul(p, exp2_integral(n)));
}

// Calls body(first, count) for [0, total) cut into pieces of `grain`, on several threads if there are several pieces.
template <class Body>
void parallel_for(Pool* pool, int64_t total, int64_t grain, const Body& body) {
  if (total == 0) return;
  struct Context {
    const Body* body;
    int64_t total, grain;
  } context{&body, total, grain};
  pool_run(
      pool, static_cast<int>(ceil_div(total, grain)),
      [](void* opaque, int task, int) {
        const Context& c = *static_cast<const Context*>(opaque);
        const int64_t begin = task * c.grain;
        (*c.body)(begin, least(c.grain, c.total - begin));
      },
      &context);
}
