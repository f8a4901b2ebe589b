"""How the linear layers of a stored checkpoint were quantised: the `quantization_config` block of its config.json.

Knows no tensors; model.formats has the arithmetic, model.weights the stored shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infer.checks import one_of

QUANT_METHOD = "megatron_infer"
STORED_FORMATS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
METHODS = ("rtn", "gptq")

_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantization:
    """Weights of the decoder layers as integers times a bf16 scale per output row and group of inputs; the head int8.

    format: "int8" or "int4". group_size: inputs that share a scale. method: "rtn" (round to nearest) or "gptq".
    """

    format: str
    group_size: int = 32
    method: str = "rtn"

    def __post_init__(self) -> None:
        one_of("quantization format", self.format, STORED_FORMATS)
        one_of("quantization group", self.group_size, GROUP_SIZES)
        one_of("quantization method", self.method, METHODS)

    def __str__(self) -> str:
        return f"{self.format}, groups of {self.group_size}, {self.method}"

    @classmethod
    def from_hf(cls, raw: Any) -> Quantization | None:
        """Read `quantization_config`; None where there is none. ValueError for another tool's, or a damaged one."""
        if raw is None:
            return None
        method = raw.get("quant_method") if isinstance(raw, Mapping) else raw
        if method != QUANT_METHOD:
            raise ValueError(
                f"weights quantized by another tool ({method!r}) are not read; take the checkpoint before "
                "quantization and use quantization='int8' or 'int4', or python -m checkpoints_convert quantize"
            )
        formats = {bits: name for name, bits in _BITS.items()}
        bits = raw.get("bits")
        one_of("quantization_config.bits", bits, tuple(formats))
        return cls(formats[bits], raw.get("group_size"), raw.get("rounding"))

    def to_hf(self) -> dict[str, Any]:
        """The block that `from_hf` reads back."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": _BITS[self.format],
            "group_size": self.group_size,
            "rounding": self.method,
        }
