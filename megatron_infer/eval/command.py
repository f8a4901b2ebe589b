"""`python -m megatron_infer eval`: imports the one command that runs, as each needs packages that others do not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_infer.commands.options import say

_COMMANDS = {
    "run": "complete the cases of a benchmark, on any number of ranks; given again, it continues an interrupted run",
    "tasks": "list the benchmarks, their settings, and where their data is",
    "build": "make a benchmark from source code",
    "score": "judge the completions of a finished run",
    "report": "write one HTML page about a scored run, or about two",
}
_USAGE = "\n".join(
    [
        f"usage: python -m megatron_infer eval {{{','.join(_COMMANDS)}}} [options]\n",
        *(f"  {name:<10}{what}" for name, what in _COMMANDS.items()),
        "\nCOMMAND --help lists the options of a command.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in _COMMANDS:
        say(_USAGE)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        command = importlib.import_module(f"megatron_infer.eval.{arguments[0]}.command")
        return int(command.main(arguments[1:]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("megatron_infer"):
            raise
        say(f"error: eval needs the package {error.name!r}; pip install 'megatron_infer[eval]'")
        return 2
