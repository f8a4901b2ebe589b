"""The paged KV cache: which block holds what (`block_pool`, integers only) and the tensors behind it (`kv_cache`)."""
