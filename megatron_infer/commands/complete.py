"""The command `complete`: which code to complete, with which checkpoint, and how to show the result.

Results go to stdout, everything else to stderr, from rank 0 alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_infer.commands.options import (
    Parser,
    add_model_options,
    add_option,
    add_options_of,
    build,
    can_show,
    log_to_stderr,
    model_dir_of,
    run_command,
    say,
    to_json,
)
from megatron_infer.completion import Completion, CompletionStream
from megatron_infer.config import EngineConfig
from megatron_infer.files import read_json_object
from megatron_infer.llm import LLM
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim_prompt import MAX_PROMPT_BYTES, FimOptions, FimPrompt
from megatron_infer.world import World

QUICK_SORT = FimPrompt(prefix="# 快速排序算法", suffix="\n", path="test.py")
"""The example of upstream's README: "quick-sort algorithm" in a comment, nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sess_megatron.py` and `python -m megatron_infer complete`. Returns the exit status."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv), world))


def _run(args: argparse.Namespace, world: World) -> int:
    sampling, options, config = build(SamplingParams, args), build(FimOptions, args), build(EngineConfig, args)
    if args.stream and sampling.n != 1:
        raise ValueError("--stream shows one completion; leave out --num_samples, or --stream")
    model_dir = model_dir_of(args)
    prompt, is_example = _prompt(args, model_dir)
    log_to_stderr(world, logging.WARNING if args.quiet else logging.INFO)
    with LLM(model_dir, config, model_name=args.model_name, fim=args.fim, world=world) as llm:
        if args.stream:
            completions = _stream(llm.stream(prompt, sampling, options), show=world.is_first and not args.json)
        else:
            completions = llm.complete_n(prompt, sampling, options)
        if world.is_first:
            for completion in completions:
                if args.json:
                    print(to_json(_to_json(completion)))
                elif not args.stream:
                    print(_show(prompt, completion) if is_example else completion.text)
                say(_timing_line(llm, completion))
            sys.stdout.flush()
    return 1 if any(c.error for c in completions) else 0


def _stream(stream: CompletionStream, *, show: bool) -> list[Completion]:
    """Print as it is generated. Nothing is returned on ranks that rank 0 has left early."""
    with closing(stream):
        for piece in stream:
            if show:
                print(piece, end="", flush=True)
        if show:
            print()
        return [] if stream.completion is None else [stream.completion]


def _to_json(completion: Completion) -> dict[str, Any]:
    """Without the prompt's ids, which are many."""
    raw = completion.to_json()
    del raw["prompt_token_ids"]
    return raw


def _show(prompt: FimPrompt, completion: Completion) -> str:
    """Prefix, completion and suffix as one piece of code; the completion stands out."""
    if sys.stdout.isatty():
        dim, bold, off = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"
        return f"{dim}{prompt.prefix}{off}{bold}{completion.text}{off}{dim}{prompt.suffix}{off}"
    left, right = "⟦⟧" if can_show("⟦⟧") else "[]"
    return f"{prompt.prefix}{left}{completion.text}{right}{prompt.suffix}"


def _timing_line(llm: LLM, completion: Completion) -> str:
    if completion.error:
        return f"error: {completion.error}"
    t = completion.timings
    return (
        f"{t.num_prompt_tokens} prompt tokens ({completion.num_cached_tokens} cached), first token after "
        f"{1000 * t.first_token_seconds:.0f} ms; {t.num_new_tokens} new tokens in {t.total_seconds:.2f} s, "
        f"{t.decode_tokens_per_second:.0f} tokens/s; tp {llm.config.tensor_parallel_size}, {llm.config.device}, "
        f"{llm.config.dtype}; ended by {completion.trimmed_by or completion.finish_reason}"
    )


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
    example = Path(args.example) if args.example else model_dir / "example.json"
    if args.example or example.is_file():
        raw = read_json_object(example)
        if not all(isinstance(raw.get(name), str) for name in ("prefix", "suffix", "path")):
            raise ValueError(f"{example} has not the texts prefix, suffix and path")
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


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "sess_megatron.py",
        "Complete code between a prefix and a suffix with a tensor-parallel model. "
        "Start it as: torchrun --nproc_per_node N sess_megatron.py --model_dir DIR. "
        "Every option may be spelled with - or _.",
    )
    model = add_model_options(parser)
    add_option(model, "fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    what = parser.add_argument_group("what to complete (default: an example)")
    add_option(what, "file", help="complete inside this file, at --cursor")
    add_option(what, "cursor", metavar="LINE:COL", help="place in --file, both from 1")
    add_option(what, "prefix_file", help="file with the code before the cursor")
    add_option(what, "suffix_file", help="file with the code after it")
    add_option(what, "path", help="path told to the model (default: that of the file)")
    add_option(what, "example", help="JSON file with prefix, suffix and path (default: the checkpoint's example.json)")
    out = parser.add_argument_group("output")
    add_option(out, "stream", action="store_true", help="print the completion as it is generated")
    add_option(out, "json", action="store_true", help="print one JSON object per completion")
    add_option(out, "quiet", action="store_true", help="no start-up report on stderr")
    add_options_of(FimOptions, parser, "prompt layout")
    add_options_of(SamplingParams, parser, "sampling")
    add_options_of(EngineConfig, parser, "engine")
    return parser
