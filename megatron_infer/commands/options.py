"""What the commands share: options derived from the dataclasses, errors in one line, and that rank 0 alone speaks.

A new field of EngineConfig or SamplingParams is an option of every command without code here. Knows no command.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError

import megatron_infer
from megatron_infer.hub import local_path
from megatron_infer.llm import EngineDeadError
from megatron_infer.model_config import DEFAULT_MODEL_NAME
from megatron_infer.world import World, end_with_launcher, tell_launcher


def _find_demo() -> Path:
    for root in megatron_infer.__path__:
        if (Path(root) / "demo" / "config.json").is_file():
            return Path(root) / "demo"
    return Path(megatron_infer.__path__[0]) / "demo"


DEMO_DIR = _find_demo()
"""The checkpoint that comes with the package; used where none is named."""


_SYNONYMS = {"n": ("num_samples",)}
"""For what torchrun takes as the beginning of an option of its own, even behind the name of the program."""


class Parser(argparse.ArgumentParser):
    """Rank 0 alone reports a wrong option."""

    def __init__(self, world: World, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._world = world

    def error(self, message: str) -> NoReturn:
        if self._world.is_first:
            tell_launcher(f"error: {message}")
            super().error(message)
        raise SystemExit(_refused(self._world))


def run_command(command: Callable[[World], int]) -> int:
    """Run a command in this process's world; what its user can mend becomes one line on stderr, from rank 0 alone.

    Returns the exit status.
    """
    survive_any_encoding()
    world = World()  # every rank reports what is wrong with its own environment
    try:
        world = World.from_env()
        end_with_launcher(world)
        return command(world)
    except ValueError as error:
        if world.is_first:
            tell_launcher(f"error: {error}")
            say(f"error: {error}")
        return _refused(world)
    except (EngineDeadError, DistError) as error:
        tell_launcher(f"error: {error}")
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): not an error, but Python must not try to flush again.
        sys.stdout = None
        return 0


def survive_any_encoding() -> None:
    r"""From now on print what a terminal's encoding lacks as \uXXXX; Python would raise, after the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def can_show(text: str) -> bool:
    """Whether the encoding of stdout has all of `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def to_json(value: Any) -> str:
    """One line of JSON for stdout, its characters as they are where stdout's encoding has them all."""
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return line if can_show(line) else json.dumps(value, separators=(",", ":"))


def _refused(world: World) -> int:
    """Exit status for bad input. The first rank to exit has torchrun end the others; rank 0 must have spoken first."""
    if not world.is_first:
        time.sleep(1)
    return 2


def say(line: str) -> None:
    """Print a line to stderr."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def log_to_stderr(world: World, level: int) -> None:
    """Have rank 0 report what it does at start."""
    if world.is_first:
        logging.basicConfig(format="%(message)s", stream=sys.stderr, level=level)


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """--model_dir and --model_name; returns their group."""
    group = parser.add_argument_group("model")
    add_option(
        group, "model_dir", help="checkpoint directory, .gguf file, or model on the hub as ORG/NAME[@REVISION][:FILE] "
        f"(default: the bundled demo, {DEMO_DIR.name}/)",
    )  # fmt: skip
    add_option(
        group, "model_name", default=DEFAULT_MODEL_NAME, help="file stem of .pt checkpoints (default: %(default)s)"
    )
    return group


def model_dir_of(args: argparse.Namespace) -> Path:
    """Where the checkpoint that was asked for lies; fetched where it is one on the hub. Raises ValueError."""
    if args.model_dir == "":
        raise ValueError("--model_dir is empty; give a checkpoint directory, or leave it out for the demo")
    return local_path(args.model_dir or DEMO_DIR)


def add_option(group: Any, name: str, **settings: Any) -> None:
    """One option, in both spellings: with _ and with -."""
    names = [name, *_SYNONYMS.get(name, ())]
    spellings = [f"--{text}" for name in names for text in dict.fromkeys((name, name.replace("_", "-")))]
    group.add_argument(*spellings, dest=name, **settings)


def add_options_of(cls: type, parser: argparse.ArgumentParser, title: str) -> None:
    """A group with one option per field of a dataclass whose fields carry help texts."""
    group = parser.add_argument_group(title)
    for spec in fields(cls):
        _add_field(group, cls, spec)


def _add_field(group: Any, cls: type, spec: Field[Any]) -> None:
    """One option for a dataclass field, typed by its annotation: bool, tuple (repeatable), or a scalar."""
    kind = typing.get_type_hints(cls)[spec.name]
    options = [t for t in typing.get_args(kind) if t is not type(None)] or [kind]
    help_text = spec.metadata["help"] + (
        f" (default: {spec.default})" if "default" not in spec.metadata["help"] else ""
    )
    if kind is bool:
        add_option(group, spec.name, action=argparse.BooleanOptionalAction, default=None, help=spec.metadata["help"])
    elif typing.get_origin(kind) is tuple:
        parse = spec.metadata["parse"] or options[0]
        add_option(group, spec.name, action="append", type=parse, metavar="VALUE", help=help_text + "; may be repeated")
    else:
        add_option(group, spec.name, type=options[0], metavar=options[0].__name__.upper(), help=help_text)


def build(cls: type, args: argparse.Namespace, default: Any = None) -> Any:
    """The dataclass from what was given; for the rest `default`, an instance, or else the dataclass's own defaults."""
    assert all(spec.default is not MISSING for spec in fields(cls))
    given = {spec.name: getattr(args, spec.name) for spec in fields(cls)}
    return replace(default or cls(), **{name: value for name, value in given.items() if value is not None})


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` percent of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
