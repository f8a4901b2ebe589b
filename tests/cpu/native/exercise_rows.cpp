// The ops that work row by row.

#include <algorithm>

#include "exercise.h"

namespace {

const std::vector<int64_t> kWidths = {1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 129, 333};

// The sum of squares is added up in 64 columns, and the root halves its relative error.
void exercise_rms_norm() {
  Op op("rms_norm");
  Random random(7);
  for (const int64_t D : kWidths) {
    for (const bool has_residual : {false, true}) {
      const int64_t T = random.of<int64_t>({0, 1, 2, 33, 150});
      op.begin(describe("T=%lld D=%lld residual=%lld", T, D, has_residual));
      Exact<float> x_TD(T * D), weight_D(D), before_TD(T * D);
      random.fill(x_TD, 10.0f);
      random.fill(weight_D);
      random.fill(before_TD, 10.0f);
      std::vector<float> after_TD = x_TD.copy();
      for (int64_t i = 0; has_residual && i < T * D; ++i) after_TD[i] = before_TD[i] + x_TD[i];
      const std::vector<float> y_TD = op.everywhere<float>(T * D, [&](KernelPool* pool, float* y) {
        Exact<float> residual_TD(before_TD.copy());
        float* residual = has_residual ? residual_TD.data() : nullptr;
        const NormWeight norm = {weight_D.data(), 1e-5f};
        const int status = run_op(pool, "rms_norm", RmsNormArgs{y, x_TD.data(), residual, norm, T, D});
        if (has_residual) require_same(residual_TD.data(), after_TD.data(), T * D, "the residual");
        return status;
      });
      for (int64_t t = 0; t < T; ++t) {
        double squares = 0.0;
        for (int64_t d = 0; d < D; ++d) squares += double{after_TD[t * D + d]} * after_TD[t * D + d];
        const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(D) + 1e-5);
        for (int64_t d = 0; d < D; ++d) {
          const double expected = after_TD[t * D + d] * inverse * weight_D[d];
          const double roundings = static_cast<double>(D / 64 + 16);
          require_close(y_TD[t * D + d], expected, roundings * kUlp * std::fabs(expected), t * D + d);
        }
      }
    }
  }
}

// e^x is off by 1.1 units, the sum, the quotient and the product by half a unit each. Far below zero, where e^-x is no
// longer followed, the result is off by more, but not far from zero.
void exercise_silu_mul() {
  Op op("silu_mul");
  Random random(8);
  std::vector<int64_t> widths = kWidths;
  widths.insert(widths.end(), {2047, 2048, 2049, 4100});
  for (const int64_t F : widths) {
    const int64_t T = random.of<int64_t>({0, 1, 3, 20});
    op.begin(describe("T=%lld F=%lld", T, F));
    Exact<float> x_T2F(T * 2 * F);
    for (int64_t i = 0; i < x_T2F.size(); ++i) {
      const float size = random.of<float>({1.0f, 10.0f, 120.0f});
      x_T2F[i] = random.real() * size;
    }
    for (int64_t t = 0; t < T; ++t) {
      const float special = random.of<float>({INFINITY, NAN, 0.0f, -1e30f});
      x_T2F[t * 2 * F + random.below(F)] = special;
    }
    const std::vector<float> y_TF = op.everywhere<float>(T * F, [&](KernelPool* pool, float* y) {
      return run_op(pool, "silu_mul", SiluMulArgs{y, x_T2F.data(), T, F});
    });
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t f = 0; f < F; ++f) {
        const double x = x_T2F[t * 2 * F + f], up = x_T2F[t * 2 * F + F + f], expected = x / (1.0 + std::exp(-x)) * up;
        const double bound = 5 * kUlp * std::fabs(expected) + (x < -86 ? 1e-37 * std::fabs(x * up) : 0.0);
        require_close(y_TF[t * F + f], expected, bound, t * F + f);
      }
    }
  }
}

void exercise_argmax() {
  Op op("argmax");
  Random random(9);
  for (const int64_t V : kWidths) {
    const int64_t S = random.of<int64_t>({0, 1, 7, 150});
    op.begin(describe("S=%lld V=%lld", S, V));
    Exact<float> logits_SV(S * V);
    for (int64_t i = 0; i < S * V; ++i) logits_SV[i] = static_cast<float>(random.between(-9, 9));  // with many equals
    std::vector<bool> is_spoilt(S);
    for (int64_t s = 0; s < S; ++s) {
      is_spoilt[s] = random.below(4) == 0;
      if (is_spoilt[s]) logits_SV[s * V + random.below(V)] = random.of<float>({NAN, INFINITY, -INFINITY});
    }
    std::vector<int64_t> indices_S;
    const std::vector<float> values_S = op.everywhere<float>(S, [&](KernelPool* pool, float* values) {
      Exact<int64_t> indices(S);
      const int status = run_op(pool, "argmax", ArgmaxArgs{values, indices.data(), logits_SV.data(), S, V});
      if (indices_S.empty()) indices_S = indices.copy();
      require_same(indices.data(), indices_S.data(), S, "the indices");
      return status;
    });
    op.digest(indices_S.data(), S);
    for (int64_t s = 0; s < S; ++s) {
      const float* row = logits_SV.data() + s * V;
      const int64_t best = is_spoilt[s] ? 0 : std::max_element(row, row + V) - row;
      require(indices_S[s] == best, describe("row %lld: column %lld instead of %lld", s, indices_S[s], best));
      require_close(values_S[s], is_spoilt[s] ? NAN : row[best], 0.0, s);
    }
  }
}

void exercise_gather_rows() {
  Op op("gather_rows");
  Random random(10);
  for (const int dtype : {kFloat32, kBFloat16, kFloat16}) {
    for (const int64_t D : kWidths) {
      const int64_t V = random.between(1, 9), T = random.of<int64_t>({0, 1, 5, 140}), is_wide = random.below(2);
      op.begin(describe("dtype=%lld T=%lld D=%lld 64-bit=%lld", dtype, T, D, is_wide));
      Exact<uint8_t> table_VD(V * D * element_bytes(dtype));
      fill_typed(random, table_VD, dtype);
      Exact<int32_t> narrow_T(T);
      Exact<int64_t> wide_T(T);
      for (int64_t t = 0; t < T; ++t) wide_T[t] = narrow_T[t] = static_cast<int32_t>(t ? random.below(V) : V - 1);
      const void* ids = is_wide ? static_cast<const void*>(wide_T.data()) : narrow_T.data();
      const std::vector<float> y_TD = op.everywhere<float>(T * D, [&](KernelPool* pool, float* y) {
        const GatherRowsArgs args = {y, table_VD.data(), ids, dtype, static_cast<int32_t>(is_wide), T, D};
        return run_op(pool, "gather_rows", args);
      });
      for (int64_t i = 0; i < T * D; ++i) {
        require_close(y_TD[i], value_of(table_VD.data(), wide_T[i / D] * D + i % D, dtype), 0.0, i);
      }
    }
  }
}

}  // namespace

void exercise_rows() {
  exercise_rms_norm();
  exercise_silu_mul();
  exercise_argmax();
  exercise_gather_rows();
}
