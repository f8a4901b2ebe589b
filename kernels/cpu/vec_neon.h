// 16 fp32 lanes in four 128-bit registers. All vec_*.h define the same functions with the same bits.
//
// Memory is read as bytes where its words may lie at odd addresses or belong to another type.
#pragma once

#include <arm_neon.h>

struct V {
  float32x4_t q[4];
};

// Of 32 registers 5 x 4 are accumulators, 8 hold the two vectors of a bf16 pair and one holds x. Beside int4 weights
// x takes four.
constexpr int kTileRows = 5;
constexpr int kTileVectors = 5;
constexpr int kGroupTileVectors = 3;
constexpr int kWideTiles = 3;

#define EACH_QUARTER(expression)                          \
  V r;                                                    \
  UNROLL for (int i = 0; i < 4; ++i) r.q[i] = expression; \
  return r

INLINE uint32x4_t load_words(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }

INLINE V set1(float x) { EACH_QUARTER(vdupq_n_f32(x)); }
INLINE V zero() { return set1(0.0f); }
INLINE V load(const float* p) { EACH_QUARTER(vld1q_f32(p + 4 * i)); }
INLINE V load_n(const float* p, int n) {
  if (n == 16) return load(p);
  float copy[16] = {};
  __builtin_memcpy(copy, p, n * sizeof(float));
  return load(copy);
}
INLINE void store(float* p, V x) {
  UNROLL for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.q[i]);
}
INLINE void store_n(float* p, V x, int n) {
  if (n == 16) return store(p, x);
  float copy[16];
  store(copy, x);
  __builtin_memcpy(p, copy, n * sizeof(float));
}
INLINE V add(V x, V y) { EACH_QUARTER(vaddq_f32(x.q[i], y.q[i])); }
INLINE V sub(V x, V y) { EACH_QUARTER(vsubq_f32(x.q[i], y.q[i])); }
INLINE V mul(V x, V y) { EACH_QUARTER(vmulq_f32(x.q[i], y.q[i])); }
INLINE V div(V x, V y) { EACH_QUARTER(vdivq_f32(x.q[i], y.q[i])); }
INLINE V fma(V x, V y, V z) { EACH_QUARTER(vfmaq_f32(z.q[i], x.q[i], y.q[i])); }

// p > q ? x : y, where a comparison with NaN is false.
INLINE V if_greater(V p, V q, V x, V y) { EACH_QUARTER(vbslq_f32(vcgtq_f32(p.q[i], q.q[i]), x.q[i], y.q[i])); }

// The first n lanes of x, the others replaced by `rest`.
INLINE V keep_n(V x, int n, V rest) {
  const int32x4_t index = {0, 1, 2, 3};
  EACH_QUARTER(vbslq_f32(vcltq_s32(index, vdupq_n_s32(n - 4 * i)), x.q[i], rest.q[i]));
}

INLINE V load_bf16_n(const uint16_t* p, int n) {
  uint16_t copy[16] = {};
  if (n < 16) {
    __builtin_memcpy(copy, p, n * sizeof(uint16_t));
    p = copy;
  }
  EACH_QUARTER(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}

// The columns of the even and the odd k of a pair; see LinearShape.
INLINE void load_pair(const void* p, V& even, V& odd) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const uint32x4_t words = load_words(static_cast<const char*>(p) + 16 * i);
    even.q[i] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    odd.q[i] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)));
  }
}

// 2^n for integral n in [-126, 127].
INLINE V exp2_integral(V n) {
  EACH_QUARTER(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23)));
}

// Lanes i and i + 8 first, then 4, 2, 1 apart.
INLINE float sum_lanes(V x) {
  const float32x4_t z = vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(z), vget_high_f32(z)));
}

INLINE float max_lanes(V x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3])));
}

INLINE void transpose4(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  uint32x4_t a[4];
  uint64x2_t b[4];
  UNROLL for (int i = 0; i < 4; ++i) a[i] = load_words(rows[i] + column);
  UNROLL for (int i = 0; i < 4; i += 2) {
    b[i] = vreinterpretq_u64_u32(vtrn1q_u32(a[i], a[i + 1]));
    b[i + 1] = vreinterpretq_u64_u32(vtrn2q_u32(a[i], a[i + 1]));
  }
  UNROLL for (int j = 0; j < 2; ++j) {
    vst1q_u32(out + 16 * j, vreinterpretq_u32_u64(vtrn1q_u64(b[j], b[2 + j])));
    vst1q_u32(out + 16 * (2 + j), vreinterpretq_u32_u64(vtrn2q_u64(b[j], b[2 + j])));
  }
}

// out[16 * c + r] = rows[r][c] for a 16 x 16 block of 32-bit words.
INLINE void transpose16(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  for (int c = 0; c < 16; c += 4) {
    UNROLL for (int r = 0; r < 16; r += 4) transpose4(rows + r, column + c, out + 16 * c + r);
  }
}

// 16 int32 lanes; as weights of a dot product (load_pairs, load_quads) the same 64 bytes in another order.
struct I {
  int32x4_t q[4];
};

#define EACH_INT_QUARTER(expression)                      \
  I r;                                                    \
  UNROLL for (int i = 0; i < 4; ++i) r.q[i] = expression; \
  return r

INLINE I spread(const int32_t* p) { EACH_INT_QUARTER(vdupq_n_s32(*p)); }
INLINE I zero_int() { EACH_INT_QUARTER(vdupq_n_s32(0)); }
INLINE I load(const int32_t* p) { EACH_INT_QUARTER(vld1q_s32(p + 4 * i)); }
INLINE void store(int32_t* p, I x) {
  UNROLL for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.q[i]);
}
INLINE I sub(I x, I y) { EACH_INT_QUARTER(vsubq_s32(x.q[i], y.q[i])); }
INLINE V to_float(I x) { EACH_QUARTER(vcvtq_f32_s32(x.q[i])); }
INLINE I round_to_int(V x) { EACH_INT_QUARTER(vcvtnq_s32_f32(x.q[i])); }

// 16 x 2 signed bytes (see LinearShape) as int16: the first of each column, 8 to a register, then the second ones.
INLINE I load_pairs(const void* p) {
  const int8x16x2_t bytes = vld2q_s8(static_cast<const int8_t*>(p));
  I r;
  UNROLL for (int i = 0; i < 2; ++i) {
    r.q[2 * i] = vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(bytes.val[i])));
    r.q[2 * i + 1] = vreinterpretq_s32_s16(vmovl_high_s8(bytes.val[i]));
  }
  return r;
}

// 16 x 4 nibbles (see LinearShape) as bytes: register i has the i-th of each column.
INLINE I load_quads(const void* p) {
  const uint8x8x4_t both = vld4_u8(static_cast<const uint8_t*>(p));
  EACH_INT_QUARTER(
      vreinterpretq_s32_u8(vcombine_u8(vand_u8(both.val[i], vdup_n_u8(15)), vshr_n_u8(both.val[i], 4))));
}

// Left to itself GCC interleaves the rows of a tile and runs out of registers; this keeps a sum's steps in order.
INLINE I in_order(I x) {
  asm volatile("" : "+w"(x.q[0]), "+w"(x.q[1]), "+w"(x.q[2]), "+w"(x.q[3]));
  return x;
}

// sum + w . x, of 2 x int16 in each lane; x the same in all lanes.
INLINE I dot_pairs(I sum, I w, I x) {
  const int16x8_t both = vreinterpretq_s16_s32(x.q[0]);
  UNROLL for (int i = 0; i < 2; ++i) {
    const int16x8_t first = vreinterpretq_s16_s32(w.q[i]), second = vreinterpretq_s16_s32(w.q[2 + i]);
    sum.q[2 * i] = vmlal_laneq_s16(sum.q[2 * i], vget_low_s16(first), both, 0);
    sum.q[2 * i + 1] = vmlal_high_laneq_s16(sum.q[2 * i + 1], first, both, 0);
    sum.q[2 * i] = vmlal_laneq_s16(sum.q[2 * i], vget_low_s16(second), both, 1);
    sum.q[2 * i + 1] = vmlal_high_laneq_s16(sum.q[2 * i + 1], second, both, 1);
  }
  return in_order(sum);
}

// sum + w . x, of 4 x (0..15 times a signed byte) in each lane; x the same in all lanes. After up to 8 of them
// finish_quads gives the lanes: until then these are int16 sums, of bytes 0 and 1 in the first two registers and of
// bytes 2 and 3 in the others, at most 8 x 2 x 15 x 127.
INLINE I dot_quads(I sum, I w, I x) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const int8x16_t own = vreinterpretq_s8_s32(w.q[i]);
    const int8x16_t byte = vdupq_n_s8(vgetq_lane_s8(vreinterpretq_s8_s32(x.q[0]), i));
    int32x4_t *low = &sum.q[i / 2 * 2], *high = low + 1;
    *low = vreinterpretq_s32_s16(vmlal_s8(vreinterpretq_s16_s32(*low), vget_low_s8(own), vget_low_s8(byte)));
    *high = vreinterpretq_s32_s16(vmlal_high_s8(vreinterpretq_s16_s32(*high), own, byte));
  }
  return in_order(sum);
}

INLINE I finish_quads(I sum) {
  I r;
  UNROLL for (int i = 0; i < 2; ++i) {
    const int16x8_t a = vreinterpretq_s16_s32(sum.q[i]), b = vreinterpretq_s16_s32(sum.q[2 + i]);
    r.q[2 * i] = vaddl_s16(vget_low_s16(a), vget_low_s16(b));
    r.q[2 * i + 1] = vaddl_high_s16(a, b);
  }
  return r;
}
