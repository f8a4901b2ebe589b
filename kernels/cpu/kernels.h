// What the ops of every variant (avx512, avx2, neon, generic) take. Plain data; see pool.h.
//
// Every op returns 0, or kOutOfMemory when its scratch memory could not be had. Results are the same bits for every
// variant, thread count, batch and number of local heads or columns.
//
// abi.py lists the fields of each ...Args in the same order. It refuses a library that was built from another version
// of this file: setup.py compiles the file's checksum in.
#pragma once

#include "pool.h"

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

struct PackedLinear {
  const void* weight;
  const float* bias_N;  // may be null
  const LinearShape* shape;
};

struct NormWeight { const float* weight_D; float eps; };
struct Rope { const float *cos_PH, *sin_PH; };
struct LayerKV { void *k_cache, *v_cache; AttentionShape shape; };
struct Tokens { const int32_t* positions_T; const int64_t* slots_T; int64_t T; };
struct Sequences { const int32_t *block_tables_SB, *query_start_S1, *context_lens_S; int64_t S; };
struct PackedRows { void* weight; const LinearShape* shape; int64_t row_start, num_rows; };

struct LinearArgs { float* y_TN; const float* x_TK; PackedLinear weight; int64_t T; };

struct PackRowsArgs { PackedRows to; const void* rows_NK; int64_t row_stride, dtype; };

// For kInt8 and kInt4: q_NK within [-127, 127] or [-8, 7], one bf16 scale per row and group of 32 k.
struct PackQuantizedArgs {
  PackedRows to;
  const int8_t* q_NK;
  int64_t q_stride;
  const uint16_t* scales_NG;
  int64_t scale_stride;
};

struct PagedAttentionArgs { float* o_TNH; const float* q_TNH; LayerKV kv; Sequences sequences; float scale; };

// residual_TD may be null; otherwise x is added to it and the sum normalised.
struct RmsNormArgs { float* y_TD; const float* x_TD; float* residual_TD; NormWeight norm; int64_t T, D; };

struct RopeStoreKVArgs { float* q_TNH; const float* qkv_TC; Rope rope; LayerKV kv; Tokens tokens; };

struct SiluMulArgs { float* y_TF; const float* gate_up_T2F; int64_t T, F; };

struct ArgmaxArgs { float* values_S; int64_t* indices_S; const float* logits_SV; int64_t S, V; };

struct GatherRowsArgs {
  float* y_TD;
  const void *table_VD, *ids_T;
  int32_t dtype, ids_are_64_bit;
  int64_t T, D;
};

// y_TD = the attention output's partial sums. x_TD, what was last added to the stream, may be null; else the residual
// takes it up.
struct AttentionLayerArgs {
  float* y_TD;
  const float* x_TD;
  float* residual_TD;
  NormWeight norm;
  PackedLinear qkv, out;
  Rope rope;
  LayerKV kv;
  Tokens tokens;
  Sequences sequences;
  float scale;
};

// y_TD = the feed-forward output's partial sums.
struct FeedForwardLayerArgs {
  float* y_TD;
  const float* x_TD;
  float* residual_TD;
  NormWeight norm;
  PackedLinear gate_up, down;
  int64_t T;
};

struct OpEntry {
  const char* name;
  size_t args_bytes;
  int (*run)(Pool*, const void* args);
};

constexpr int kNumOps = 11;

struct Kernels {
  const char* name;
  OpEntry ops[kNumOps];
};

// Null when this machine cannot run the variant.
const Kernels* mi_kernels_avx512();
const Kernels* mi_kernels_avx2();
const Kernels* mi_kernels_neon();
const Kernels* mi_kernels_generic();
