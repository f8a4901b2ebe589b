// Everything a variant_*.cpp compiles for its own instruction set, and the table that leads to it.
#pragma once

#include "layer.h"
#include "pack.h"

constexpr Kernels table_named(const char* name) {
  return {name,     linear,        pack_rows, pack_quantized, paged_attention,
          rms_norm, rope_store_kv, silu_mul,  argmax,         gather_rows,
          attention_layer,         feed_forward_layer};
}
