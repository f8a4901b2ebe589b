"""Conversion of checkpoints: any accepted kind to any other, resharded, quantised, with a LoRA merged in.

`python -m checkpoints_convert --help`; the same as functions here. Everything streams: memory does not grow with the
model. Knows nothing of the engine.
"""

from checkpoints_convert.compare import Comparison, TensorDifference, compare_tensors
from checkpoints_convert.convert import Options, Summary, hf2megatron, megatron2hf, merge_lora, reshard
from checkpoints_convert.inspection import Inspection, RankMemory, inspect
from checkpoints_convert.logits import LogitComparison, compare_logits
from checkpoints_convert.quality import Quality, compare_quality
from checkpoints_convert.quantization import quantize

__all__ = [
    "Comparison",
    "Inspection",
    "LogitComparison",
    "Options",
    "Quality",
    "RankMemory",
    "Summary",
    "TensorDifference",
    "compare_logits",
    "compare_quality",
    "compare_tensors",
    "hf2megatron",
    "inspect",
    "megatron2hf",
    "merge_lora",
    "quantize",
    "reshard",
]
