"""The same fill-in-the-middle prompt through transformers: what the engine's answers are compared with.

Command line:  python sess_huggingface.py --model_dir DIR [--file FILE --cursor LINE:COL]

Token ids come from megatron_infer.text.fim, so they are the engine's; network and generation are transformers' own.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.convert import Options, megatron2hf
from megatron_infer.commands.complete import QUICK_SORT, project_path, read_source, split_at
from megatron_infer.commands.options import DEMO_DIR, survive_any_encoding
from megatron_infer.hub import local_path
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model_config import DEFAULT_MODEL_NAME
from megatron_infer.text.fim import FimOptions, FimPrompt, load_fim
from megatron_infer.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Answer:
    """prompt_ids, new_ids: token ids, without the one that ended the completion. text: of the new ones."""

    prompt_ids: list[int]
    new_ids: list[int]
    text: str


class HuggingFaceInference:
    """A checkpoint of any kind in transformers. Other kinds than Hugging Face's are converted to a temporary directory.

    Args:
        model_dir: checkpoint directory.
        model_name: file stem of `.pt` checkpoints.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        dtype: of weights and activations. "float32" is what the engine's arithmetic on the CPU corresponds to.
        quantization: "int8" or "int4" weights by bitsandbytes, on a GPU only; its arithmetic is not the engine's.
        fim: FIM family, where neither config.json nor the tokenizer tells.
    Raises:
        ValueError: the checkpoint is damaged, transformers is not installed, or bitsandbytes or a GPU is missing for
            `quantization`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        model_name: str = DEFAULT_MODEL_NAME,
        device: str | None = None,
        dtype: str = "float32",
        quantization: str | None = None,
        fim: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if quantization is not None:
            _check_quantization(quantization, self.device)
        model_dir = local_path(model_dir)
        with open_checkpoint(model_dir, model_name) as checkpoint:
            self.config, is_hf = checkpoint.config, checkpoint.kind.startswith("hf-")
        self.tokenizer = load_tokenizer(checkpoint.model_dir, self.config.vocab_size)
        self.fim = load_fim(fim or self.config.fim, self.tokenizer)
        if is_hf:
            self.model = _load(Path(model_dir), dtype, quantization, self.device)
        else:
            with tempfile.TemporaryDirectory(prefix="megatron_infer-hf-") as temporary:
                converted = Path(temporary) / "hf"
                megatron2hf(model_dir, converted, options=Options(model_name))
                self.model = _load(converted, dtype, quantization, self.device)

    def complete(self, prompt: FimPrompt, max_new_tokens: int = 256, order: str | None = None) -> Answer:
        """Complete greedily; ends at the same ids as the engine does. Raises ValueError for a bad prompt."""
        encoding = self.fim.encode(prompt, options=FimOptions(order=order))
        ends = sorted({*encoding.stop_token_ids, *self.config.eos_token_ids})
        ids = torch.tensor([encoding.ids], device=self.device)
        with torch.no_grad():
            # A fresh configuration: the directory's own may ask for sampling or penalties.
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_transformers().GenerationConfig(
                    max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
                ),
            )
        new_ids = output[0, len(encoding.ids) :].tolist()
        if new_ids and new_ids[-1] in ends:
            new_ids.pop()
        return Answer(encoding.ids, new_ids, self.tokenizer.decode(new_ids))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script. Returns the exit status."""
    survive_any_encoding()
    args = _parser().parse_args(argv)
    try:
        prompt = _prompt(args)
        session = HuggingFaceInference(
            args.model_dir,
            model_name=args.model_name,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            fim=args.fim,
        )
        answer = session.complete(prompt, args.max_new_tokens, args.order)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.ids:
        print(f"prompt ids: {answer.prompt_ids}\nnew ids: {answer.new_ids}", file=sys.stderr)
    print(answer.text)
    return 0


def _prompt(args: argparse.Namespace) -> FimPrompt:
    if bool(args.file) != bool(args.cursor):
        raise ValueError("--file and --cursor LINE:COL go together")
    if not args.file:
        return QUICK_SORT
    prefix, suffix = split_at(read_source(args.file), args.cursor)
    return FimPrompt(prefix, suffix, args.path or project_path(args.file))


def _check_quantization(quantization: str, device: torch.device) -> None:
    if quantization not in ("int8", "int4"):
        raise ValueError(f"quantization must be int8 or int4, not {quantization!r}")
    if device.type != "cuda":
        raise ValueError(
            f"quantization {quantization!r} through bitsandbytes needs a CUDA GPU; leave it out, or use the engine's "
            f"(sess_megatron.py --quantization {quantization}), which runs on the CPU too"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization {quantization!r} needs bitsandbytes; install it (pip install bitsandbytes)")


def _load(directory: Path, dtype: str, quantization: str | None, device: torch.device) -> Any:
    transformers, options = _transformers(), {}
    if quantization is not None:
        options["device_map"] = {"": device}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "int8",
            load_in_4bit=quantization == "int4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, **options
    )
    return (model if quantization else model.to(device)).eval()


def _transformers() -> Any:
    """Imported only here: the engine does without it."""
    try:
        import transformers
    except ImportError:
        raise ValueError("sess_huggingface.py needs transformers; install it (pip install transformers)") from None
    return transformers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sess_huggingface.py",
        description="Complete code with transformers, from the engine's own prompt ids. Greedy.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_dir", "--model-dir", default=DEMO_DIR, help="checkpoint directory (default: the demo)")
    parser.add_argument("--model_name", "--model-name", default=DEFAULT_MODEL_NAME, help="file stem of .pt checkpoints")
    parser.add_argument("--file", help="complete inside this file, at --cursor (default: the quick-sort example)")
    parser.add_argument("--cursor", metavar="LINE:COL", help="place in --file, both from 1")
    parser.add_argument("--path", help="path told to the model (default: --file)")
    parser.add_argument("--order", choices=("spm", "psm"), help="suffix first or prefix first (default: the family's)")
    parser.add_argument("--fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="weights by bitsandbytes; needs a CUDA GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--ids", action="store_true", help="also print token ids, on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
