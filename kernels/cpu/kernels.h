// The ops every variant (avx512, avx2, neon, generic) implements, and the shapes they take. Plain data; see pool.h.
//
// Every op returns 0, or kOutOfMemory when its scratch memory could not be had. Results are the same bits for every
// variant, thread count, batch and number of local heads or columns.
#pragma once

#include "pool.h"

// To be raised here and in native.py with every change of a signature or a shape: a library that was not rebuilt must be
// refused, not called.
constexpr int kAbi = 3;

enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };
enum Status { kOk = 0, kOutOfMemory = 1 };

// A packed weight: ceil(out_dim / 16) panels of 16 output columns; panel_bytes apart. Inside a panel the chunks of K
// follow each other, each k-major: fp32 as 16 floats per k, bf16 as 16 words per two k (even k in the low half), so
// that one load and an AND or a shift gives the fp32 columns of either. A chunk of odd length ends in half a pair.
//
// int8 and int4 are groups of 32 k, of which a chunk has a whole number (the last group of K may be cut short):
// 16 bf16 scales, one per column, then
//   int8   16 pairs of k, each 16 columns x 2 signed bytes;
//   int4   8 quads of k, each 32 bytes: byte 4 n + i has column n in its low and n + 8 in its high nibble, as q + 8.
struct LinearShape {
  int64_t out_dim;
  int64_t in_dim;
  int64_t panel_bytes;
  int32_t dtype;              // kFloat32, kBFloat16, kInt8 or kInt4
  int32_t num_chunks;         // 1, 2, 4 or 8
  int32_t bounds[9];          // of the chunks in K; bounds[num_chunks] == in_dim
  int32_t chunk_bytes[9];     // where each chunk begins inside a panel
};

struct AttentionShape {
  int32_t num_heads;     // N
  int32_t num_kv_heads;  // G
  int32_t head_dim;      // H, even
  int32_t block_size;    // of the caches [num_blocks, G, block_size, H]
  int32_t dtype;         // of the caches: kFloat32 or kBFloat16
  int32_t max_blocks;    // columns of the block tables
};

struct LayerLinear {
  const void* weight;
  const float* bias_N;  // may be null
  const LinearShape* shape;
};

struct Kernels {
  const char* name;
  int (*linear)(Pool*, float* y_TN, const float* x_TK, const void* weight, const float* bias_N, int64_t T,
                const LinearShape*);
  int (*pack_rows)(Pool*, void* weight, const void* rows_NK, int64_t row_stride, int dtype, int64_t row_start,
                   int64_t num_rows, const LinearShape*);
  // For kInt8 and kInt4: q_NK within [-127, 127] or [-8, 7], one bf16 scale per row and group of 32 k.
  int (*pack_quantized)(Pool*, void* weight, const int8_t* q_NK, int64_t q_stride, const uint16_t* scales_NG,
                        int64_t scale_stride, int64_t row_start, int64_t num_rows, const LinearShape*);
  int (*paged_attention)(Pool*, float* o_TNH, const float* q_TNH, const void* k_cache, const void* v_cache,
                         const int32_t* block_tables_SB, const int32_t* query_start_S1, const int32_t* context_lens_S,
                         int64_t S, const AttentionShape*, float scale);
  // residual_TD may be null; otherwise x is added to it and the sum normalised.
  int (*rms_norm)(Pool*, float* y_TD, const float* x_TD, float* residual_TD, const float* weight_D, int64_t T,
                  int64_t D, float eps);
  int (*rope_store_kv)(Pool*, float* q_TNH, const float* qkv_TC, const float* cos_PH, const float* sin_PH,
                       const int32_t* positions_T, const int64_t* slots_T, void* k_cache, void* v_cache, int64_t T,
                       const AttentionShape*);
  int (*silu_mul)(Pool*, float* y_TF, const float* gate_up_T2F, int64_t T, int64_t F);
  int (*argmax)(Pool*, float* values_S, int64_t* indices_S, const float* logits_SV, int64_t S, int64_t V);
  int (*gather_rows)(Pool*, float* y_TD, const void* table_VD, int dtype, const void* ids_T, int ids_are_64_bit,
                     int64_t T, int64_t D);
  int (*attention_layer)(Pool*, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D, float eps,
                         const LayerLinear* qkv, const LayerLinear* out, const float* cos_PH, const float* sin_PH,
                         const int32_t* positions_T, const int64_t* slots_T, void* k_cache, void* v_cache,
                         const int32_t* block_tables_SB, const int32_t* query_start_S1, const int32_t* context_lens_S,
                         int64_t T, int64_t S, const AttentionShape*, float scale);
  int (*feed_forward_layer)(Pool*, float* y_TD, const float* x_TD, float* residual_TD, const float* norm_D, float eps,
                            const LayerLinear* gate_up, const LayerLinear* down, int64_t T);
};

// Null when this machine cannot run the variant.
const Kernels* mi_kernels_avx512();
const Kernels* mi_kernels_avx2();
const Kernels* mi_kernels_neon();
const Kernels* mi_kernels_generic();
