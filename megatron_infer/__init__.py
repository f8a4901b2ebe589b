"""Tensor-parallel inference for fill-in-the-middle code models.

Owns the list of public names. Importing it loads torch, but neither transformers nor a web framework.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").exists():
    # Source tree and editable installs: `kernels/` sits beside this package and is imported as megatron_infer.kernels.
    __path__.append(str(_ROOT))

from megatron_infer.config import EngineConfig  # noqa: E402
from megatron_infer.llm import LLM, Completion  # noqa: E402
from megatron_infer.sampling_params import SamplingParams  # noqa: E402
from megatron_infer.text.fim import FimOptions, FimPrompt  # noqa: E402

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "EngineConfig", "FimOptions", "FimPrompt", "SamplingParams", "__version__"]
