// 16 fp32 lanes in two 256-bit registers. The four vec_*.h define the same functions with the same bits.
#pragma once

#include <immintrin.h>

struct V {
  __m256 a, b;
};

constexpr int kTileRows = 6;
constexpr int kTileVectors = 6;
constexpr int kGroupTileVectors = 6;
constexpr int kWideTiles = 3;

// Lanes below n get the sign bit that maskload and maskstore look at.
INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE V load_n(const float* p, int n) {
  if (n == 16) return load(p);
  return {_mm256_maskload_ps(p, first(n)), n > 8 ? _mm256_maskload_ps(p + 8, first(n - 8)) : _mm256_setzero_ps()};
}
INLINE void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE void store_n(float* p, V x, int n) {
  if (n == 16) return store(p, x);  // masked stores take dozens of cycles on some CPUs
  _mm256_maskstore_ps(p, first(n), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, first(n - 8), x.b);
}
INLINE V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }

// p > q ? x : y, where a comparison with NaN is false.
INLINE V if_greater(V p, V q, V x, V y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_GT_OQ))};
}

// The first n lanes of x, the others replaced by `rest`.
INLINE V keep_n(V x, int n, V rest) {
  return {_mm256_blendv_ps(rest.a, x.a, _mm256_castsi256_ps(first(n))),
          _mm256_blendv_ps(rest.b, x.b, _mm256_castsi256_ps(first(n - 8)))};
}

INLINE V widen(__m256i halves) {
  const __m256i a = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves));
  const __m256i b = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}

INLINE V load_bf16_n(const uint16_t* p, int n) {
  if (n == 16) return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  alignas(32) uint16_t copy[16] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(copy)));
}

// The columns of the even and the odd k of a pair; see LinearShape.
INLINE void load_pair(const void* p, V& even, V& odd) {
  const __m256i* words = static_cast<const __m256i*>(p);
  const __m256i a = _mm256_loadu_si256(words), b = _mm256_loadu_si256(words + 1);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}

INLINE __m256 exp2_integral(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// 2^n for integral n in [-126, 127].
INLINE V exp2_integral(V n) { return {exp2_integral(n.a), exp2_integral(n.b)}; }

// Lanes i and i + 8 first, then 4, 2, 1 apart.
INLINE float sum_lanes(V x) {
  const __m256 y = _mm256_add_ps(x.a, x.b);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

INLINE float max_lanes(V x) {
  const __m256 y = _mm256_max_ps(x.a, x.b);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

INLINE void transpose8(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  __m256i a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + column));
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    __m256i* low = reinterpret_cast<__m256i*>(out + 16 * j);
    __m256i* high = reinterpret_cast<__m256i*>(out + 16 * (4 + j));
    _mm256_storeu_si256(low, _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
    _mm256_storeu_si256(high, _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
  }
}

// out[16 * c + r] = rows[r][c] for a 16 x 16 block of 32-bit words.
INLINE void transpose16(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  transpose8(rows, column, out);
  transpose8(rows + 8, column, out + 8);
  transpose8(rows, column + 8, out + 128);
  transpose8(rows + 8, column + 8, out + 136);
}

// 16 int32 lanes.
struct I {
  __m256i a, b;
};

INLINE I zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I spread(const int32_t* p) { return {_mm256_set1_epi32(*p), _mm256_set1_epi32(*p)}; }
INLINE I load(const int32_t* p) {
  const __m256i* vectors = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
}
INLINE void store(int32_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE I round_to_int(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

// 16 x 2 signed bytes as 16 x 2 int16; see LinearShape.
INLINE I load_pairs(const void* p) {
  const __m128i* bytes = static_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes)), _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1))};
}

// 16 x 4 nibbles as 16 x 4 bytes; see LinearShape.
INLINE I load_quads(const void* p) {
  const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p)), low = _mm256_set1_epi32(0x0f0f0f0f);
  return {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi32(both, 4), low)};
}

// Left to itself GCC multiplies for all rows before it adds, and runs out of registers; this keeps the order.
INLINE I in_order(I x) {
  asm volatile("" : "+x"(x.a), "+x"(x.b));
  return x;
}

// sum + w . x, of 2 x int16 in each lane.
INLINE I dot_pairs(I sum, I w, I x) {
  return in_order({_mm256_add_epi32(sum.a, _mm256_madd_epi16(w.a, x.a)),
                   _mm256_add_epi32(sum.b, _mm256_madd_epi16(w.b, x.b))});
}

// sum + w . x, of 4 x (0..15 times a signed byte) in each lane. After up to 8 of them finish_quads gives the lanes:
// until then these are int16 sums of pairs, at most 8 x 2 x 15 x 127.
INLINE I dot_quads(I sum, I w, I x) {
  return in_order({_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x.a)),
                   _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x.b))});
}

INLINE I finish_quads(I sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sum.a, ones), _mm256_madd_epi16(sum.b, ones)};
}
