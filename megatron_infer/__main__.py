"""python -m megatron_infer complete ...: the same command line as sess_megatron.py, for installed packages."""

from __future__ import annotations

import sys

from megatron_infer.cli import main

_USAGE = "usage: python -m megatron_infer complete [options]   (options: python -m megatron_infer complete --help)"


def _dispatch(argv: list[str]) -> int:
    if argv[:1] != ["complete"]:
        print(_USAGE, file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    return main(argv[1:])


if __name__ == "__main__":
    sys.exit(_dispatch(sys.argv[1:]))
