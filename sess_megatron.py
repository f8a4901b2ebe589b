"""Fill-in-the-middle completions from a tensor-parallel code model.

Command line:  torchrun --nproc_per_node N sess_megatron.py --model_dir DIR
Library:       from sess_megatron import TestInference

Thin: everything happens in megatron_infer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_infer import LLM, EngineConfig, FimOptions, FimPrompt, SamplingParams
from megatron_infer.commands.complete import main
from megatron_infer.commands.options import DEMO_DIR

__all__ = ["TestInference"]


class TestInference:
    """A session that completes code between a prefix and a suffix.

    Under torchrun, in a plain process, or in a notebook (there `tensor_parallel_size=2` starts the second rank itself).
    Several may live in one process. Use it as a context manager, or call `close()`.

    Args:
        model_dir: checkpoint directory. None takes the `--model_dir` given to the running program, if there is one;
            else the demo checkpoint that comes with the package.
        tensor_parallel_size: ranks to divide the model among; by default torchrun's world size, or 1.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bfloat16" or "float32".
        engine_options: any other field of megatron_infer.EngineConfig, `model_name` or `fim` of LLM, or a field of
            megatron_infer.FimOptions (`order`, `header`, `frame_empty_suffix`, ...) for every prompt. `ending`: "raw"
            (upstream's: all that the model writes), "line", "block" or "auto", as SamplingParams has it.
    Raises:
        ValueError: something about the checkpoint or the options is wrong; the message says what to do.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(
        self,
        model_dir: str | Path | None = None,
        *,
        tensor_parallel_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **engine_options: Any,
    ) -> None:
        if model_dir is None:
            given = _model_options_of_program()
            model_dir = DEMO_DIR if given.model_dir is None else given.model_dir
            if given.model_name:
                engine_options.setdefault("model_name", given.model_name)
        layout = {f.name: engine_options.pop(f.name) for f in fields(FimOptions) if f.name in engine_options}
        self.options = FimOptions(**layout)
        self.ending = engine_options.pop("ending", "raw")
        config = EngineConfig(tensor_parallel_size=tensor_parallel_size, device=device, dtype=dtype)
        self.llm = LLM(model_dir, config, **engine_options)

    def run_infer(self, code_string: str, max_new_tokens: int = 256, later_code: str = "", file_path: str = "") -> str:
        """Complete the code between `code_string` and `later_code`, greedily.

        Under torchrun this is a collective call: rank 0's arguments count, and every rank returns the same text.

        Args:
            code_string: the code before the cursor.
            max_new_tokens: longest completion in tokens.
            later_code: the code after the cursor; empty for plain continuation.
            file_path: path of the file from the project's root; its extension tells the model the language.
        Returns:
            The code that belongs in between.
        Raises:
            ValueError: bad input; nothing ran, and the session answers the next call.
            RuntimeError: the model gave no usable output, or a rank failed.
        """
        completion = self.llm.complete_from(
            lambda: (
                FimPrompt(code_string, later_code, file_path),
                SamplingParams(max_new_tokens=max_new_tokens, ending=self.ending),
            ),
            self.options,
        )
        if completion.error is not None:
            raise RuntimeError(completion.error)
        return completion.text

    def close(self) -> None:
        """End the session and the ranks it started. Idempotent."""
        self.llm.close()

    def __enter__(self) -> TestInference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _model_options_of_program() -> argparse.Namespace:
    """--model_dir and --model_name of the running program; flags of its own are none of our business."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model_dir", "--model-dir")
    parser.add_argument("--model_name", "--model-name")
    try:
        return parser.parse_known_args()[0]
    except (argparse.ArgumentError, SystemExit):
        return argparse.Namespace(model_dir=None, model_name=None)


if __name__ == "__main__":
    sys.exit(main())
