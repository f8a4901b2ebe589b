"""The command line: which code to complete, with which checkpoint, and how to show the result.

Engine and sampling options are derived from the dataclasses, so a new knob needs no code here. Results go to stdout,
everything else to stderr, from rank 0 alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import typing
from collections.abc import Sequence
from contextlib import closing
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

import megatron_infer
from megatron_infer.completion import Completion
from megatron_infer.config import DEFAULT_MODEL_NAME, EngineConfig, SamplingParams
from megatron_infer.fim import MAX_PROMPT_BYTES, FimPrompt
from megatron_infer.llm import LLM, EngineDeadError

QUICK_SORT = FimPrompt(prefix="# 快速排序算法", suffix="\n", path="test.py")
"""The example of upstream's README: "quick-sort algorithm" in a comment, nothing else."""


def _find_demo() -> Path:
    for root in megatron_infer.__path__:
        if (Path(root) / "demo" / "config.json").is_file():
            return Path(root) / "demo"
    return Path(megatron_infer.__path__[0]) / "demo"


DEMO_DIR = _find_demo()
"""The checkpoint that comes with the package; used where none is named."""


class _Parser(argparse.ArgumentParser):
    """Rank 0 alone reports a wrong option."""

    def error(self, message: str) -> NoReturn:
        if _is_first_rank():
            super().error(message)
        raise SystemExit(_refused())


def _refused() -> int:
    """Exit status for bad input. The first rank to exit has torchrun end the others; rank 0 must have spoken first."""
    if not _is_first_rank():
        time.sleep(1)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sess_megatron.py` and `python -m megatron_infer complete`. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except ValueError as error:
        _say(f"error: {error}")
        return _refused()
    except EngineDeadError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): not an error, but Python must not try to flush again.
        sys.stdout = None
        return 0


def _run(args: argparse.Namespace) -> int:
    sampling = _build(SamplingParams, args)
    config = _build(EngineConfig, args)
    if args.stream and sampling.n != 1:
        raise ValueError("--stream shows one completion; leave out --n, or --stream")
    if args.model_dir == "":
        raise ValueError("--model_dir is empty; give a checkpoint directory, or leave it out for the demo")
    model_dir = Path(args.model_dir or DEMO_DIR)
    prompt, is_example = _prompt(args, model_dir)
    if _is_first_rank():
        logging.basicConfig(
            format="%(message)s", stream=sys.stderr, level=logging.WARNING if args.quiet else logging.INFO
        )
    with LLM(model_dir, config, model_name=args.model_name, fim=args.fim, order=args.order) as llm:
        completions = _stream(llm, prompt, sampling, args) if args.stream else llm.complete_n(prompt, sampling)
        if llm.is_leader and _is_first_rank():
            for completion in completions:
                if args.json:
                    print(json.dumps(completion.to_json(), ensure_ascii=False, separators=(",", ":")))
                elif not args.stream:
                    print(_show(prompt, completion) if is_example else completion.text)
                _say(_timing_line(llm, completion))
            sys.stdout.flush()
    return 1 if any(c.error for c in completions) else 0


def _stream(llm: LLM, prompt: FimPrompt, sampling: SamplingParams, args: argparse.Namespace) -> list[Completion]:
    """Print as it is generated. Nothing is returned on ranks that rank 0 has left early."""
    show = not args.json and _is_first_rank()
    with closing(llm.stream(prompt, sampling)) as stream:
        for piece in stream:
            if show:
                print(piece, end="", flush=True)
        if show:
            print()
        return [] if stream.completion is None else [stream.completion]


def _show(prompt: FimPrompt, completion: Completion) -> str:
    """Prefix, completion and suffix as one piece of code; the completion stands out."""
    if sys.stdout.isatty():
        dim, bold, off = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"
        return f"{dim}{prompt.prefix}{off}{bold}{completion.text}{off}{dim}{prompt.suffix}{off}"
    return f"{prompt.prefix}⟦{completion.text}⟧{prompt.suffix}"


def _timing_line(llm: LLM, completion: Completion) -> str:
    if completion.error:
        return f"error: {completion.error}"
    t = completion.timings
    return (
        f"{t.num_prompt_tokens} prompt tokens ({completion.num_cached_tokens} cached), first token after "
        f"{1000 * t.first_token_seconds:.0f} ms; {t.num_new_tokens} new tokens in {t.total_seconds:.2f} s, "
        f"{t.decode_tokens_per_second:.0f} tokens/s; tp {llm.config.tensor_parallel_size}, {llm.config.device}, "
        f"{llm.config.dtype}; ended by {completion.finish_reason}"
    )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    if _is_first_rank() and sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


# ---- what to complete -----------------------------------------------------------------------------------------------


def _prompt(args: argparse.Namespace, model_dir: Path) -> tuple[FimPrompt, bool]:
    """The prompt, and whether it is a built-in example."""
    if args.file:
        if not args.cursor:
            raise ValueError("--file needs --cursor LINE:COL, the place to complete at (both count from 1)")
        if args.prefix_file or args.suffix_file:
            raise ValueError("give either --file with --cursor, or --prefix-file and --suffix-file")
        prefix, suffix = split_at(read_source(args.file), args.cursor)
        return FimPrompt(prefix, suffix, args.path or project_path(args.file)), False
    if args.cursor:
        raise ValueError("--cursor needs --file")
    if args.prefix_file or args.suffix_file:
        prefix = read_source(args.prefix_file) if args.prefix_file else ""
        suffix = read_source(args.suffix_file) if args.suffix_file else ""
        path = args.path or project_path(args.prefix_file or args.suffix_file)
        return FimPrompt(prefix, suffix, path), False
    if args.path:
        raise ValueError("--path goes with --file or --prefix-file")
    example = model_dir / "example.json"
    if example.is_file():
        raw = json.loads(example.read_text(encoding="utf-8"))
        return FimPrompt(raw["prefix"], raw["suffix"], raw["path"]), True
    return QUICK_SORT, True


def read_source(name: str) -> str:
    """Text of a source file, line ends untouched; refuses what cannot be a prompt before reading it (ValueError)."""
    path = Path(name)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ValueError(f"{name} is a directory; name a source file")
        if size > MAX_PROMPT_BYTES:
            raise ValueError(
                f"{name} has {size} bytes; a prompt may have {MAX_PROMPT_BYTES}. Cut out the part around the cursor"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None


def split_at(text: str, cursor: str) -> tuple[str, str]:
    """Prefix and suffix of `text` at "LINE:COL", both from 1; COL counts characters and may be one past the line's end.

    Raises:
        ValueError: not of that form, or outside the text.
    """
    line_text, _, col_text = cursor.partition(":")
    if not (line_text.isdecimal() and col_text.isdecimal()):
        raise ValueError(f"--cursor must be LINE:COL, two numbers from 1, got {cursor!r}")
    line, col = int(line_text), int(col_text)
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise ValueError(f"--cursor line {line} is outside the file's {len(lines)} lines")
    width = len(lines[line - 1].removesuffix("\r"))
    if not 1 <= col <= width + 1:
        raise ValueError(f"--cursor column {col} is outside line {line}, which has columns 1 to {width + 1}")
    at = sum(len(before) + 1 for before in lines[: line - 1]) + col - 1
    return text[:at], text[at:]


def project_path(name: str) -> str:
    """The path the model is told: relative to the current directory where the file lies below it."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.as_posix()


# ---- options --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sess_megatron.py",
        description="Complete code between a prefix and a suffix with a tensor-parallel model. "
        "Start it as: torchrun --nproc_per_node N sess_megatron.py --model_dir DIR. "
        "Every option may be spelled with - or _.",
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    _add(model, "model_dir", help=f"checkpoint directory (default: the bundled demo, {DEMO_DIR.name}/)")
    _add(model, "model_name", default=DEFAULT_MODEL_NAME, help="file stem of .pt checkpoints (default: %(default)s)")
    _add(model, "fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    _add(model, "order", choices=("spm", "psm"), help="suffix first or prefix first (default: the family's)")
    what = parser.add_argument_group("what to complete (default: an example)")
    _add(what, "file", help="complete inside this file, at --cursor")
    _add(what, "cursor", metavar="LINE:COL", help="place in --file, both from 1")
    _add(what, "prefix_file", help="file with the code before the cursor")
    _add(what, "suffix_file", help="file with the code after it")
    _add(what, "path", help="path told to the model (default: that of the file)")
    out = parser.add_argument_group("output")
    _add(out, "stream", action="store_true", help="print the completion as it is generated")
    _add(out, "json", action="store_true", help="print one JSON object per completion")
    _add(out, "quiet", action="store_true", help="no start-up report on stderr")
    for title, cls in (("sampling", SamplingParams), ("engine", EngineConfig)):
        group = parser.add_argument_group(title)
        for spec in fields(cls):
            _add_field(group, cls, spec)
    return parser


def _add(group: Any, name: str, **settings: Any) -> None:
    spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    group.add_argument(*spellings, dest=name, **settings)


def _add_field(group: Any, cls: type, spec: Field[Any]) -> None:
    """One option for a dataclass field, typed by its annotation: bool, tuple (repeatable), or a scalar."""
    kind = typing.get_type_hints(cls)[spec.name]
    options = [t for t in typing.get_args(kind) if t is not type(None)] or [kind]
    help_text = spec.metadata["help"] + (
        f" (default: {spec.default})" if "default" not in spec.metadata["help"] else ""
    )
    if kind is bool:
        _add(group, spec.name, action=argparse.BooleanOptionalAction, default=None, help=spec.metadata["help"])
    elif typing.get_origin(kind) is tuple:
        _add(group, spec.name, action="append", type=options[0], metavar="VALUE", help=help_text + "; may be repeated")
    else:
        _add(group, spec.name, type=options[0], metavar=options[0].__name__.upper(), help=help_text)


def _build(cls: type, args: argparse.Namespace) -> Any:
    """The dataclass from what was given; its own defaults for the rest."""
    assert all(spec.default is not MISSING for spec in fields(cls))
    given = {spec.name: getattr(args, spec.name) for spec in fields(cls)}
    return cls(**{name: value for name, value in given.items() if value is not None})
