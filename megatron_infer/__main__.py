"""python -m megatron_infer complete ...: the same command line as sess_megatron.py, for installed packages."""

from __future__ import annotations

import sys

from megatron_infer import cli

_USAGE = "usage: python -m megatron_infer complete [options]   (options: python -m megatron_infer complete --help)"


def main() -> int:
    """Entry point of `megatron-infer`; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["complete"]:
        print(_USAGE, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return cli.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
