// Everything a variant_*.cpp compiles for its own instruction set, and the table that leads to it.
#pragma once

#include "layer.h"
#include "pack.h"

template <class Args, int (*op)(Pool*, const Args&)>
int run_op(Pool* pool, const void* args) {
  return op(pool, *static_cast<const Args*>(args));
}

#define MI_OP(op, Args) {#op, sizeof(Args), run_op<Args, op>}

constexpr Kernels table_named(const char* name) {
  return {name,
          {MI_OP(linear, LinearArgs), MI_OP(pack_rows, PackRowsArgs), MI_OP(pack_quantized, PackQuantizedArgs),
           MI_OP(paged_attention, PagedAttentionArgs), MI_OP(rms_norm, RmsNormArgs),
           MI_OP(rope_store_kv, RopeStoreKVArgs), MI_OP(silu_mul, SiluMulArgs), MI_OP(argmax, ArgmaxArgs),
           MI_OP(gather_rows, GatherRowsArgs), MI_OP(attention_layer, AttentionLayerArgs),
           MI_OP(feed_forward_layer, FeedForwardLayerArgs)}};
}
