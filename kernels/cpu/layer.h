// The two halves of a decoder layer, each in one launch: between launches the interpreter runs with caches that the
// weights have swept. They end where ranks have to add their partial sums. The arithmetic is that of the single ops.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

// Shared memory after the slots that linear and paged_attention use; zero-sized parts are fine.
struct LayerScratch {
  float* at;

  LayerScratch(Pool* pool, int64_t floats)
      : at(static_cast<float*>(pool_scratch(pool, pool_threads(pool) + 1, floats * sizeof(float)))) {}

  float* take(int64_t floats) {
    float* taken = at;
    at += floats;
    return taken;
  }
};

// y_TD = the attention output's partial sums. x_TD, what the last layer added, may be null; else the residual takes it up.
int attention_layer(Pool* pool, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D, float eps,
                    const LayerLinear* qkv, const LayerLinear* out, const float* cos_PH, const float* sin_PH,
                    const int32_t* positions_T, const int64_t* slots_T, void* k_cache, void* v_cache,
                    const int32_t* block_tables_SB, const int32_t* query_start_S1, const int32_t* context_lens_S,
                    int64_t T, int64_t S, const AttentionShape* shape, float scale) {
  const int64_t D = qkv->shape->in_dim, C = qkv->shape->out_dim, Q = shape->num_heads * shape->head_dim;
  LayerScratch scratch(pool, T * (D + C + 2 * Q) + 1);
  if (!scratch.at) return kOutOfMemory;
  float *normed_TD = scratch.take(T * D), *qkv_TC = scratch.take(T * C), *q_TQ = scratch.take(T * Q);
  float* o_TQ = scratch.take(T * Q);
  rms_norm(pool, normed_TD, x_TD ? x_TD : residual_TD, x_TD ? residual_TD : nullptr, norm_D, T, D, eps);
  int status = linear(pool, qkv_TC, normed_TD, qkv->weight, qkv->bias_N, T, qkv->shape);
  if (status) return status;
  rope_store_kv(pool, q_TQ, qkv_TC, cos_PH, sin_PH, positions_T, slots_T, k_cache, v_cache, T, shape);
  status = paged_attention(pool, o_TQ, q_TQ, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, S, shape,
                           scale);
  return status ? status : linear(pool, y_TD, o_TQ, out->weight, out->bias_N, T, out->shape);
}

// So many rows at a time: what they become between the two matrices stays in a cache of 32 MB.
constexpr int64_t kFeedForwardRows = 480;

// y_TD = the feed-forward output's partial sums.
int feed_forward_layer(Pool* pool, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D, float eps,
                       const LayerLinear* gate_up, const LayerLinear* down, int64_t T) {
  const int64_t D = gate_up->shape->in_dim, F = down->shape->in_dim, N = down->shape->out_dim;
  const int64_t rows = least(T, kFeedForwardRows);
  LayerScratch scratch(pool, rows * (D + 3 * F) + 1);
  if (!scratch.at) return kOutOfMemory;
  float *normed_TD = scratch.take(rows * D), *gate_up_T2F = scratch.take(rows * 2 * F), *y_TF = scratch.take(rows * F);
  for (int64_t t = 0; t < T; t += rows) {
    const int64_t n = least(rows, T - t);
    rms_norm(pool, normed_TD, x_TD + t * D, residual_TD + t * D, norm_D, n, D, eps);
    int status = linear(pool, gate_up_T2F, normed_TD, gate_up->weight, gate_up->bias_N, n, gate_up->shape);
    if (status) return status;
    silu_mul(pool, y_TF, gate_up_T2F, n, F);
    status = linear(pool, y_TD + t * N, y_TF, down->weight, down->bias_N, n, down->shape);
    if (status) return status;
  }
  return kOk;
}
