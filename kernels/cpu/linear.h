// y_TN = x_TK W^T (+ bias): fp32 FMAs in ascending k (for int8 and int4: group) inside each chunk of K, the chunk sums
// added in a binary tree ((c0 + c1) + (c2 + c3)) + ..., the bias last. How T, N and threads are cut never enters an
// element's arithmetic.
#pragma once

#include "group_tile.h"

constexpr int kLevels = 3;           // chunk sums waiting for their partner: at most log2(8)
constexpr int kPanelsPerTask = 8;    // their weights and the waiting sums stay in a 2 MB L2 cache
constexpr int kRowsPerTask = 240;
constexpr int64_t kCachedRowBytes = 256 * 1024;

struct LinearJob {
  float* y_TN;
  const void* a;  // x with the rows of each tile interleaved, for int8 and int4 quantised
  int64_t row_bytes;  // of a
  const char* weight;
  const float* bias_N;
  const LinearShape* shape;
  RowTiles tiles;
  Pool* pool;
  int64_t panels, panels_per_task, tiles_per_task, panel_tasks;
  int panels_per_step;
  size_t waiting_bytes;
};

// Where a tile stands: its rows, its first panel, the chunk, its waiting sums [panel][level][row][16], and the weights.
struct TilePlace {
  int64_t row, panel;
  int chunk;
  float* waiting;
  const char* weight;
  int64_t panel_bytes;
};

INLINE float* waiting_at(float* waiting, int panel, int level) {
  return waiting + (panel * kLevels + level) * kTileRows * kLanes;
}

constexpr bool is_grouped(int dtype) { return dtype == kInt8 || dtype == kInt4; }
constexpr int tile_vectors(int dtype) { return is_grouped(dtype) ? kGroupTileVectors : kTileVectors; }

// kIsWide: the weights come from widen_chunk, which leaves the tile nothing to do but multiply.
template <int DT, bool kIsWide>
struct LinearTile {
  template <int MR, int NP>
  struct At {
    // Adds the sum of chunk c to the sums that wait for it, as a carry runs through a binary counter.
    static void run(const LinearJob& job, const TilePlace& at) {
      const LinearShape& shape = *job.shape;
      const int64_t k = shape.bounds[at.chunk], k_len = shape.bounds[at.chunk + 1] - k;
      const char* a = static_cast<const char*>(job.a) + at.row * job.row_bytes;
      V acc[MR][NP];
      if constexpr (is_grouped(DT)) {
        alignas(64) float sums[MR][NP][kLanes] = {};
        const int64_t words = k / kGroup * GroupFormat<DT>::kWords * MR;
        multiply_groups<MR, NP, DT, kIsWide>(reinterpret_cast<const int32_t*>(a) + words, at.weight, at.panel_bytes,
                                             groups_in(k_len), sums);
        UNROLL for (int r = 0; r < MR; ++r) {
          UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = load(sums[r][p]);
        }
      } else {
        UNROLL for (int r = 0; r < MR; ++r) {
          UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = zero();
        }
        multiply<MR, NP, kIsWide ? kFloat32 : DT, 1, MR>(reinterpret_cast<const float*>(a) + k * MR, at.weight,
                                                         at.panel_bytes, k_len, acc);
      }
      int level = 0;
      for (; (at.chunk >> level) & 1; ++level) {
        UNROLL for (int p = 0; p < NP; ++p) {
          const float* earlier = waiting_at(at.waiting, p, level);
          UNROLL for (int r = 0; r < MR; ++r) acc[r][p] = add(load(earlier + r * kLanes), acc[r][p]);
        }
      }
      if (at.chunk + 1 == shape.num_chunks) return finish(job, at, acc);
      UNROLL for (int p = 0; p < NP; ++p) {
        float* later = waiting_at(at.waiting, p, level);
        UNROLL for (int r = 0; r < MR; ++r) store(later + r * kLanes, acc[r][p]);
      }
    }

    INLINE void finish(const LinearJob& job, const TilePlace& at, V (&acc)[MR][NP]) {
      const int64_t N = job.shape->out_dim;
      UNROLL for (int p = 0; p < NP; ++p) {
        const int64_t column = (at.panel + p) * kLanes;
        const int width = static_cast<int>(least(kLanes, N - column));
        UNROLL for (int r = 0; r < MR; ++r) {
          V y = acc[r][p];
          if (job.bias_N) y = add(y, load_n(job.bias_N + column, width));
          store_n(job.y_TN + (at.row + r) * N + column, y, width);
        }
      }
    }
  };
};

// Bytes of a chunk's widened panel.
template <int DT>
INLINE int64_t wide_bytes(int64_t k_len) {
  return is_grouped(DT) ? groups_in(k_len) * GroupFormat<DT>::kBytes * 2 : k_len * kVectorBytes;
}

// One panel's chunk as the tiles compute with it: bf16 as floats, integers at the width of the dot product.
template <int DT>
INLINE void widen_chunk(const char* weight, int64_t k_len, char* out) {
  if constexpr (is_grouped(DT)) {
    using F = GroupFormat<DT>;
    for (int64_t g = 0; g < groups_in(k_len); ++g) widen_group<DT>(weight + g * F::kBytes, out + g * F::kBytes * 2);
  } else {
    float* rows = reinterpret_cast<float*>(out);
    for (int64_t k = 0; k < k_len; k += 2, weight += kVectorBytes) {
      V even, odd;
      load_pair(weight, even, odd);
      store(rows + k * kLanes, even);
      if (k + 1 < k_len) store(rows + (k + 1) * kLanes, odd);
    }
  }
}

INLINE void prefetch_lines(const char* begin, const char* end) {
  for (; begin < end; begin += kVectorBytes) __builtin_prefetch(begin);
}

template <int DT, bool kIsWide>
void linear_task(void* opaque, int task, int slot) {
  const LinearJob& job = *static_cast<const LinearJob*>(opaque);
  constexpr int lowest = kIsWide ? kTileRows * (kWideTiles - 1) / kWideTiles : 1;
  const LinearShape& shape = *job.shape;
  float* waiting = static_cast<float*>(pool_scratch(job.pool, slot, 0));
  char* wide = reinterpret_cast<char*>(waiting) + job.waiting_bytes;
  const int64_t first_panel = task % job.panel_tasks * job.panels_per_task;
  const int panels = static_cast<int>(least(job.panels_per_task, job.panels - first_panel));
  const int64_t first_tile = task / job.panel_tasks * job.tiles_per_task;
  const int64_t tiles = least(job.tiles_per_task, job.tiles.count - first_tile);
  for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
    const int64_t k_len = shape.bounds[chunk + 1] - shape.bounds[chunk];
    for (int panel = 0, step = job.panels_per_step; panel < panels; panel += step) {
      while (step > panels - panel) step /= 2;
      TilePlace at{0, first_panel + panel, chunk, nullptr, nullptr, shape.panel_bytes};
      const char* packed = job.weight + at.panel * shape.panel_bytes + shape.chunk_bytes[chunk];
      const int64_t num_bytes = shape.chunk_bytes[chunk + 1] - shape.chunk_bytes[chunk];
      at.weight = packed;
      if (kIsWide) {
        at.panel_bytes = wide_bytes<DT>(k_len);
        for (int p = 0; p < step; ++p) {
          widen_chunk<DT>(packed + p * shape.panel_bytes, k_len, wide + p * at.panel_bytes);
        }
        at.weight = wide;
      }
      for (int64_t i = 0; i < tiles; ++i) {
        if (kIsWide) {
          // What comes next in memory is widened next: each tile asks for a share of it.
          for (int p = 0; p < step; ++p) {
            const char* next = packed + p * shape.panel_bytes + num_bytes;
            prefetch_lines(next + num_bytes * i / tiles, next + num_bytes * (i + 1) / tiles);
          }
        }
        at.row = job.tiles.begin(first_tile + i);
        at.waiting = waiting_at(waiting, static_cast<int>(i * job.panels_per_task) + panel, 0);
        const int height = job.tiles.height(first_tile + i);
        pick_tile<LinearTile<DT, kIsWide>::template At, tile_vectors(DT), lowest>(height, step)(job, at);
      }
    }
  }
}

// Lays the rows out as linear_task reads them, into scratch memory unless they lie so already. False: none was left.
template <int DT>
bool prepare_rows(LinearJob& job, const float* x_TK) {
  const LinearShape& shape = *job.shape;
  const int64_t K = shape.in_dim, T = job.tiles.rows;
  job.a = x_TK;
  job.row_bytes = is_grouped(DT) ? groups_in(K) * GroupFormat<DT>::kWords * 4 : K * 4;
  if (K == 0 || (T == 1 && !is_grouped(DT))) return true;
  char* a = static_cast<char*>(pool_scratch(job.pool, pool_threads(job.pool), T * job.row_bytes));
  if (!a) return false;
  parallel_for(job.pool, job.tiles.count, ceil_div(65536, kTileRows * K), [&](int64_t tile, int64_t count) {
    for (; count > 0; ++tile, --count) {
      const int64_t row = job.tiles.begin(tile);
      const int mr = job.tiles.height(tile);
      char* out = a + row * job.row_bytes;
      if constexpr (is_grouped(DT)) quantize_rows<DT>(x_TK + row * K, shape, mr, reinterpret_cast<int32_t*>(out));
      else interleave_rows(x_TK + row * K, K, mr, K, reinterpret_cast<float*>(out));
    }
  });
  job.a = a;
  return true;
}

template <int DT>
int linear_of(LinearJob& job, const float* x_TK) {
  const LinearShape& shape = *job.shape;
  const int64_t T = job.tiles.rows;
  const bool is_wide = DT != kFloat32 && job.tiles.count >= kWideTiles;
  if (!prepare_rows<DT>(job, x_TK)) return kOutOfMemory;
  job.panels_per_step = most_panels(static_cast<int>(ceil_div(T, job.tiles.count)), tile_vectors(DT));
  job.panels = ceil_div(shape.out_dim, kLanes);
  job.tiles_per_task = ceil_div(job.tiles.count, ceil_div(T, kRowsPerTask));
  // Rows that stay in the cache leave the weights to be read in one piece; others are read again for each chunk.
  const bool stay = job.tiles_per_task * kTileRows * job.row_bytes <= kCachedRowBytes;
  job.panels_per_task = stay ? job.panels_per_step : kPanelsPerTask;
  job.panel_tasks = ceil_div(job.panels, job.panels_per_task);
  job.waiting_bytes = job.tiles_per_task * job.panels_per_task * kLevels * kTileRows * kVectorBytes;
  int64_t longest = 0;
  for (int c = 0; c < shape.num_chunks; ++c) {
    const int64_t k_len = shape.bounds[c + 1] - shape.bounds[c];
    longest = k_len > longest ? k_len : longest;
  }
  const size_t wide = is_wide ? job.panels_per_step * wide_bytes<DT>(longest) : 0;
  for (int slot = 0; slot < pool_threads(job.pool); ++slot) {
    if (!pool_scratch(job.pool, slot, job.waiting_bytes + wide)) return kOutOfMemory;
  }
  const int64_t tasks = job.panel_tasks * ceil_div(job.tiles.count, job.tiles_per_task);
  pool_run(job.pool, static_cast<int>(tasks), is_wide ? linear_task<DT, DT != kFloat32> : linear_task<DT, false>, &job);
  return kOk;
}

int linear(Pool* pool, const LinearArgs& args) {
  const auto [weight, bias_N, shape] = args.weight;
  if (args.T == 0 || shape->out_dim == 0) return kOk;
  LinearJob job{args.y_TN, nullptr, 0, static_cast<const char*>(weight), bias_N, shape, RowTiles(args.T), pool};
  switch (shape->dtype) {
    case kBFloat16: return linear_of<kBFloat16>(job, args.x_TK);
    case kInt8: return linear_of<kInt8>(job, args.x_TK);
    case kInt4: return linear_of<kInt4>(job, args.x_TK);
    default: return linear_of<kFloat32>(job, args.x_TK);
  }
}
