"""python -m megatron_infer: `complete` (sess_megatron.py for installed packages), `bench` or `eval`."""

from __future__ import annotations

import sys

from megatron_infer import bench, cli
from megatron_infer.eval import command

_COMMANDS = {"complete": cli.main, "bench": bench.main, "eval": command.main}
_USAGE = "usage: python -m megatron_infer {complete,bench,eval} [options]   (options: ... complete --help)"


def main() -> int:
    """Entry point of `megatron-infer`; returns the exit status."""
    arguments = sys.argv[1:]
    command = _COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        print(_USAGE, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
