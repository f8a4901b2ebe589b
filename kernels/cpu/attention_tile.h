// The arithmetic of attention: a tile of query rows against one KV split, and the merging of splits. Inside a split a
// score is one FMA chain over the head dim, and a row's output one FMA chain over ascending positions.
#pragma once

#include "tile.h"

constexpr int kSplit = 256;
constexpr int kScoreStride = kSplit + kLanes;  // not a power of two, so that rows do not collide in the L1 cache
constexpr int kRowsPerAttentionTask = 96;

struct Piece {
  int32_t sequence, first_token, tokens;  // query tokens, counted from the sequence's first one in this batch
};

struct AttentionJob {
  float* o_TNH;
  const float* q_TNH;
  const char *k_cache, *v_cache;
  const int32_t *block_tables_SB, *query_start_S1, *context_lens_S;
  const AttentionShape* shape;
  float scale;
  const Piece* pieces;
  int64_t group, panels;  // query heads per KV head; panels of 16 columns of the head dim
  int64_t max_rows;       // of a task
  int64_t splits;         // of the longest context
  float* partial;
  int64_t partial_floats;  // per task
  Pool* pool;
};

// One task's scratch memory. Sizes in floats; everything stays 64-byte aligned.
struct AttentionScratch {
  float *q, *o, *split_o, *scores, *max, *sum, *zeros;
  char *keys, *values;
  const char **key_rows, **value_rows;

  static int64_t carve(const AttentionJob& job, char* base, AttentionScratch& s) {
    const int64_t H = job.shape->head_dim, padded = job.panels * kLanes;
    int64_t used = 0;
    auto take = [&](int64_t num_bytes) {
      char* p = base + used;
      used += ceil_div(num_bytes, kVectorBytes) * kVectorBytes;
      return p;
    };
    auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n * 4)); };
    s.q = floats(job.max_rows * H);
    s.o = floats(job.max_rows * padded);
    s.split_o = floats(kTileRows * padded);
    s.scores = floats(kTileRows * kScoreStride);
    s.max = floats(job.max_rows);
    s.sum = floats(job.max_rows);
    s.zeros = floats(H + kLanes);
    s.keys = take(kSplit * H * 4);
    s.values = take(kSplit * padded * 4);
    s.key_rows = reinterpret_cast<const char**>(take(kSplit * sizeof(char*)));
    s.value_rows = reinterpret_cast<const char**>(take(kSplit * sizeof(char*)));
    return used;
  }
};

// c[r * stride + 16 p] (+)= the product of multiply().
template <int DT, int AR, int AK>
struct Product {
  template <int MR, int NP>
  struct At {
    static void run(const float* a, const char* b, int64_t panel_bytes, int64_t k_len, float* c, int64_t stride,
                    bool accumulate) {
      V acc[MR][NP];
      UNROLL for (int r = 0; r < MR; ++r) {
        UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = accumulate ? load(c + r * stride + p * kLanes) : zero();
      }
      multiply<MR, NP, DT, AR, AK == 0 ? MR : AK>(a, b, panel_bytes, k_len, acc);
      UNROLL for (int r = 0; r < MR; ++r) {
        UNROLL for (int p = 0; p < NP; ++p) store(c + r * stride + p * kLanes, acc[r][p]);
      }
    }
  };

  static void run(int mr, int64_t panels, const float* a, const char* b, int64_t panel_bytes, int64_t k_len, float* c,
                  int64_t stride, bool accumulate) {
    int step = most_panels(mr, kTileVectors);
    for (int64_t p = 0; p < panels; p += step) {
      while (step > panels - p) step /= 2;
      const auto run = pick_tile<At, kTileVectors, 1>(mr, step);
      run(a, b + p * panel_bytes, panel_bytes, k_len, c + p * kLanes, stride, accumulate);
    }
  }
};

// Where positions [start, start + n) of one KV head lie.
INLINE void locate_rows(const AttentionJob& job, int64_t sequence, int64_t head, int64_t start, int64_t n,
                        const AttentionScratch& s) {
  const AttentionShape& shape = *job.shape;
  const int64_t row_bytes = shape.head_dim * (shape.dtype == kFloat32 ? 4 : 2);
  const int32_t* table = job.block_tables_SB + sequence * shape.max_blocks;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t block = table[(start + i) / shape.block_size], offset = (start + i) % shape.block_size;
    const int64_t row = ((block * shape.num_kv_heads + head) * shape.block_size + offset) * row_bytes;
    s.key_rows[i] = job.k_cache + row;
    s.value_rows[i] = job.v_cache + row;
  }
}

// Keys become a packed weight whose columns are positions: 16 of them per panel, pairs of bf16 staying pairs.
INLINE void gather_keys(const AttentionJob& job, int64_t n, const AttentionScratch& s) {
  const int64_t words = job.shape->dtype == kFloat32 ? job.shape->head_dim : job.shape->head_dim / 2;
  for (int64_t first = 0; first < n; first += kLanes) {
    const uint32_t* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const void* row = first + i < n ? static_cast<const void*>(s.key_rows[first + i]) : s.zeros;
      rows[i] = static_cast<const uint32_t*>(row);
    }
    uint32_t* out = reinterpret_cast<uint32_t*>(s.keys) + first * words;
    int64_t w = 0;
    for (; w + kLanes <= words; w += kLanes) transpose16(rows, w, out + w * kLanes);
    for (; w < words; ++w) {
      for (int i = 0; i < kLanes; ++i) out[w * kLanes + i] = rows[i][w];
    }
  }
}

// Values become a packed fp32 weight whose k is the position.
INLINE void gather_values(const AttentionJob& job, int64_t n, const AttentionScratch& s) {
  const int64_t H = job.shape->head_dim;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t p = 0; p < job.panels; ++p) {
      const int width = static_cast<int>(least(kLanes, H - p * kLanes));
      const char* row = s.value_rows[i];
      const V x = job.shape->dtype == kFloat32
                      ? load_n(reinterpret_cast<const float*>(row) + p * kLanes, width)
                      : load_bf16_n(reinterpret_cast<const uint16_t*>(row) + p * kLanes, width);
      store(reinterpret_cast<float*>(s.values) + (p * kSplit + i) * kLanes, x);
    }
  }
}

// scores[0..n) become exp(scale * score - max); the lanes up to a multiple of 16 become 0.
INLINE void softmax(float* scores, int64_t n, float scale, float& max, float& sum) {
  const V lowest = set1(-__builtin_inff());
  V top = lowest;
  for (int64_t i = 0; i < n; i += kLanes) {
    V x = mul(load(scores + i), set1(scale));
    if (n - i < kLanes) x = keep_n(x, static_cast<int>(n - i), lowest);
    top = if_greater(x, top, x, top);
    store(scores + i, x);
  }
  max = max_lanes(top);
  V total = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    V p = exp_(sub(load(scores + i), set1(max)));
    if (n - i < kLanes) p = keep_n(p, static_cast<int>(n - i), zero());
    total = add(total, p);
    store(scores + i, p);
  }
  sum = sum_lanes(total);
}

INLINE float exp_of(float x) {
  float lanes[kLanes];
  store(lanes, exp_(set1(x)));
  return lanes[0];
}

// Adds the split's unnormalised output to the row's, both rescaled to the larger of the two maxima.
INLINE void merge_split(float* o, const float* split_o, int64_t panels, float& max, float& sum, float split_max,
                        float split_sum) {
  const float top = split_max > max ? split_max : max;
  const float old_scale = exp_of(max - top), new_scale = exp_of(split_max - top);
  max = top;
  sum = __builtin_fmaf(split_sum, new_scale, sum * old_scale);
  for (int64_t p = 0; p < panels; ++p) {
    const V old = mul(load(o + p * kLanes), set1(old_scale));
    store(o + p * kLanes, fma(load(split_o + p * kLanes), set1(new_scale), old));
  }
}

// One tile of rows against one split. valid[r]: how many of its positions row r may see, ascending, maybe 0.
template <int DT>
void attend(const AttentionJob& job, const AttentionScratch& s, int64_t row, int mr, const int* valid, bool is_first) {
  const int64_t H = job.shape->head_dim, padded = job.panels * kLanes;
  const int64_t key_panel_bytes = H * kLanes * (DT == kFloat32 ? 4 : 2), value_panel_bytes = kSplit * kVectorBytes;
  float max[kTileRows], sum[kTileRows];
  Product<DT, 1, 0>::run(mr, ceil_div(valid[mr - 1], kLanes), s.q + row * H, s.keys, key_panel_bytes, H, s.scores,
                         kScoreStride, false);
  for (int r = 0; r < mr; ++r) {
    if (valid[r]) softmax(s.scores + r * kScoreStride, valid[r], job.scale, max[r], sum[r]);
  }
  Product<kFloat32, kScoreStride, 1>::run(mr, job.panels, s.scores, s.values, value_panel_bytes, valid[0], s.split_o,
                                          padded, false);
  for (int r = 0; r < mr; ++r) {
    if (!valid[r]) continue;
    if (valid[r] > valid[0]) {
      const char* rest = s.values + valid[0] * kVectorBytes;
      Product<kFloat32, kScoreStride, 1>::run(1, job.panels, s.scores + r * kScoreStride + valid[0], rest,
                                              value_panel_bytes, valid[r] - valid[0], s.split_o + r * padded, padded,
                                              true);
    }
    float* o = s.o + (row + r) * padded;
    if (is_first) {
      s.max[row + r] = max[r];
      s.sum[row + r] = sum[r];
      __builtin_memcpy(o, s.split_o + r * padded, padded * sizeof(float));
    } else {
      merge_split(o, s.split_o + r * padded, job.panels, s.max[row + r], s.sum[row + r], max[r], sum[r]);
    }
  }
}
