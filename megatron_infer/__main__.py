"""python -m megatron_infer: `complete`, the command line of sess_megatron.py for installed packages, and `bench`."""

from __future__ import annotations

import sys

from megatron_infer import bench, cli

_COMMANDS = {"complete": cli.main, "bench": bench.main}
_USAGE = "usage: python -m megatron_infer {complete,bench} [options]   (options: ... complete --help)"


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
