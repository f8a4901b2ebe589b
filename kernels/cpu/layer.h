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

int attention_layer(Pool* pool, const AttentionLayerArgs& args) {
  const AttentionShape& shape = args.kv.shape;
  const int64_t T = args.tokens.T, D = args.qkv.shape->in_dim, C = args.qkv.shape->out_dim;
  const int64_t Q = shape.num_heads * shape.head_dim;
  LayerScratch scratch(pool, T * (D + C + 2 * Q) + 1);
  if (!scratch.at) return kOutOfMemory;
  float *normed_TD = scratch.take(T * D), *qkv_TC = scratch.take(T * C), *q_TQ = scratch.take(T * Q);
  float* o_TQ = scratch.take(T * Q);
  const float* x_TD = args.x_TD ? args.x_TD : args.residual_TD;
  rms_norm(pool, {normed_TD, x_TD, args.x_TD ? args.residual_TD : nullptr, args.norm, T, D});
  int status = linear(pool, {qkv_TC, normed_TD, args.qkv, T});
  if (status) return status;
  rope_store_kv(pool, {q_TQ, qkv_TC, args.rope, args.kv, args.tokens});
  status = paged_attention(pool, {o_TQ, q_TQ, args.kv, args.sequences, args.scale});
  return status ? status : linear(pool, {args.y_TD, o_TQ, args.out, T});
}

// So many rows at a time: what they become between the two matrices stays in a cache of 32 MB.
constexpr int64_t kFeedForwardRows = 480;

int feed_forward_layer(Pool* pool, const FeedForwardLayerArgs& args) {
  const int64_t D = args.gate_up.shape->in_dim, F = args.down.shape->in_dim, N = args.down.shape->out_dim;
  const int64_t rows = least(args.T, kFeedForwardRows);
  LayerScratch scratch(pool, rows * (D + 3 * F) + 1);
  if (!scratch.at) return kOutOfMemory;
  float *normed_TD = scratch.take(rows * D), *gate_up_T2F = scratch.take(rows * 2 * F), *y_TF = scratch.take(rows * F);
  for (int64_t t = 0; t < args.T; t += rows) {
    const int64_t n = least(rows, args.T - t);
    rms_norm(pool, {normed_TD, args.x_TD + t * D, args.residual_TD + t * D, args.norm, n, D});
    int status = linear(pool, {gate_up_T2F, normed_TD, args.gate_up, n});
    if (status) return status;
    silu_mul(pool, {y_TF, gate_up_T2F, n, F});
    status = linear(pool, {args.y_TD + t * N, y_TF, args.down, n});
    if (status) return status;
  }
  return kOk;
}
