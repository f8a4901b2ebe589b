// The register tile all products share: MR rows times NP panels of 16 columns, each element one chain of FMAs over k in
// ascending order. It knows neither chunks nor threads.
#pragma once

#include "vec.h"

// Weights come from memory faster than the hardware prefetcher alone asks for them; it stops at every 4 KB.
constexpr int kPrefetchBytes = 512;

// Row r, index k of the left factor is a[r * AR + k * AK]; the right factor is panels as in LinearShape.
template <int MR, int NP, int DT, int AR, int AK>
INLINE void multiply(const float* a, const char* b, int64_t panel_bytes, int64_t k_len, V (&acc)[MR][NP]) {
  int64_t k = 0;
  if constexpr (DT == kBFloat16) {
    for (; k + 1 < k_len; k += 2) {
      V even[NP], odd[NP];
      UNROLL for (int p = 0; p < NP; ++p) {
        const char* source = b + p * panel_bytes + k * (kVectorBytes / 2);
        __builtin_prefetch(source + kPrefetchBytes);
        load_pair(source, even[p], odd[p]);
      }
      UNROLL for (int r = 0; r < MR; ++r) {
        const V x = set1(a[r * AR + k * AK]);
        UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = fma(x, even[p], acc[r][p]);
      }
      UNROLL for (int r = 0; r < MR; ++r) {
        const V x = set1(a[r * AR + (k + 1) * AK]);
        UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = fma(x, odd[p], acc[r][p]);
      }
    }
    if (k < k_len) {
      UNROLL for (int p = 0; p < NP; ++p) {
        V even, odd;
        load_pair(b + p * panel_bytes + k * (kVectorBytes / 2), even, odd);
        UNROLL for (int r = 0; r < MR; ++r) acc[r][p] = fma(set1(a[r * AR + k * AK]), even, acc[r][p]);
      }
    }
  } else {
    for (; k < k_len; ++k) {
      V column[NP];
      UNROLL for (int p = 0; p < NP; ++p) {
        const char* source = b + p * panel_bytes + k * kVectorBytes;
        __builtin_prefetch(source + kPrefetchBytes);
        column[p] = load(reinterpret_cast<const float*>(source));
      }
      UNROLL for (int r = 0; r < MR; ++r) {
        const V x = set1(a[r * AR + k * AK]);
        UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = fma(x, column[p], acc[r][p]);
      }
    }
  }
}

// The most panels (a power of two) whose accumulators, `vectors` at most, fit the registers beside mr rows.
constexpr int most_panels(int mr, int vectors) {
  int np = 8;
  while (np > 1 && np * mr > vectors) np /= 2;
  return np;
}

template <template <int, int> class Function, int MR, int NP>
INLINE auto pick_panels(int np) -> decltype(&Function<1, 1>::run) {
  if constexpr (NP > 1) {
    if (np < NP) return pick_panels<Function, MR, NP / 2>(np);
  }
  return &Function<MR, NP>::run;
}

// Picks Function<MR, NP>::run for run-time mr from `lowest` to kTileRows and np <= most_panels(mr, vectors), a power of
// two. First mr, then np: were the two searches one, each step would contain two copies of all that follow.
template <template <int, int> class Function, int vectors, int lowest, int MR = kTileRows>
INLINE auto pick_tile(int mr, int np) -> decltype(&Function<1, 1>::run) {
  if constexpr (MR > lowest) {
    if (mr < MR) return pick_tile<Function, vectors, lowest, MR - 1>(mr, np);
  }
  return pick_panels<Function, MR, most_panels(MR, vectors)>(np);
}

// Rows are cut into tiles of nearly equal height, so that no tile is left with a row or two.
struct RowTiles {
  int64_t rows, count;

  explicit RowTiles(int64_t rows) : rows(rows), count(ceil_div(rows, kTileRows)) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int height(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

// Copies mr rows so that the mr values of one k are neighbours: out[k * mr + r].
INLINE void interleave_rows(const float* x, int64_t row_stride, int mr, int64_t k_len, float* out) {
  for (int r = 0; r < mr; ++r) {
    for (int64_t k = 0; k < k_len; ++k) out[k * mr + r] = x[r * row_stride + k];
  }
}
