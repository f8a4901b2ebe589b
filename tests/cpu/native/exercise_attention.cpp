// Attention over the paged cache and the op that fills it.

#include <algorithm>

#include "exercise.h"

namespace {

struct Lengths {
  int64_t queries, context;
};

struct Batch {
  AttentionShape shape;
  std::vector<Lengths> sequences;
  std::vector<int32_t> query_start_S1, context_lens_S, block_tables_SB;
  int64_t T, num_blocks;
};

// Physical blocks in random order, but the last sequence's last one at the very end of the cache; the table of the
// longest sequence is full, and what others leave free in theirs would lead far astray.
Batch lay_out(Random& random, const AttentionShape& shape, const std::vector<Lengths>& sequences) {
  Batch batch = {shape, sequences, {0}, {}, {}, 0, 0};
  for (const Lengths& s : sequences) {
    const int64_t blocks = (s.context + shape.block_size - 1) / shape.block_size;
    batch.num_blocks += blocks;
    batch.shape.max_blocks = std::max(batch.shape.max_blocks, static_cast<int32_t>(blocks));
    batch.T += s.queries;
    batch.query_start_S1.push_back(static_cast<int32_t>(batch.T));
    batch.context_lens_S.push_back(static_cast<int32_t>(s.context));
  }
  std::vector<int32_t> order(batch.num_blocks);
  for (int64_t i = 0; i < batch.num_blocks; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t i = batch.num_blocks - 2; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  auto next = order.begin();
  for (const Lengths& s : sequences) {
    for (int64_t b = 0; b < batch.shape.max_blocks; ++b) {
      batch.block_tables_SB.push_back(b * shape.block_size < s.context ? *next++ : 0x7fffffff);
    }
  }
  return batch;
}

// Element of the cache that holds component 0 of a position.
int64_t cache_row(const Batch& batch, int64_t s, int64_t g, int64_t position) {
  const AttentionShape& shape = batch.shape;
  const int64_t block = batch.block_tables_SB[s * shape.max_blocks + position / shape.block_size];
  return ((block * shape.num_kv_heads + g) * shape.block_size + position % shape.block_size) * shape.head_dim;
}

// Only positions in use are written: the rest of the cache stays NaN.
void fill_cache(Random& random, const Batch& batch, Exact<uint8_t>& cache) {
  const int64_t H = batch.shape.head_dim, bytes = element_bytes(batch.shape.dtype);
  Exact<uint8_t> row(H * bytes);
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    for (int64_t p = 0; p < batch.sequences[s].context; ++p) {
      for (int64_t g = 0; g < batch.shape.num_kv_heads; ++g) {
        fill_typed(random, row, batch.shape.dtype);
        memcpy(cache.data() + cache_row(batch, s, g, p) * bytes, row.data(), row.size());
      }
    }
  }
}

// A score is a sum of H terms, off by at most H + 1 roundings of them, and its weight relatively by twice that. To this
// come a few roundings of exp and one for each of the positions that are added up.
void check(const std::vector<float>& o_TNH, const Exact<float>& q_TNH, const Exact<uint8_t>& k, const Exact<uint8_t>& v,
           const Batch& batch, float scale) {
  const AttentionShape& shape = batch.shape;
  const int64_t N = shape.num_heads, H = shape.head_dim, group = N / shape.num_kv_heads;
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    for (int64_t t = 0; t < batch.sequences[s].queries; ++t) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t row = ((batch.query_start_S1[s] + t) * N + n) * H;
        const int64_t seen = batch.sequences[s].context - batch.sequences[s].queries + t + 1;
        std::vector<double> weights(seen), out(H), size(H);
        double top = -INFINITY, score_error = 0.0, total = 0.0;
        for (int64_t p = 0; p < seen; ++p) {
          const int64_t key = cache_row(batch, s, n / group, p);
          double error = 0.0;
          for (int64_t h = 0; h < H; ++h) {
            const double term = scale * q_TNH[row + h] * value_of(k.data(), key + h, shape.dtype);
            weights[p] += term;
            error += (H + 1) * kUlp * std::fabs(term);
          }
          top = std::max(top, weights[p]);
          score_error = std::max(score_error, error);
        }
        for (int64_t p = 0; p < seen; ++p) {
          const int64_t value = cache_row(batch, s, n / group, p);
          const double weight = std::exp(weights[p] - top);
          total += weight;
          for (int64_t h = 0; h < H; ++h) {
            out[h] += weight * value_of(v.data(), value + h, shape.dtype);
            size[h] += weight * std::fabs(value_of(v.data(), value + h, shape.dtype));
          }
        }
        const double relative = 4 * score_error + (2 * seen + 32) * kUlp;
        for (int64_t h = 0; h < H; ++h) {
          require_close(o_TNH[row + h], out[h] / total, relative * size[h] / total, row + h);
        }
      }
    }
  }
}

// The last queries of one sequence, alone in the batch.
void check_alone(Op& op, Random& random, const Batch& batch, const Exact<float>& q_TNH,
                 Exact<uint8_t>& k, Exact<uint8_t>& v, float scale, const std::vector<float>& o_TNH) {
  const AttentionShape& shape = batch.shape;
  const int64_t s = random.below(static_cast<int64_t>(batch.sequences.size())), length = batch.sequences[s].queries;
  const int64_t rows = random.between(1, length), row_floats = shape.num_heads * shape.head_dim;
  const int64_t first = (batch.query_start_S1[s] + length - rows) * row_floats;
  const auto table = batch.block_tables_SB.begin() + s * shape.max_blocks;
  const Exact<int32_t> tables(std::vector<int32_t>(table, table + shape.max_blocks));
  const Exact<int32_t> starts(std::vector<int32_t>{0, static_cast<int32_t>(rows)});
  const Exact<int32_t> contexts(std::vector<int32_t>{batch.context_lens_S[s]});
  const Exact<float> q(std::vector<float>(q_TNH.data() + first, q_TNH.data() + first + rows * row_floats));
  current_case += describe(", only the last %lld queries of sequence %lld", rows, s);
  const LayerKV kv = {k.data(), v.data(), shape};
  const Sequences one = {tables.data(), starts.data(), contexts.data(), 1};
  const std::vector<float> alone = op.everywhere<float>(q.size(), [&](KernelPool* pool, float* o) {
    return run_op(pool, "paged_attention", PagedAttentionArgs{o, q.data(), kv, one, scale});
  });
  require_same(alone.data(), o_TNH.data() + first, q.size(), "the whole batch");
}

void exercise(Op& op, Random& random, const AttentionShape& shape, const std::vector<Lengths>& sequences) {
  const Batch batch = lay_out(random, shape, sequences);
  const int64_t bytes = element_bytes(shape.dtype);
  std::string text = describe("N=%lld G=%lld H=%lld block=%lld dtype=%lld", shape.num_heads, shape.num_kv_heads,
                              shape.head_dim, shape.block_size, shape.dtype);
  for (const Lengths& s : sequences) text += describe(" %lld/%lld", s.queries, s.context);
  op.begin(text);
  const int64_t cache_elements = batch.num_blocks * shape.num_kv_heads * shape.block_size * shape.head_dim;
  Exact<uint8_t> k(cache_elements * bytes), v(cache_elements * bytes);
  fill_cache(random, batch, k);
  fill_cache(random, batch, v);
  Exact<float> q_TNH(batch.T * shape.num_heads * shape.head_dim);
  random.fill(q_TNH, 2.0f);
  const float scale = 1.5f / static_cast<float>(shape.head_dim);
  const Exact<int32_t> tables(batch.block_tables_SB), starts(batch.query_start_S1), contexts(batch.context_lens_S);
  const LayerKV kv = {k.data(), v.data(), batch.shape};
  const Sequences all = {tables.data(), starts.data(), contexts.data(), static_cast<int64_t>(sequences.size())};
  const std::vector<float> o_TNH = op.everywhere<float>(q_TNH.size(), [&](KernelPool* pool, float* o) {
    return run_op(pool, "paged_attention", PagedAttentionArgs{o, q_TNH.data(), kv, all, scale});
  });
  check(o_TNH, q_TNH, k, v, batch, scale);
  if (!sequences.empty()) check_alone(op, random, batch, q_TNH, k, v, scale, o_TNH);
}

void exercise_paged_attention() {
  Op op("paged_attention");
  Random random(5);
  // Contexts that end at a block's or a split's edge, a position before it or after it.
  const std::vector<std::vector<Lengths>> batches = {
      {},
      {{1, 1}},
      {{1, 16}, {1, 7}, {1, 17}},
      {{9, 9}, {3, 21}, {1, 32}, {2, 6}},
      {{1, 255}, {1, 256}},
      {{1, 257}},
      {{2, 257}, {1, 8}},
      {{5, 258}, {2, 513}},
      {{1, 513}},
      {{30, 40}, {1, 14}},
  };
  for (const int dtype : {kFloat32, kBFloat16}) {
    for (int group = 1; group <= 8; ++group) {
      for (const int block_size : {7, 16}) {
        const auto& sequences = batches[(group + 3 * (block_size == 7) + 5 * dtype) % batches.size()];
        const int kv_heads = static_cast<int>(random.between(1, 3)), head_dim = random.of<int>({2, 6, 18, 32, 40, 66});
        exercise(op, random, {group * kv_heads, kv_heads, head_dim, block_size, dtype, 0}, sequences);
      }
    }
    // One KV head and hardly a query: the splits of a context are shared among the threads.
    for (const auto& sequences : batches) exercise(op, random, {2, 1, 20, 16, dtype, 0}, sequences);
  }
}

void exercise_rope_case(Op& op, Random& random, const AttentionShape& shape, int64_t T) {
  const int64_t N = shape.num_heads, G = shape.num_kv_heads, H = shape.head_dim, half = H / 2, positions = T + 3;
  const int64_t bytes = element_bytes(shape.dtype), width = (N + 2 * G) * H, num_blocks = T / shape.block_size + 1;
  op.begin(describe("T=%lld N=%lld G=%lld H=%lld block=%lld dtype=%lld", T, N, G, H, shape.block_size, shape.dtype));
  Exact<float> qkv_TC(T * width), cos_PH(positions * half), sin_PH(positions * half);
  random.fill(qkv_TC, 4.0f);
  random.fill(cos_PH);
  random.fill(sin_PH);
  Exact<int32_t> positions_T(T);
  Exact<int64_t> slots_T(T);  // the first token in the cache's last slot
  for (int64_t t = 0; t < T; ++t) {
    positions_T[t] = static_cast<int32_t>(positions - 1 - t);
    slots_T[t] = num_blocks * shape.block_size - 1 - t;
  }
  const int64_t cache_bytes = num_blocks * shape.block_size * G * H * bytes;
  std::vector<uint8_t> caches[2];
  const Rope rope = {cos_PH.data(), sin_PH.data()};
  const Tokens tokens = {positions_T.data(), slots_T.data(), T};
  const std::vector<float> q_TNH = op.everywhere<float>(T * N * H, [&](KernelPool* pool, float* q) {
    Exact<uint8_t> k(cache_bytes), v(cache_bytes);
    const RopeStoreKVArgs args = {q, qkv_TC.data(), rope, {k.data(), v.data(), shape}, tokens};
    const int status = run_op(pool, "rope_store_kv", args);
    if (caches[0].empty()) {
      caches[0] = k.copy();
      caches[1] = v.copy();
    }
    require_same(k.data(), caches[0].data(), cache_bytes, "the keys");
    require_same(v.data(), caches[1].data(), cache_bytes, "the values");
    return status;
  });
  for (const auto& cache : caches) op.digest(cache.data(), cache_bytes);
  // Three roundings in fp32, and those of the cache's type.
  const double rounding = shape.dtype == kFloat32 ? 0.0 : 1.0 / 256;
  std::vector<bool> is_written(num_blocks * shape.block_size);
  for (int64_t t = 0; t < T; ++t) {
    is_written[slots_T[t]] = true;
    for (int64_t n = 0; n < N + 2 * G; ++n) {
      for (int64_t h = 0; h < H; ++h) {
        const float* x = &qkv_TC[t * width + n * H];
        const int64_t angle = positions_T[t] * half + h % half;
        const double straight = double{x[h]} * cos_PH[angle];
        const double across = (h < half ? -1.0 : 1.0) * x[(h + half) % H] * sin_PH[angle];
        const double bound = 3 * kUlp * (std::fabs(straight) + std::fabs(across));
        if (n < N) {
          require_close(q_TNH[(t * N + n) * H + h], straight + across, bound, h);
          continue;
        }
        const bool is_key = n < N + G;
        const double expected = is_key ? straight + across : x[h];
        const int64_t block = slots_T[t] / shape.block_size, offset = slots_T[t] % shape.block_size;
        const int64_t row = (block * G + (n - N) % G) * shape.block_size + offset;
        const double stored = value_of(caches[is_key ? 0 : 1].data(), row * H + h, shape.dtype);
        require_close(static_cast<float>(stored), expected, (is_key ? bound : 0) + rounding * std::fabs(expected), h);
      }
    }
  }
  // Slots of no token keep what they held.
  for (int64_t slot = 0; slot < num_blocks * shape.block_size; ++slot) {
    for (int64_t g = 0; g < G && !is_written[slot]; ++g) {
      const int64_t row = (slot / shape.block_size * G + g) * shape.block_size + slot % shape.block_size;
      for (int64_t b = row * H * bytes; b < (row + 1) * H * bytes; ++b) {
        require(caches[0][b] == 0xff && caches[1][b] == 0xff, describe("slot %lld was written", slot));
      }
    }
  }
}

void exercise_rope() {
  Op op("rope_store_kv");
  Random random(6);
  for (const int dtype : {kFloat32, kBFloat16}) {
    for (const int head_dim : {2, 6, 18, 34, 64, 130}) {
      for (const int block_size : {7, 16}) {
        const int kv_heads = static_cast<int>(random.between(1, 3));
        const int heads = kv_heads * static_cast<int>(random.between(1, 8)), tokens = random.of<int>({0, 1, 5, 33});
        exercise_rope_case(op, random, {heads, kv_heads, head_dim, block_size, dtype, 0}, tokens);
      }
    }
  }
}

}  // namespace

void exercise_attention() {
  exercise_paged_attention();
  exercise_rope();
}
