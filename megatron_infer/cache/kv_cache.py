"""The paged KV cache's tensors, and how many blocks of it fit into memory.

Owns storage only; which block belongs to whom is the block pool's business.
"""

from __future__ import annotations

import torch

from megatron_infer.ops import LayerKV


class KVCache:
    """Keys and values of all layers in blocks: per layer [num_blocks + 1, kv_heads, block_size, head_dim].

    The last block belongs to nobody: the rows that pad a batch write there.
    """

    def __init__(
        self, num_layers: int, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, *, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = (2, num_layers, num_blocks + 1, kv_heads, block_size, head_dim)
        # empty, not zeros: on the CPU the system hands out pages as blocks are first written.
        self.blocks = torch.empty(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.padding_block = num_blocks
        self.layers = [LayerKV(self.blocks[0, layer], self.blocks[1, layer]) for layer in range(num_layers)]

    @staticmethod
    def block_bytes(num_layers: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        return 2 * num_layers * kv_heads * block_size * head_dim * dtype.itemsize

    def copy_heads(self, copies: list[tuple[int, int, int]]) -> None:
        """For each (source, destination, n): copy the first n tokens of a block into another one."""
        for source, destination, num_tokens in copies:
            self.blocks[:, :, destination, :, :num_tokens] = self.blocks[:, :, source, :, :num_tokens]
