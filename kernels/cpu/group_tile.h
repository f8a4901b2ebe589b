// The register tile of the int8 and int4 formats: integer dot products inside a group of 32 k, which are exact in any
// order, then one FMA per group, sum += float(dot) * (weight scale * activation scale), groups ascending.
//
// Activations are quantised row by row and group by group, to 12 bits beside int8 and 8 bits beside int4 weights, so
// that neither the batch nor a cut of K at a group's edge changes a bit.
#pragma once

#include "tile.h"

constexpr int kGroup = 32;

template <int DT>
struct GroupFormat {
  static constexpr int kSteps = DT == kInt8 ? kGroup / 2 : kGroup / 4;  // of one dot product per lane
  static constexpr int64_t kBytes = (1 + kSteps) * 32;                  // of a panel's group, scales included
  static constexpr int kWords = kSteps + 2;                             // of a row's group: values, scale, offset
  static constexpr float kLimit = DT == kInt8 ? 2047.0f : 127.0f;
};

INLINE int64_t groups_in(int64_t k_len) { return ceil_div(k_len, kGroup); }

// One group of one row into its word lane of a tile of mr rows: out[step * mr], then scale and offset. A group with NaN
// or infinity gets the scale NaN. The offset is what the +8 of stored int4 weights adds to the dot product.
template <int DT>
INLINE void quantize_group(const float* x, int n, int mr, int32_t* out) {
  using F = GroupFormat<DT>;
  const V low = load_n(x, n < kLanes ? n : kLanes), high = n > kLanes ? load_n(x + kLanes, n - kLanes) : zero();
  const V low_size = if_greater(zero(), low, sub(zero(), low), low);
  const V high_size = if_greater(zero(), high, sub(zero(), high), high);
  const float size = max_lanes(if_greater(low_size, high_size, low_size, high_size));
  const V spoilt = fma(low, zero(), mul(high, zero()));
  const V inverse = set1(size > 1e-30f ? F::kLimit / size : 0.0f);
  const float scale = size / F::kLimit + sum_lanes(spoilt);
  int32_t q[kGroup];
  store(q, round_to_int(mul(low, inverse)));
  store(q + kLanes, round_to_int(mul(high, inverse)));
  int32_t sum = 0;
  for (int step = 0; step < F::kSteps; ++step) {
    uint32_t word;
    if constexpr (DT == kInt8) {
      word = static_cast<uint16_t>(q[2 * step]) | static_cast<uint32_t>(q[2 * step + 1]) << 16;
    } else {
      word = 0;
      for (int i = 0; i < 4; ++i) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(q[4 * step + i])) << (8 * i);
        sum += static_cast<int8_t>(q[4 * step + i]);
      }
    }
    out[step * mr] = static_cast<int32_t>(word);
  }
  __builtin_memcpy(out + F::kSteps * mr, &scale, sizeof scale);
  out[(F::kSteps + 1) * mr] = 8 * sum;
}

// A tile of mr rows, each group a block [word][row], into out; bounds as in LinearShape.
template <int DT>
INLINE void quantize_rows(const float* x, const LinearShape& shape, int mr, int32_t* out) {
  for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
    const int64_t end = shape.bounds[chunk + 1];
    for (int64_t k = shape.bounds[chunk]; k < end; k += kGroup, out += GroupFormat<DT>::kWords * mr) {
      const int n = static_cast<int>(least(kGroup, end - k));
      for (int r = 0; r < mr; ++r) quantize_group<DT>(x + r * shape.in_dim + k, n, mr, out + r);
    }
  }
}

// What a tile reads in a group's place: the packed group itself, or the same widened to a vector a step by widen_group.
template <int DT, bool kIsWide>
INLINE I load_step(const char* group, int step) {
  const char* source = group + (1 + step) * (kIsWide ? kVectorBytes : kVectorBytes / 2);
  if constexpr (kIsWide) return load(reinterpret_cast<const int32_t*>(source));
  else if constexpr (DT == kInt8) return load_pairs(source);
  else return load_quads(source);
}

// Scales as floats, then every step as the vector that the dot product takes.
template <int DT>
INLINE void widen_group(const char* group, char* out) {
  store(reinterpret_cast<float*>(out), load_bf16_n(reinterpret_cast<const uint16_t*>(group), kLanes));
  for (int step = 0; step < GroupFormat<DT>::kSteps; ++step) {
    store(reinterpret_cast<int32_t*>(out + (1 + step) * kVectorBytes), load_step<DT, false>(group, step));
  }
}

// a: the tile's blocks from the first of `groups` on; b: the first panel there. The sums over groups stay in memory,
// acc[r][p], so that all registers are left for the dot products.
template <int MR, int NP, int DT, bool kIsWide>
INLINE void multiply_groups(const int32_t* a, const char* b, int64_t panel_bytes, int64_t groups,
                            float (&acc)[MR][NP][kLanes]) {
  using F = GroupFormat<DT>;
  for (; groups > 0; --groups, a += F::kWords * MR, b += F::kBytes * (kIsWide ? 2 : 1)) {
    I sum[MR][NP];
    UNROLL for (int r = 0; r < MR; ++r) {
      UNROLL for (int p = 0; p < NP; ++p) sum[r][p] = zero_int();
    }
    NO_UNROLL for (int step = 0; step < F::kSteps; step += 2) {
      UNROLL for (int half = 0; half < 2; ++half) {
        I w[NP];
        UNROLL for (int p = 0; p < NP; ++p) {
          if (!kIsWide && half) __builtin_prefetch(b + p * panel_bytes + step * 32 + kPrefetchBytes);
          w[p] = load_step<DT, kIsWide>(b + p * panel_bytes, step + half);
        }
        UNROLL for (int r = 0; r < MR; ++r) {
          const I x = spread(a + (step + half) * MR + r);
          UNROLL for (int p = 0; p < NP; ++p) {
            sum[r][p] = DT == kInt8 ? dot_pairs(sum[r][p], w[p], x) : dot_quads(sum[r][p], w[p], x);
          }
        }
      }
    }
    UNROLL for (int p = 0; p < NP; ++p) {
      const char* scales = b + p * panel_bytes;
      const V scale = kIsWide ? load(reinterpret_cast<const float*>(scales))
                              : load_bf16_n(reinterpret_cast<const uint16_t*>(scales), kLanes);
      UNROLL for (int r = 0; r < MR; ++r) {
        float row_scale;
        __builtin_memcpy(&row_scale, a + F::kSteps * MR + r, sizeof row_scale);
        I dot = sum[r][p];
        if constexpr (DT == kInt4) dot = sub(finish_quads(dot), spread(a + (F::kSteps + 1) * MR + r));
        store(acc[r][p], fma(to_float(dot), mul(scale, set1(row_scale)), load(acc[r][p])));
      }
    }
    asm volatile("" : : "r"(acc) : "memory");  // or the sums would be kept in registers after all
  }
}
