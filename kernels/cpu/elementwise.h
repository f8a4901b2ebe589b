// The ops that work row by row: RMSNorm, rotary embedding with the cache write, SwiGLU's product, argmax, gather.
#pragma once

#include "vec.h"

// Below this many elements a task is not worth another thread.
constexpr int64_t kGrain = 8192;

INLINE int64_t rows_per_task(int64_t width) { return width < kGrain ? kGrain / (width + 1) + 1 : 1; }

// Squares are summed in 64 columns of FMAs: lane i of accumulator j takes the elements 64 n + 16 j + i.
INLINE float sum_of_squares(const float* x, int64_t D) {
  V acc[4] = {zero(), zero(), zero(), zero()};
  int64_t d = 0;
  for (; d + 64 <= D; d += 64) {
    UNROLL for (int j = 0; j < 4; ++j) {
      const V v = load(x + d + j * kLanes);
      acc[j] = fma(v, v, acc[j]);
    }
  }
  for (int j = 0; d < D; d += kLanes, ++j) {
    const V v = load_n(x + d, static_cast<int>(least(kLanes, D - d)));
    acc[j] = fma(v, v, acc[j]);
  }
  return sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

INLINE void rms_norm_row(float* y, const float* x, float* residual, const float* weight, int64_t D, float eps) {
  if (residual) {
    for (int64_t d = 0; d < D; ++d) residual[d] += x[d];
    x = residual;
  }
  const float inverse = 1.0f / __builtin_sqrtf(sum_of_squares(x, D) / static_cast<float>(D) + eps);
  for (int64_t d = 0; d < D; ++d) y[d] = x[d] * inverse * weight[d];
}

int rms_norm(Pool* pool, const RmsNormArgs& args) {
  const int64_t D = args.D;
  parallel_for(pool, args.T, rows_per_task(D), [&](int64_t t, int64_t count) {
    for (; count > 0; ++t, --count) {
      float* residual = args.residual_TD ? args.residual_TD + t * D : nullptr;
      rms_norm_row(args.y_TD + t * D, args.x_TD + t * D, residual, args.norm.weight_D, D, args.norm.eps);
    }
  });
  return kOk;
}

// Half-split rotation: element h turns with element h + H / 2.
INLINE void rotate(float* out, const float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t h = 0; h < half; ++h) {
    const float a = x[h], b = x[half + h];
    out[h] = a * cos[h] - b * sin[h];
    out[half + h] = b * cos[h] + a * sin[h];
  }
}

INLINE void store_row(void* cache, int64_t row, int dtype, const float* x, int64_t H) {
  if (dtype == kFloat32) {
    __builtin_memcpy(static_cast<float*>(cache) + row * H, x, H * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(cache) + row * H;
  for (int64_t h = 0; h < H; ++h) out[h] = bf16_of(x[h]);
}

constexpr int kMaxHeadDim = 1024;

int rope_store_kv(Pool* pool, const RopeStoreKVArgs& args) {
  const AttentionShape& shape = args.kv.shape;
  const int64_t N = shape.num_heads, G = shape.num_kv_heads, H = shape.head_dim, half = H / 2;
  const int64_t width = (N + 2 * G) * H;
  parallel_for(pool, args.tokens.T, rows_per_task(width), [&](int64_t t, int64_t count) {
    for (; count > 0; ++t, --count) {
      const int64_t angle = args.tokens.positions_T[t] * half, slot = args.tokens.slots_T[t];
      const float *x = args.qkv_TC + t * width, *cos = args.rope.cos_PH + angle, *sin = args.rope.sin_PH + angle;
      for (int64_t n = 0; n < N; ++n) rotate(args.q_TNH + (t * N + n) * H, x + n * H, cos, sin, half);
      const int64_t block = slot / shape.block_size, offset = slot % shape.block_size;
      for (int64_t g = 0; g < G; ++g) {
        float key[kMaxHeadDim];
        const int64_t row = (block * G + g) * shape.block_size + offset;
        rotate(key, x + (N + g) * H, cos, sin, half);
        store_row(args.kv.k_cache, row, shape.dtype, key, H);
        store_row(args.kv.v_cache, row, shape.dtype, x + (N + G + g) * H, H);
      }
    }
  });
  return kOk;
}

int silu_mul(Pool* pool, const SiluMulArgs& args) {
  constexpr int64_t kColumns = 2048;
  const int64_t F = args.F, pieces = ceil_div(F, kColumns);
  parallel_for(pool, args.T * pieces, ceil_div(pieces * kColumns, F + 1), [&](int64_t piece, int64_t count) {
    for (; count > 0; ++piece, --count) {
      const int64_t t = piece / pieces, begin = piece % pieces * kColumns, end = least(F, begin + kColumns);
      const float *gate = args.gate_up_T2F + t * 2 * F, *up = gate + F;
      for (int64_t f = begin; f < end; f += kLanes) {
        const int n = static_cast<int>(least(kLanes, end - f));
        const V x = load_n(gate + f, n);
        const V silu = div(x, add(set1(1.0f), exp_(sub(zero(), x))));
        store_n(args.y_TF + t * F + f, mul(silu, load_n(up + f, n)), n);
      }
    }
  });
  return kOk;
}

// Indices travel as floats, which are exact below 2^24. x * 0 is NaN for NaN and both infinities.
INLINE void argmax_row(const float* x, int64_t V_, float& value, int64_t& index) {
  V best = set1(-__builtin_inff()), where = zero(), spoilt = zero();
  V column = zero();
  float lanes[kLanes], indices[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  column = load(lanes);
  for (int64_t v = 0; v < V_; v += kLanes) {
    const int n = static_cast<int>(least(kLanes, V_ - v));
    V y = load_n(x + v, n);
    spoilt = fma(y, zero(), spoilt);
    y = keep_n(y, n, set1(-__builtin_inff()));
    where = if_greater(y, best, column, where);
    best = if_greater(y, best, y, best);
    column = add(column, set1(kLanes));
  }
  store(lanes, best);
  store(indices, where);
  value = lanes[0];
  float lowest = indices[0];
  for (int i = 1; i < kLanes; ++i) {
    if (lanes[i] > value || (lanes[i] == value && indices[i] < lowest)) {
      value = lanes[i];
      lowest = indices[i];
    }
  }
  index = static_cast<int64_t>(lowest);
  if (sum_lanes(spoilt) != 0.0f) {
    value = __builtin_nanf("");
    index = 0;
  }
}

int argmax(Pool* pool, const ArgmaxArgs& args) {
  const int64_t V = args.V;
  parallel_for(pool, args.S, rows_per_task(V / 4), [&](int64_t s, int64_t count) {
    for (; count > 0; ++s, --count) argmax_row(args.logits_SV + s * V, V, args.values_S[s], args.indices_S[s]);
  });
  return kOk;
}

int gather_rows(Pool* pool, const GatherRowsArgs& args) {
  const int64_t D = args.D;
  const auto* wide = static_cast<const int64_t*>(args.ids_T);
  const auto* narrow = static_cast<const int32_t*>(args.ids_T);
  parallel_for(pool, args.T, rows_per_task(D), [&](int64_t t, int64_t count) {
    for (; count > 0; ++t, --count) {
      const int64_t id = args.ids_are_64_bit ? wide[t] : narrow[t];
      for (int64_t d = 0; d < D; ++d) args.y_TD[t * D + d] = read_float(args.table_VD, id * D + d, args.dtype);
    }
  });
  return kOk;
}
