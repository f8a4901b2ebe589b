// 16 fp32 lanes in one 512-bit register. The four vec_*.h define the same functions with the same bits.
#pragma once

#include <immintrin.h>

struct V {
  __m512 v;
};

constexpr int kTileRows = 12;  // most rows of a register tile
constexpr int kTileVectors = 24;  // most accumulators of one
constexpr int kGroupTileVectors = 16;
constexpr int kWideTiles = 4;  // so many read the same weights before widening them pays; see linear.h

INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

INLINE V zero() { return {_mm512_setzero_ps()}; }
INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE V load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
INLINE void store_n(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// a > b ? x : y, where a comparison with NaN is false.
INLINE V if_greater(V a, V b, V x, V y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}

// The first n lanes of x, the others replaced by `rest`.
INLINE V keep_n(V x, int n, V rest) { return {_mm512_mask_blend_ps(first(n), rest.v, x.v)}; }

INLINE V load_bf16_n(const uint16_t* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

// The columns of the even and the odd k of a pair; see LinearShape.
INLINE void load_pair(const void* p, V& even, V& odd) {
  const __m512i words = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// 2^n for integral n in [-126, 127].
INLINE V exp2_integral(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

// Lanes i and i + 8 first, then 4, 2, 1 apart.
INLINE float sum_lanes(V x) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x.v), high);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

INLINE float max_lanes(V x) { return _mm512_reduce_max_ps(x.v); }

// out[16 * c + r] = rows[r][c] for a 16 x 16 block of 32-bit words.
INLINE void transpose16(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + column);
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i x0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), x1 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i y0 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i y1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    _mm512_storeu_si512(out + 16 * j, _mm512_shuffle_i32x4(x0, y0, 0x88));
    _mm512_storeu_si512(out + 16 * (4 + j), _mm512_shuffle_i32x4(x0, y0, 0xdd));
    _mm512_storeu_si512(out + 16 * (8 + j), _mm512_shuffle_i32x4(x1, y1, 0x88));
    _mm512_storeu_si512(out + 16 * (12 + j), _mm512_shuffle_i32x4(x1, y1, 0xdd));
  }
}

// 16 int32 lanes.
struct I {
  __m512i v;
};

INLINE I zero_int() { return {_mm512_setzero_si512()}; }
INLINE I spread(const int32_t* p) { return {_mm512_set1_epi32(*p)}; }
INLINE I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store(int32_t* p, I x) { _mm512_storeu_si512(p, x.v); }
INLINE I sub(I x, I y) { return {_mm512_sub_epi32(x.v, y.v)}; }
INLINE V to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
INLINE I round_to_int(V x) { return {_mm512_cvtps_epi32(x.v)}; }

// 16 x 2 signed bytes as 16 x 2 int16; see LinearShape.
INLINE I load_pairs(const void* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}

// 16 x 4 nibbles as 16 x 4 bytes; see LinearShape.
INLINE I load_quads(const void* p) {
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  return {_mm512_and_si512(_mm512_srlv_epi32(both, shift), _mm512_set1_epi32(0x0f0f0f0f))};
}

// sum + w . x, of 2 x int16 in each lane.
INLINE I dot_pairs(I sum, I w, I x) {
  return {_mm512_dpwssd_epi32(sum.v, w.v, x.v)};
}

// sum + w . x, of 4 x (0..15 times a signed byte) in each lane.
INLINE I dot_quads(I sum, I w, I x) {
  return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)};
}

INLINE I finish_quads(I sum) {
  return sum;
}
