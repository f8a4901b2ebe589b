// 16 fp32 lanes in four 128-bit compiler vectors, for CPUs without a variant of their own. An FMA that the CPU lacks
// becomes an exact library call. The four vec_*.h define the same functions with the same bits.
#pragma once

typedef float F4 __attribute__((vector_size(16)));

struct V {
  F4 q[4];
};

constexpr int kTileRows = 4;
constexpr int kTileVectors = 4;
constexpr int kGroupTileVectors = 4;
constexpr int kWideTiles = 3;

#define EACH_QUARTER(expression)                       \
  V r;                                                 \
  UNROLL for (int i = 0; i < 4; ++i) r.q[i] = expression; \
  return r
#define EACH_LANE(expression)                                                                  \
  V r;                                                                                         \
  UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int j = 0; j < 4; ++j) r.q[i][j] = expression; \
  return r

INLINE V set1(float x) { EACH_QUARTER((F4{x, x, x, x})); }
INLINE V zero() { return set1(0.0f); }
INLINE V load(const float* p) {
  V r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
INLINE V load_n(const float* p, int n) {
  V r = zero();
  __builtin_memcpy(&r, p, n * sizeof(float));
  return r;
}
INLINE void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE void store_n(float* p, V x, int n) { __builtin_memcpy(p, &x, n * sizeof(float)); }
INLINE V add(V x, V y) { EACH_QUARTER(x.q[i] + y.q[i]); }
INLINE V sub(V x, V y) { EACH_QUARTER(x.q[i] - y.q[i]); }
INLINE V mul(V x, V y) { EACH_QUARTER(x.q[i] * y.q[i]); }
INLINE V div(V x, V y) { EACH_QUARTER(x.q[i] / y.q[i]); }
INLINE V fma(V x, V y, V z) { EACH_LANE(__builtin_fmaf(x.q[i][j], y.q[i][j], z.q[i][j])); }

// p > q ? x : y, where a comparison with NaN is false.
INLINE V if_greater(V p, V q, V x, V y) { EACH_LANE(p.q[i][j] > q.q[i][j] ? x.q[i][j] : y.q[i][j]); }

// The first n lanes of x, the others replaced by `rest`.
INLINE V keep_n(V x, int n, V rest) { EACH_LANE(4 * i + j < n ? x.q[i][j] : rest.q[i][j]); }

INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE V load_bf16_n(const uint16_t* p, int n) {
  EACH_LANE(4 * i + j < n ? from_bits(static_cast<uint32_t>(p[4 * i + j]) << 16) : 0.0f);
}

// The columns of the even and the odd k of a pair; see LinearShape.
INLINE void load_pair(const void* p, V& even, V& odd) {
  uint32_t words[16];
  __builtin_memcpy(words, p, sizeof words);
  UNROLL for (int i = 0; i < 16; ++i) {
    even.q[i / 4][i % 4] = from_bits(words[i] << 16);
    odd.q[i / 4][i % 4] = from_bits(words[i] & 0xffff0000u);
  }
}

// 2^n for integral n in [-126, 127]; whatever n is NaN gives is multiplied by NaN.
INLINE V exp2_integral(V n) {
  EACH_LANE(n.q[i][j] == n.q[i][j] ? from_bits(static_cast<uint32_t>(static_cast<int>(n.q[i][j]) + 127) << 23) : 1.0f);
}

// Lanes i and i + 8 first, then 4, 2, 1 apart.
INLINE float sum_lanes(V x) {
  const F4 z = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
  return (z[0] + z[2]) + (z[1] + z[3]);
}

INLINE float max_lanes(V x) {
  float m = x.q[0][0];
  for (int i = 1; i < 16; ++i) m = m > x.q[i / 4][i % 4] ? m : x.q[i / 4][i % 4];
  return m;
}

// out[16 * c + r] = rows[r][c] for a 16 x 16 block of 32-bit words.
INLINE void transpose16(const uint32_t* const* rows, int64_t column, uint32_t* out) {
  for (int r = 0; r < 16; ++r) {
    uint32_t row[16];  // rows of bf16 may begin between two words
    __builtin_memcpy(row, rows[r] + column, sizeof row);
    for (int c = 0; c < 16; ++c) out[16 * c + r] = row[c];
  }
}

// 16 int32 lanes.
struct I {
  int32_t lane[16];
};

#define EACH_INT(expression)                               \
  I r;                                                     \
  UNROLL for (int i = 0; i < 16; ++i) r.lane[i] = expression; \
  return r

INLINE I zero_int() { EACH_INT(0); }
INLINE I spread(const int32_t* p) { EACH_INT(*p); }
INLINE I load(const int32_t* p) {
  I r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
INLINE void store(int32_t* p, I x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE I sub(I x, I y) { EACH_INT(x.lane[i] - y.lane[i]); }
INLINE V to_float(I x) { EACH_LANE(static_cast<float>(x.lane[4 * i + j])); }

// To nearest even, for magnitudes below 2^22: the sum with 1.5 * 2^23 has the integer in its low bits.
INLINE I round_to_int(V x) {
  EACH_INT([](float sum) {
    uint32_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    return static_cast<int32_t>(bits - 0x4b400000u);
  }(x.q[i / 4][i % 4] + 12582912.0f));
}

// Byte i of a lane, signed.
INLINE int32_t byte_of(int32_t lane, int i) { return static_cast<int8_t>(static_cast<uint32_t>(lane) >> (8 * i)); }
INLINE int32_t half_of(int32_t lane, int i) { return static_cast<int16_t>(static_cast<uint32_t>(lane) >> (16 * i)); }

// 16 x 2 signed bytes as 16 x 2 int16; see LinearShape.
INLINE I load_pairs(const void* p) {
  int8_t bytes[32];
  __builtin_memcpy(bytes, p, sizeof bytes);
  EACH_INT(static_cast<int32_t>(static_cast<uint32_t>(bytes[2 * i + 1]) << 16 | static_cast<uint16_t>(bytes[2 * i])));
}

// 16 x 4 nibbles as 16 x 4 bytes; see LinearShape.
INLINE I load_quads(const void* p) {
  uint32_t words[8];
  __builtin_memcpy(words, p, sizeof words);
  EACH_INT(static_cast<int32_t>(words[i % 8] >> (i / 8 * 4) & 0x0f0f0f0f));
}

// sum + w . x, of 2 x int16 in each lane.
INLINE I dot_pairs(I sum, I w, I x) {
  EACH_INT(sum.lane[i] + half_of(w.lane[i], 0) * half_of(x.lane[i], 0) + half_of(w.lane[i], 1) * half_of(x.lane[i], 1));
}

// sum + w . x, of 4 x (0..15 times a signed byte) in each lane.
INLINE I dot_quads(I sum, I w, I x) {
  I r = sum;
  for (int b = 0; b < 4; ++b) {
    UNROLL for (int i = 0; i < 16; ++i) r.lane[i] += byte_of(w.lane[i], b) * byte_of(x.lane[i], b);
  }
  return r;
}

INLINE I finish_quads(I sum) { return sum; }
