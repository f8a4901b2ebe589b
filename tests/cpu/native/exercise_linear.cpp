// Packing and multiplying: every weight type, odd sizes and cuts, against a plain loop in double precision.

#include <algorithm>

#include "exercise.h"

namespace {

constexpr int64_t kLanes = 16, kGroup = 32;
const char* const kTypeNames[] = {"float32", "bfloat16", "float16", "int8", "int4"};

bool is_grouped(int dtype) { return dtype == kInt8 || dtype == kInt4; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Sizes {
  int64_t T, N, K;
  int chunks;
};

// The bounds of the chunks: even, random (some empty, some of one step), or one step each and then the rest.
std::vector<int64_t> cut(Random& random, int64_t K, int chunks, int64_t step, int style) {
  const int64_t steps = ceil_div(K, step);
  std::vector<int64_t> bounds = {0, steps};
  for (int c = 1; c < chunks; ++c) {
    const int64_t bound = style == 0 ? steps * c / chunks : style == 1 ? random.between(0, steps) : c;
    bounds.push_back(std::min(bound, steps));
  }
  std::sort(bounds.begin(), bounds.end());
  for (int64_t& bound : bounds) bound = std::min(bound * step, K);
  return bounds;
}

LinearShape shape_of(int64_t N, int64_t K, int dtype, const std::vector<int64_t>& bounds) {
  LinearShape shape = {};
  shape.out_dim = N;
  shape.in_dim = K;
  shape.dtype = dtype;
  shape.num_chunks = static_cast<int32_t>(bounds.size()) - 1;
  const int64_t step = is_grouped(dtype) ? kGroup : dtype == kBFloat16 ? 2 : 1;
  const int64_t step_bytes = dtype == kInt8 ? 32 + 16 * kGroup : dtype == kInt4 ? 32 + 8 * kGroup : 64;
  for (size_t c = 0; c < bounds.size(); ++c) {
    shape.bounds[c] = static_cast<int32_t>(bounds[c]);
    if (c) {
      const int64_t steps = ceil_div(bounds[c] - bounds[c - 1], step);
      shape.chunk_bytes[c] = static_cast<int32_t>(shape.chunk_bytes[c - 1] + steps * step_bytes);
    }
  }
  shape.panel_bytes = shape.chunk_bytes[shape.num_chunks];
  return shape;
}

// The memory of a weight as the library's caller prepares it: arbitrary, but for the panel that N leaves incomplete.
Exact<uint8_t>* allocate(const LinearShape& shape) {
  auto* packed = new Exact<uint8_t>(ceil_div(shape.out_dim, kLanes) * shape.panel_bytes);
  if (shape.out_dim % kLanes) memset(packed->data() + packed->size() - shape.panel_bytes, 0, shape.panel_bytes);
  return packed;
}

// Packs the rows on every setting, on all but the first in several runs of rows, and requires the same bytes.
// pack(pool, weight, first, count) packs rows first .. first + count.
template <class Pack>
Exact<uint8_t>* pack_everywhere(Op& op, Random& random, const LinearShape& shape, const Pack& pack) {
  Exact<uint8_t>* whole = allocate(shape);
  const uint64_t seed = random.bits();  // other machines have other settings, and must go on with the same numbers
  for (const Setting& setting : settings) {
    Random runs(seed);
    const bool is_first = &setting == &settings[0];
    Exact<uint8_t>* packed = is_first ? whole : allocate(shape);
    for (int64_t row = 0; row < shape.out_dim;) {
      const int64_t count = is_first ? shape.out_dim : runs.between(1, std::min<int64_t>(40, shape.out_dim - row));
      require(pack(setting.pool, packed->data(), row, count) == kOk, "out of memory");
      row += count;
    }
    if (is_first) continue;
    require_same(packed->data(), whole->data(), whole->size(), setting.name);
    delete packed;
  }
  op.digest(whole->data(), whole->size());
  return whole;
}

// Weights of float types: rows of a wider matrix of type `source`, beginning anywhere in it and ending at its very end.
Exact<uint8_t>* pack_plain(Op& op, Random& random, const LinearShape& shape, int source, std::vector<double>& w_NK) {
  const int64_t N = shape.out_dim, K = shape.in_dim, stride = K + random.below(4), offset = random.below(3);
  const int64_t bytes = element_bytes(source);
  Exact<uint8_t> rows((offset + std::max<int64_t>(0, (N - 1) * stride + K)) * bytes);
  fill_typed(random, rows, source);
  op.begin(describe("%lld -> %lld, N=%lld K=%lld stride=%lld offset=%lld", source, shape.dtype, N, K, stride, offset));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const float value = static_cast<float>(value_of(rows.data(), offset + n * stride + k, source));
      const uint16_t half = bf16_bits(value);
      w_NK[n * K + k] = shape.dtype == kBFloat16 ? value_of(&half, 0, kBFloat16) : value;
    }
  }
  return pack_everywhere(op, random, shape, [&](KernelPool* pool, void* weight, int64_t first, int64_t count) {
    const uint8_t* from = rows.data() + (offset + first * stride) * bytes;
    return run_op(pool, "pack_rows", PackRowsArgs{{weight, &shape, first, count}, from, stride, source});
  });
}

// Quantised weights. w_NK gets q, scales_NG the scales.
Exact<uint8_t>* pack_quantized(Op& op, Random& random, const LinearShape& shape, std::vector<double>& w_NK,
                               std::vector<double>& scales_NG) {
  const int64_t N = shape.out_dim, K = shape.in_dim, G = ceil_div(K, kGroup);
  const int64_t stride = K + random.below(4), scale_stride = G + random.below(3), offset = random.below(3);
  Exact<int8_t> rows(offset + std::max<int64_t>(0, (N - 1) * stride + K));
  Exact<uint16_t> scales(offset + std::max<int64_t>(0, (N - 1) * scale_stride + G));
  const int64_t lowest = shape.dtype == kInt8 ? -127 : -8, highest = shape.dtype == kInt8 ? 127 : 7;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const bool is_extreme = random.below(8) == 0;
    rows[i] = static_cast<int8_t>(is_extreme ? random.of<int64_t>({lowest, highest}) : random.between(lowest, highest));
  }
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = bf16_bits(random.real() / 8);
  op.begin(describe("%lld, N=%lld K=%lld stride=%lld offset=%lld", shape.dtype, N, K, stride, offset));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) w_NK[n * K + k] = rows[offset + n * stride + k];
    for (int64_t g = 0; g < G; ++g) {
      scales_NG[n * G + g] = value_of(scales.data(), offset + n * scale_stride + g, kBFloat16);
    }
  }
  return pack_everywhere(op, random, shape, [&](KernelPool* pool, void* weight, int64_t first, int64_t count) {
    const PackQuantizedArgs args = {{weight, &shape, first, count},
                                    rows.data() + offset + first * stride, stride,
                                    scales.data() + offset + first * scale_stride, scale_stride};
    return run_op(pool, "pack_quantized", args);
  });
}

// Activations as they meet quantised weights, integers and a scale for each group, in the format's own fp32 arithmetic.
void quantize(const Exact<float>& x_TK, const LinearShape& shape, int64_t T, std::vector<double>& q_TK,
              std::vector<double>& scales_TG) {
  const int64_t K = shape.in_dim, G = ceil_div(K, kGroup);
  const float limit = shape.dtype == kInt8 ? 2047.0f : 127.0f;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t begin = t * K + g * kGroup, end = t * K + std::min(K, (g + 1) * kGroup);
      float size = 0.0f;
      bool is_finite = true;
      for (int64_t i = begin; i < end; ++i) {
        size = std::max(size, std::fabs(x_TK[i]));
        is_finite &= std::isfinite(x_TK[i]);
      }
      const float inverse = size > 1e-30f ? limit / size : 0.0f;
      scales_TG[t * G + g] = is_finite ? size / limit : NAN;
      for (int64_t i = begin; i < end; ++i) q_TK[i] = is_finite ? std::nearbyint(x_TK[i] * inverse) : 0.0;
    }
  }
}

// Each of the K (or groups of K) terms is rounded when it is added, the eight sums and the bias likewise.
void check(const std::vector<float>& y_TN, const Exact<float>& x_TK, const LinearShape& shape, int64_t T,
           const std::vector<double>& w_NK, const std::vector<double>& w_scales_NG, const Exact<float>* bias_N) {
  const int64_t N = shape.out_dim, K = shape.in_dim, G = ceil_div(K, kGroup);
  const bool grouped = is_grouped(shape.dtype);
  std::vector<double> a_TK(x_TK.data(), x_TK.data() + T * K), a_scales_TG(T * G, 1.0);
  if (grouped) quantize(x_TK, shape, T, a_TK, a_scales_TG);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t g = 0; g < G; ++g) {
        double dot = 0.0;
        for (int64_t k = g * kGroup; k < std::min(K, (g + 1) * kGroup); ++k) {
          const double term = a_TK[t * K + k] * w_NK[n * K + k];
          dot += term;
          if (!grouped) size += std::fabs(term);
        }
        if (grouped) dot *= a_scales_TG[t * G + g] * w_scales_NG[n * G + g];
        if (grouped) size += std::fabs(dot);
        sum += dot;
      }
      if (bias_N) sum += (*bias_N)[n];
      if (bias_N) size += std::fabs((*bias_N)[n]);
      const double terms = static_cast<double>((grouped ? G : K) + 8);
      require_close(y_TN[t * N + n], sum, terms * kUlp * size, t * N + n);
    }
  }
}

void exercise(Op& op, Op& pack_op, Random& random, int dtype, const Sizes& sizes, int style, bool has_bias) {
  const auto [T, N, K, chunks] = sizes;
  const std::vector<int64_t> bounds = cut(random, K, chunks, is_grouped(dtype) ? kGroup : 1, style);
  const LinearShape shape = shape_of(N, K, dtype, bounds);
  std::vector<double> w_NK(N * K), w_scales_NG(N * ceil_div(K, kGroup));
  const int source = random.of<int>({kFloat32, kBFloat16, kFloat16});
  Exact<uint8_t>* packed = is_grouped(dtype) ? pack_quantized(pack_op, random, shape, w_NK, w_scales_NG)
                                             : pack_plain(pack_op, random, shape, source, w_NK);
  std::string text = describe("T=%lld N=%lld K=%lld bias=%lld bounds", T, N, K, has_bias);
  for (const int64_t bound : bounds) text += " " + std::to_string(bound);
  op.begin(text);
  Exact<float> x_TK(T * K), bias_N(N);
  random.fill(x_TK, 3.0f);
  random.fill(bias_N);
  for (int64_t i = 0; i < 2 && T * K > 40; ++i) x_TK[random.below(T * K)] = random.of<float>({0.0f, 1e-31f, 300.0f});
  if (T > 2 && K > 2 && style == 2) x_TK[random.below(T * K)] = random.of<float>({NAN, INFINITY});
  const PackedLinear weight = {packed->data(), has_bias ? bias_N.data() : nullptr, &shape};
  const std::vector<float> y_TN = op.everywhere<float>(T * N, [&, T = T](KernelPool* pool, float* y) {
    return run_op(pool, "linear", LinearArgs{y, x_TK.data(), weight, T});
  });
  check(y_TN, x_TK, shape, T, w_NK, w_scales_NG, has_bias ? &bias_N : nullptr);
  if (T > 0) {
    const int64_t rows = random.between(1, T), first = random.between(0, T - rows);
    const Exact<float> x(std::vector<float>(x_TK.data() + first * K, x_TK.data() + (first + rows) * K));
    current_case += describe(", only %lld rows from %lld on", rows, first);
    const std::vector<float> part = op.everywhere<float>(rows * N, [&](KernelPool* pool, float* y) {
      return run_op(pool, "linear", LinearArgs{y, x.data(), weight, rows});
    });
    require_same(part.data(), y_TN.data() + first * N, rows * N, "all rows");
  }
  delete packed;
}

}  // namespace

void exercise_linear() {
  Op plain("pack_rows"), quantized("pack_quantized");
  for (const int dtype : {kFloat32, kBFloat16, kInt8, kInt4}) {
    Op op(std::string("linear ") + kTypeNames[dtype]);
    Op& pack_op = is_grouped(dtype) ? quantized : plain;
    Random random(dtype);
    for (const int chunks : {1, 2, 4, 8}) {
      for (int i = 0; i < 9; ++i) {
        const Sizes sizes = {random.between(1, 33), random.between(1, 50), random.between(1, i < 4 ? 12 : 130), chunks};
        exercise(op, pack_op, random, dtype, sizes, i % 3, i % 2);
      }
    }
    const Sizes edges[] = {{0, 20, 30, 8},  {3, 0, 30, 8},    {1, 17, 0, 8},   {5, 17, 0, 4},   {1, 16, 256, 8},
                           {4, 33, 257, 8}, {13, 300, 40, 2}, {250, 19, 67, 8}, {301, 150, 33, 2}};
    for (const Sizes& sizes : edges) exercise(op, pack_op, random, dtype, sizes, 0, true);
  }
}
