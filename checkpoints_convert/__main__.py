"""The command line: python -m checkpoints_convert COMMAND ...

Results go to stdout, everything else to stderr. Exit status: 0 done or equal, 1 `verify` found a difference, 2 refused.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from checkpoints_convert.compare import Comparison, compare_tensors
from checkpoints_convert.convert import (
    FORMATS,
    Options,
    gguf2megatron,
    hf2megatron,
    megatron2hf,
    merge_lora,
    reshard,
)
from checkpoints_convert.inspection import inspect
from checkpoints_convert.logits import compare_logits
from checkpoints_convert.quality import compare_quality
from checkpoints_convert.quantization import quantize
from megatron_infer.commands.options import survive_any_encoding, to_json
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model.manifest import verify_manifest
from megatron_infer.model_config import DEFAULT_MODEL_NAME, FLOAT_DTYPES
from megatron_infer.quantization import GROUP_SIZES, METHODS, STORED_FORMATS

_SHOWN = 10
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    survive_any_encoding()
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _run_convert(args: argparse.Namespace) -> int:
    options = Options(args.model_name, args.dtype, args.verify, args.force, not args.quiet)
    if args.command == "hf2megatron":
        summary = hf2megatron(args.src, args.out, tp=args.tp, fmt=args.format, options=options)
    elif args.command == "megatron2hf":
        summary = megatron2hf(args.src, args.out, options=options)
    elif args.command == "reshard":
        summary = reshard(args.src, args.out, tp=args.tp, options=options)
    elif args.command == "gguf2megatron" and args.format in STORED_FORMATS:
        summary = quantize(args.src, args.out, fmt=args.format, tp=args.tp, options=options)
    elif args.command == "gguf2megatron":
        summary = gguf2megatron(args.src, args.out, tp=args.tp, fmt=args.format, options=options)
    elif args.command == "quantize":
        summary = quantize(
            args.src, args.out, fmt=args.format, group=args.group, method=args.method, calibration=args.calibration,
            tp=args.tp, options=options,
        )  # fmt: skip
    else:
        summary = merge_lora(args.src, args.adapter, args.out, tp=args.tp, fmt=args.format, options=options)
    if not args.quiet:
        print(summary, file=sys.stderr)
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    report = inspect(args.dir, model_name=args.model_name, memory_bytes=args.memory)
    print(to_json(report.to_json()) if args.json else report)
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    if args.b is None:
        if args.logits:
            raise ValueError("--logits compares two checkpoints; name the second one")
        manifest = verify_manifest(args.a)
        print(f"{args.a}: all {len(manifest.files)} files are as they were written (SHA-256)")
        return 0
    with open_checkpoint(args.a, args.model_name) as a, open_checkpoint(args.b, args.model_name) as b:
        with tqdm(total=sum(1 for _ in a.names()), unit="tensor", leave=False) as bar:
            result = compare_tensors(a, b, bar.update)
        _print_comparison(result)
        same = result.within(args.tolerance)
        if args.logits:
            same = _compare_logits(a, b, args.tolerance) and same
    return 0 if same else 1


def _run_quality(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        a, b = (stack.enter_context(open_checkpoint(path, args.model_name)) for path in (args.a, args.b))
        with tqdm(total=a.config.num_hidden_layers, unit="layer", leave=False, disable=None) as bar:
            result = compare_quality(
                a, b, args.text, num_windows=args.windows, num_holes=args.holes, progress=bar.update
            )
    print(result)
    return 0


def _print_comparison(result: Comparison) -> None:
    for name, a, b in result.fields:
        print(f"config {name}: {a} and {b}")
    for difference in result.tensors[:_SHOWN]:
        print(difference)
    if len(result.tensors) > _SHOWN:
        print(f"and {len(result.tensors) - _SHOWN} more")
    if not result.fields and not result.tensors:
        print(f"all {result.num_tensors} tensors are equal, bit for bit")
    elif result.tensors:
        print(f"{len(result.tensors)} of {result.num_tensors} tensors differ")


def _compare_logits(a: Checkpoint, b: Checkpoint, tolerance: float) -> bool:
    if a.config.vocab_size != b.config.vocab_size:
        print("logits: not comparable, the vocabularies differ in size")
        return False
    logits = compare_logits(a, b)
    verdict = "same greedy tokens" if logits.ids[0] == logits.ids[1] else "other greedy tokens"
    print(f"logits: max abs diff {logits.max_abs_diff:g}, {verdict}: {list(logits.ids[0])} and {list(logits.ids[1])}")
    return logits.within(tolerance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checkpoints_convert", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = _conversion(commands, "hf2megatron", "any checkpoint to a sharded directory, or to upstream's .pt")
    _tp(one, default=1)
    one.add_argument("--format", choices=("sharded", "pt"), default="sharded", help="default: %(default)s")
    _conversion(commands, "megatron2hf", "any checkpoint to a Hugging Face directory")
    _tp(_conversion(commands, "reshard", "N shards to M; .pt stays .pt, all else becomes a sharded directory"))
    blocks = _conversion(commands, "gguf2megatron", "a GGUF file to a directory, its tokenizer included")
    _tp(blocks, default=1)
    blocks.add_argument("--format", choices=(*FORMATS, *STORED_FORMATS), default="sharded", help="default: %(default)s")
    merge = _conversion(
        commands, "merge-lora", "a base and a PEFT LoRA adapter to a full checkpoint", "base", "adapter"
    )
    _tp(merge, default=1)
    merge.add_argument("--format", choices=FORMATS, help="default: the base's")
    small = _conversion(commands, "quantize", "any checkpoint to a sharded directory with int8 or int4 weights")
    _tp(small, default=1)
    small.add_argument("--format", choices=STORED_FORMATS, required=True, help="int4 leaves the head int8")
    small.add_argument("--group", type=int, choices=GROUP_SIZES, default=32, help="inputs per scale (default 32)")
    small.add_argument("--method", choices=METHODS, default="rtn", help="nearest (default), or calibrated on text")
    small.add_argument(
        "--calibration", type=Path, nargs="+", default=(), metavar="TEXT", help="files or directories; gptq only"
    )
    look = commands.add_parser("inspect", help="what a checkpoint is, and what it takes", allow_abbrev=False)
    look.add_argument("dir", type=Path)
    look.add_argument("--memory", type=_bytes, metavar="SIZE", help="of one rank, such as 24GiB: says what fits")
    look.add_argument("--json", action="store_true", help="print one JSON object")
    check = commands.add_parser("verify", help="compare two checkpoints, or one with its manifest", allow_abbrev=False)
    check.add_argument("a", type=Path)
    check.add_argument("b", type=Path, nargs="?", help="without it: hash the files of A against its manifest.json")
    check.add_argument("--logits", action="store_true", help="also compare greedy logits (loads one whole model)")
    check.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference that counts as equal (default 0)"
    )
    rate = commands.add_parser("quality", help="what quantization cost, on held-out text", allow_abbrev=False)
    rate.add_argument("a", type=Path, help="the checkpoint before quantization")
    rate.add_argument("b", type=Path, help="the one after")
    rate.add_argument("--text", type=Path, nargs="+", required=True, help="files or directories of them")
    rate.add_argument("--windows", type=int, default=128, metavar="N", help="of 512 tokens (default %(default)s)")
    rate.add_argument("--holes", type=int, default=300, metavar="N", help="ends of lines to fill (default %(default)s)")
    for command, run in ((look, _run_inspect), (check, _run_verify), (rate, _run_quality)):
        _model_name(command)
        command.set_defaults(run=run)
    return parser


def _conversion(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, *inputs: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.add_argument("src", type=Path, metavar=(inputs or ("src",))[0].upper(), help="checkpoint directory")
    for extra in inputs[1:]:
        command.add_argument(extra, type=Path, metavar=extra.upper())
    command.add_argument("out", type=Path, metavar="OUT", help="directory to write; appears only when complete")
    command.add_argument("--dtype", choices=FLOAT_DTYPES, help="convert to it (default: as stored)")
    command.add_argument("--verify", action="store_true", help="first hash the source against its manifest.json")
    command.add_argument("--force", action="store_true", help="replace OUT if it is a checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    _model_name(command)
    command.set_defaults(run=_run_convert)
    return command


def _tp(command: argparse.ArgumentParser, default: int | None = None) -> None:
    text = "number of shards" + (" (default 1)" if default else "")
    command.add_argument("--tp", type=int, default=default, required=default is None, metavar="N", help=text)


def _model_name(command: argparse.ArgumentParser) -> None:
    text = "file stem of .pt checkpoints (default: %(default)s)"
    command.add_argument("--model-name", "--model_name", default=DEFAULT_MODEL_NAME, metavar="NAME", help=text)


def _bytes(text: str) -> int:
    """Bytes from "24GiB", "80GB", "512M" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


if __name__ == "__main__":
    sys.exit(main())
