"""python -m megatron_infer: `complete` (sess_megatron.py for installed packages), `bench`, `serve` or `eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_infer.commands import bench, complete
from megatron_infer.eval import command


def _serve(arguments: Sequence[str] | None = None) -> int:
    """The web framework is an extra."""
    try:
        from megatron_infer.serve import command as serving
    except ModuleNotFoundError as error:
        print(f"error: serve needs the package {error.name}: pip install 'megatron_infer[serve]'", file=sys.stderr)
        return 2
    return serving.main(arguments)


_COMMANDS = {
    "complete": (complete.main, "complete code between a prefix and a suffix, as sess_megatron.py does"),
    "bench": (bench.main, "measure latency and throughput; with --profile, show where the time of a step goes"),
    "serve": (_serve, "serve completions to editors over HTTP: OpenAI, Mistral, llama.cpp, Ollama and Tabby in one"),
    "eval": (command.main, "evaluate on published benchmarks or on your own code: build, run, score, report"),
}
_USAGE = "\n".join(
    [
        f"usage: python -m megatron_infer {{{','.join(_COMMANDS)}}} [options]\n",
        *(f"  {name:<10}{what}" for name, (_, what) in _COMMANDS.items()),
        "\nCOMMAND --help lists the options of a command.",
    ]
)


def main() -> int:
    """Entry point of `megatron-infer`; returns the exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in _COMMANDS:
        print(_USAGE, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    run, _ = _COMMANDS[arguments[0]]
    return run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
