// Causal grouped-query attention over the paged cache: how queries are cut into tasks. Keys are cut at absolute
// positions 0, 256, 512, ... and the splits merged in order. A row reads only its own sequence up to its own position,
// whatever shares its tile, so that neither batch nor chunking nor threads change its bits.
#pragma once

#include "attention_tile.h"

// The query rows of one piece that read one KV head: (token, head of the group) pairs, tokens ascending.
struct PieceRows {
  const AttentionJob& job;
  Piece piece;
  int64_t kv_head, first_position, first_row;
  RowTiles tiles;

  PieceRows(const AttentionJob& job, int64_t index)
      : job(job),
        piece(job.pieces[index / job.shape->num_kv_heads]),
        kv_head(index % job.shape->num_kv_heads),
        tiles(piece.tokens * job.group) {
    const int64_t query_start = job.query_start_S1[piece.sequence];
    const int64_t query_len = job.query_start_S1[piece.sequence + 1] - query_start;
    first_position = job.context_lens_S[piece.sequence] - query_len + piece.first_token;
    first_row = (query_start + piece.first_token) * job.shape->num_heads + kv_head * job.group;
  }

  int64_t end() const { return first_position + piece.tokens; }

  // How many of the positions of the split that begins at `start` the row may see.
  int visible(int64_t row, int64_t start) const {
    const int64_t n = first_position + row / job.group + 1 - start;
    return static_cast<int>(n < 0 ? 0 : least(n, kSplit));
  }

  // Of the row in q_TNH and o_TNH.
  int64_t offset(int64_t row) const {
    return (first_row + row / job.group * job.shape->num_heads + row % job.group) * job.shape->head_dim;
  }
};

INLINE void interleave_queries(const PieceRows& rows, float* out) {
  const int64_t H = rows.job.shape->head_dim;
  for (int64_t tile = 0; tile < rows.tiles.count; ++tile) {
    const int64_t begin = rows.tiles.begin(tile);
    for (int r = 0, mr = rows.tiles.height(tile); r < mr; ++r) {
      const float* q = rows.job.q_TNH + rows.offset(begin + r);
      for (int64_t h = 0; h < H; ++h) out[begin * H + h * mr + r] = q[h];
    }
  }
}

// All rows against the splits in [begin, end); the first one begins s.o, s.max and s.sum anew.
template <int DT>
void attend_splits(const PieceRows& rows, const AttentionScratch& s, int64_t begin, int64_t end) {
  const AttentionJob& job = rows.job;
  interleave_queries(rows, s.q);
  __builtin_memset(s.zeros, 0, job.shape->head_dim * sizeof(float));
  for (int64_t start = begin * kSplit; start < least(end * kSplit, rows.end()); start += kSplit) {
    const int64_t n = least(kSplit, rows.end() - start);
    locate_rows(job, rows.piece.sequence, rows.kv_head, start, n, s);
    gather_keys(job, n, s);
    gather_values(job, n, s);
    for (int64_t tile = 0; tile < rows.tiles.count; ++tile) {
      int valid[kTileRows];
      const int mr = rows.tiles.height(tile);
      for (int r = 0; r < mr; ++r) valid[r] = rows.visible(rows.tiles.begin(tile) + r, start);
      if (valid[mr - 1]) attend<DT>(job, s, rows.tiles.begin(tile), mr, valid, start == begin * kSplit);
    }
  }
}

INLINE void write_row(const PieceRows& rows, int64_t row, const float* o, float sum) {
  const int64_t H = rows.job.shape->head_dim;
  float* out = rows.job.o_TNH + rows.offset(row);
  for (int64_t p = 0; p < rows.job.panels; ++p) {
    const V y = div(load(o + p * kLanes), set1(sum));
    store_n(out + p * kLanes, y, static_cast<int>(least(kLanes, H - p * kLanes)));
  }
}

// One task takes all splits of its rows.
template <int DT>
void attention_task(void* opaque, int task, int slot) {
  const AttentionJob& job = *static_cast<const AttentionJob*>(opaque);
  const PieceRows rows(job, task);
  AttentionScratch s;
  AttentionScratch::carve(job, static_cast<char*>(pool_scratch(job.pool, slot, 0)), s);
  attend_splits<DT>(rows, s, 0, ceil_div(rows.end(), kSplit));
  for (int64_t row = 0; row < rows.tiles.rows; ++row) {
    write_row(rows, row, s.o + row * job.panels * kLanes, s.sum[row]);
  }
}

// What a single split left behind, [task][o | max | sum] in job.partial.
INLINE void use_partial(const AttentionJob& job, int64_t task, AttentionScratch& s) {
  s.o = job.partial + task * job.partial_floats;
  s.max = s.o + job.max_rows * job.panels * kLanes;
  s.sum = s.max + job.max_rows;
}

// With fewer (piece, head) pairs than threads every split is a task...
template <int DT>
void split_task(void* opaque, int task, int slot) {
  const AttentionJob& job = *static_cast<const AttentionJob*>(opaque);
  AttentionScratch s;
  AttentionScratch::carve(job, static_cast<char*>(pool_scratch(job.pool, slot, 0)), s);
  use_partial(job, task, s);
  attend_splits<DT>(PieceRows(job, task / job.splits), s, task % job.splits, task % job.splits + 1);
}

// ... and they are merged afterwards, in the order and with the arithmetic of a single task.
void merge_task(void* opaque, int task, int) {
  const AttentionJob& job = *static_cast<const AttentionJob*>(opaque);
  const PieceRows rows(job, task);
  AttentionScratch total, part;
  use_partial(job, static_cast<int64_t>(task) * job.splits, total);
  for (int64_t row = 0; row < rows.tiles.rows; ++row) {
    float* o = total.o + row * job.panels * kLanes;
    for (int64_t split = 1; split < job.splits && rows.visible(row, split * kSplit); ++split) {
      use_partial(job, static_cast<int64_t>(task) * job.splits + split, part);
      merge_split(o, part.o + row * job.panels * kLanes, job.panels, total.max[row], total.sum[row], part.max[row],
                  part.sum[row]);
    }
    write_row(rows, row, o, total.sum[row]);
  }
}

// Lists the pieces; returns how many. The last tokens of a sequence see the most positions: they come first, so that no
// thread is left with a long task at the end.
INLINE int64_t cut_pieces(const int32_t* query_start_S1, int64_t S, int64_t tokens, Piece* pieces) {
  int64_t count = 0;
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t left = query_start_S1[s + 1] - query_start_S1[s]; left > 0; ++count) {
      const int64_t n = least(tokens, left);
      left -= n;
      pieces[count] = {static_cast<int32_t>(s), static_cast<int32_t>(left), static_cast<int32_t>(n)};
    }
  }
  return count;
}

int paged_attention(Pool* pool, const PagedAttentionArgs& args) {
  const auto [block_tables_SB, query_start_S1, context_lens_S, S] = args.sequences;
  const AttentionShape* shape = &args.kv.shape;
  const int64_t T = S ? query_start_S1[S] : 0, group = shape->num_heads / shape->num_kv_heads;
  const int64_t tokens = group < kRowsPerAttentionTask ? kRowsPerAttentionTask / group : 1;
  const int threads = pool_threads(pool);
  AttentionJob job{args.o_TNH, args.q_TNH, static_cast<const char*>(args.kv.k_cache),
                   static_cast<const char*>(args.kv.v_cache)};
  job.block_tables_SB = block_tables_SB;
  job.query_start_S1 = query_start_S1;
  job.context_lens_S = context_lens_S;
  job.shape = shape;
  job.scale = args.scale;
  job.group = group;
  job.panels = ceil_div(shape->head_dim, kLanes);
  job.max_rows = least(tokens, T) * group;
  job.pool = pool;
  job.partial_floats = job.max_rows * (job.panels * kLanes + 2) + kLanes;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t splits = ceil_div(context_lens_S[s], kSplit);
    job.splits = splits > job.splits ? splits : job.splits;
  }
  // No more than T pieces, hence this bound; above it there is a task for every thread without cutting.
  const bool cut = threads > 1 && job.splits > 1 && T * shape->num_kv_heads < 2 * threads;
  const int64_t piece_bytes = ceil_div(T * sizeof(Piece), kVectorBytes) * kVectorBytes;
  const int64_t partial_bytes = cut ? T * shape->num_kv_heads * job.splits * job.partial_floats * 4 : 0;
  char* shared = static_cast<char*>(pool_scratch(pool, threads, piece_bytes + partial_bytes));
  if (!shared && T) return kOutOfMemory;
  job.partial = reinterpret_cast<float*>(shared + piece_bytes);
  const int64_t num_pieces = cut_pieces(query_start_S1, S, tokens, reinterpret_cast<Piece*>(shared));
  job.pieces = reinterpret_cast<const Piece*>(shared);
  AttentionScratch unused;
  const int64_t num_bytes = AttentionScratch::carve(job, nullptr, unused);
  for (int slot = 0; slot < threads; ++slot) {
    if (!pool_scratch(pool, slot, num_bytes)) return kOutOfMemory;
  }
  const bool is_bf16 = shape->dtype == kBFloat16;
  const int pairs = static_cast<int>(num_pieces * shape->num_kv_heads);
  if (cut) {
    pool_run(pool, static_cast<int>(pairs * job.splits), is_bf16 ? split_task<kBFloat16> : split_task<kFloat32>, &job);
    pool_run(pool, pairs, merge_task, &job);
  } else {
    pool_run(pool, pairs, is_bf16 ? attention_task<kBFloat16> : attention_task<kFloat32>, &job);
  }
  return kOk;
}
