// y_TN = x_TK W^T (+ bias): fp32 FMAs in ascending k inside each chunk of K, the chunk sums added in a binary tree
// ((c0 + c1) + (c2 + c3)) + ..., the bias last. How T, N and threads are cut never enters an element's arithmetic.
#pragma once

#include "tile.h"

constexpr int kLevels = 3;           // chunk sums waiting for their partner: at most log2(8)
constexpr int kPanelsPerTask = 8;    // their weights and the waiting sums stay in a 2 MB L2 cache
constexpr int kRowsPerTask = 240;

struct LinearJob {
  float* y_TN;
  const float* a;  // x, with the rows of each tile interleaved
  const char* weight;
  const float* bias_N;
  const LinearShape* shape;
  RowTiles tiles;
  int64_t panels, panels_per_task, tiles_per_task, panel_tasks;
  Pool* pool;
};

// Where a tile stands: its rows, its first panel, the chunk, and its waiting sums [panel][level][row][16].
struct TilePlace {
  int64_t row, panel;
  int chunk;
  float* waiting;
};

INLINE float* waiting_at(float* waiting, int panel, int level) {
  return waiting + (panel * kLevels + level) * kTileRows * kLanes;
}

template <int DT>
struct LinearTile {
  template <int MR, int NP>
  struct At {
    // Adds the sum of chunk c to the sums that wait for it, as a carry runs through a binary counter.
    static void run(const LinearJob& job, const TilePlace& at) {
      const LinearShape& shape = *job.shape;
      const int64_t k = shape.bounds[at.chunk];
      V acc[MR][NP];
      UNROLL for (int r = 0; r < MR; ++r) {
        UNROLL for (int p = 0; p < NP; ++p) acc[r][p] = zero();
      }
      const char* weight = job.weight + at.panel * shape.panel_bytes + shape.chunk_bytes[at.chunk];
      multiply<MR, NP, DT, 1, MR>(job.a + at.row * shape.in_dim + k * MR, weight, shape.panel_bytes,
                                  shape.bounds[at.chunk + 1] - k, acc);
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
      for (int p = 0; p < NP; ++p) {
        const int64_t column = (at.panel + p) * kLanes;
        const int width = static_cast<int>(least(kLanes, N - column));
        for (int r = 0; r < MR; ++r) {
          V y = acc[r][p];
          if (job.bias_N) y = add(y, load_n(job.bias_N + column, width));
          store_n(job.y_TN + (at.row + r) * N + column, y, width);
        }
      }
    }
  };
};

template <int DT>
void linear_task(void* opaque, int task, int slot) {
  const LinearJob& job = *static_cast<const LinearJob*>(opaque);
  float* waiting = static_cast<float*>(pool_scratch(job.pool, slot, 0));
  const int64_t first_panel = task % job.panel_tasks * job.panels_per_task;
  const int panels = static_cast<int>(least(job.panels_per_task, job.panels - first_panel));
  const int64_t first_tile = task / job.panel_tasks * job.tiles_per_task;
  const int64_t tiles = least(job.tiles_per_task, job.tiles.count - first_tile);
  const int most = most_panels(static_cast<int>(ceil_div(job.tiles.rows, job.tiles.count)));
  for (int chunk = 0; chunk < job.shape->num_chunks; ++chunk) {
    for (int panel = 0, step = most; panel < panels; panel += step) {
      while (step > panels - panel) step /= 2;
      for (int64_t i = 0; i < tiles; ++i) {
        float* own = waiting_at(waiting, static_cast<int>(i * job.panels_per_task) + panel, 0);
        const TilePlace at{job.tiles.begin(first_tile + i), first_panel + panel, chunk, own};
        pick_tile<LinearTile<DT>::template At>(job.tiles.height(first_tile + i), step)(job, at);
      }
    }
  }
}

int linear(Pool* pool, float* y_TN, const float* x_TK, const void* weight, const float* bias_N, int64_t T,
           const LinearShape* shape) {
  if (T == 0 || shape->out_dim == 0) return kOk;
  LinearJob job{y_TN, x_TK, static_cast<const char*>(weight), bias_N, shape, RowTiles(T)};
  job.pool = pool;
  job.panels = ceil_div(shape->out_dim, kLanes);
  job.panels_per_task = job.tiles.count == 1 ? most_panels(static_cast<int>(T)) : kPanelsPerTask;
  job.panel_tasks = ceil_div(job.panels, job.panels_per_task);
  job.tiles_per_task = ceil_div(job.tiles.count, ceil_div(T, kRowsPerTask));
  const size_t waiting_bytes =
      least(job.tiles_per_task, job.tiles.count) * job.panels_per_task * kLevels * kTileRows * kVectorBytes;
  for (int slot = 0; slot < pool_threads(pool); ++slot) {
    if (!pool_scratch(pool, slot, waiting_bytes)) return kOutOfMemory;
  }
  if (T > 1) {
    float* a = static_cast<float*>(pool_scratch(pool, pool_threads(pool), T * shape->in_dim * sizeof(float)));
    if (!a) return kOutOfMemory;
    const int64_t K = shape->in_dim;
    const int64_t grain = ceil_div(65536, kTileRows * K);
    parallel_for(pool, job.tiles.count, grain, [&](int64_t tile, int64_t count) {
      for (; count > 0; ++tile, --count) {
        const int64_t row = job.tiles.begin(tile);
        interleave_rows(x_TK + row * K, K, job.tiles.height(tile), K, a + row * K);
      }
    });
    job.a = a;
  }
  const int64_t tasks = job.panel_tasks * ceil_div(job.tiles.count, job.tiles_per_task);
  pool_run(pool, static_cast<int>(tasks), shape->dtype == kBFloat16 ? linear_task<kBFloat16> : linear_task<kFloat32>,
           &job);
  return kOk;
}

// One element of a packed weight; `lane` is the column inside the panel.
INLINE char* packed_element(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t lane) {
  char* begin = panel + shape.chunk_bytes[chunk];
  k -= shape.bounds[chunk];
  if (shape.dtype == kFloat32) return begin + k * kVectorBytes + lane * 4;
  return begin + k / 2 * kVectorBytes + lane * 4 + k % 2 * 2;
}

// Writes columns [k, bounds[chunk + 1]) of the given rows, lanes `lane`... of the panel, element by element.
INLINE void pack_elements(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t lane, const void* rows_NK,
                          int64_t row_stride, int dtype, int64_t row, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = k; i < shape.bounds[chunk + 1]; ++i) {
      char* out = packed_element(panel, shape, chunk, i, lane + r);
      const float value = read_float(rows_NK, (row + r) * row_stride + i, dtype);
      if (shape.dtype == kFloat32) {
        __builtin_memcpy(out, &value, sizeof value);
      } else {
        // An even k clears its odd neighbour, which comes next or is the padding of a chunk of odd length.
        const uint32_t half = bf16_of(value);
        __builtin_memcpy(out, &half, (i - shape.bounds[chunk]) % 2 ? 2 : 4);
      }
    }
  }
}

// Rows of a whole panel that have its type already: columns [k, k_end) of a chunk, transposed 16 x 16 words at a time.
// `rows` points to column k. Returns the first k left to do.
INLINE int64_t pack_blocks(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t k_end, const char* rows,
                           int64_t row_stride) {
  const int64_t per_word = shape.dtype == kFloat32 ? 1 : 2, blocks = (k_end - k) / per_word / kLanes;
  const uint32_t* row[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    row[r] = reinterpret_cast<const uint32_t*>(rows + r * row_stride * (4 / per_word));
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(packed_element(panel, shape, chunk, k, 0));
  for (int64_t i = 0; i < blocks; ++i) transpose16(row, i * kLanes, out + i * kLanes * kLanes);
  return k + blocks * kLanes * per_word;
}

template <int FROM, int TO>
INLINE void convert_row(const void* row, int64_t k, int64_t n, void* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = read_float(row, k + i, FROM);
    if constexpr (TO == kFloat32) static_cast<float*>(out)[i] = value;
    else static_cast<uint16_t*>(out)[i] = bf16_of(value);
  }
}

// Rows of a whole panel, of any type, through a buffer that stays in the L1 cache. Returns the first k left to do.
template <int FROM, int TO>
int64_t pack_converted(char* panel, const LinearShape& shape, int chunk, const char* rows, int64_t row_stride) {
  constexpr int64_t kColumns = 256, kElement = TO == kFloat32 ? 4 : 2;
  alignas(64) char buffer[kLanes * kColumns * kElement];
  const int64_t k_end = shape.bounds[chunk + 1];
  int64_t k = shape.bounds[chunk], done = -1;
  while (k != done) {
    const int64_t n = least(kColumns, k_end - k);
    for (int r = 0; r < kLanes; ++r) {
      const char* row = rows + r * row_stride * (FROM == kFloat32 ? 4 : 2);
      convert_row<FROM, TO>(row, k, n, buffer + r * kColumns * kElement);
    }
    done = k;
    k = pack_blocks(panel, shape, chunk, k, k + n, buffer, kColumns);
  }
  return k;
}

INLINE int64_t pack_whole_panel(char* panel, const LinearShape& shape, int chunk, const char* rows, int64_t row_stride,
                                int dtype) {
  const int64_t begin = shape.bounds[chunk], end = shape.bounds[chunk + 1];
  if (dtype == shape.dtype) {
    return pack_blocks(panel, shape, chunk, begin, end, rows + begin * (dtype == kFloat32 ? 4 : 2), row_stride);
  }
  if (shape.dtype == kBFloat16) {
    return dtype == kFloat32 ? pack_converted<kFloat32, kBFloat16>(panel, shape, chunk, rows, row_stride)
                             : pack_converted<kFloat16, kBFloat16>(panel, shape, chunk, rows, row_stride);
  }
  return dtype == kBFloat16 ? pack_converted<kBFloat16, kFloat32>(panel, shape, chunk, rows, row_stride)
                            : pack_converted<kFloat16, kFloat32>(panel, shape, chunk, rows, row_stride);
}

int pack_rows(Pool* pool, void* weight, const void* rows_NK, int64_t row_stride, int dtype, int64_t row_start,
              int64_t num_rows, const LinearShape* shape) {
  const int64_t first = row_start / kLanes, panels = ceil_div(row_start + num_rows, kLanes) - first;
  const int64_t element = dtype == kFloat32 ? 4 : 2;
  parallel_for(pool, panels, 1, [&](int64_t panel, int64_t) {
    panel += first;
    char* out = static_cast<char*>(weight) + panel * shape->panel_bytes;
    const int64_t begin = panel * kLanes < row_start ? row_start : panel * kLanes;
    const int64_t end = least((panel + 1) * kLanes, row_start + num_rows);
    const char* rows = static_cast<const char*>(rows_NK) + (begin - row_start) * row_stride * element;
    for (int chunk = 0; chunk < shape->num_chunks; ++chunk) {
      int64_t k = shape->bounds[chunk];
      if (end - begin == kLanes) k = pack_whole_panel(out, *shape, chunk, rows, row_stride, dtype);
      pack_elements(out, *shape, chunk, k, begin - panel * kLanes, rows_NK, row_stride, dtype, begin - row_start,
                    end - begin);
    }
  });
  return kOk;
}
