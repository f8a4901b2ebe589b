"""HumanEval and MBPP: a text says what a function shall do, tests tell whether the completion does it.

Owns their prompts, stop strings and test programs. Runs nothing: execution.py does.
"""

from __future__ import annotations

from megatron_infer.eval.cases import Case, Row, Task
from megatron_infer.eval.tasks import postprocess
from megatron_infer.eval.tasks.fields import completion_row, id_of, optional_text_of, text_of
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")


def humaneval() -> Task:
    """HumanEval of the Codex paper."""

    def read(row: Row) -> Case:
        reference = optional_text_of(row, None, "canonical_solution")
        return Case(id_of(row, "task_id"), FimPrompt(text_of(row, "prompt")), reference, "python", "function", row)

    def program(case: Case, completion: str) -> str:
        row = case.row
        return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"

    return Task(
        name="humaneval",
        about="HumanEval (openai/human-eval; Chen et al. 2021, arXiv:2107.03374): the prompt as it stands, continued "
        "without suffix or path, one greedy sample, the paper's stop strings, pass@k.",
        read=read,
        options=FimOptions(header="none"),
        sampling=SamplingParams(max_new_tokens=512, stop=HUMANEVAL_STOPS),
        finish=lambda case, text: postprocess.cut_at(text, HUMANEVAL_STOPS),
        predict=completion_row,
        metrics=(),
        program=program,
    )


def mbpp() -> Task:
    """MBPP, the full file or the sanitized one."""

    def read(row: Row) -> Case:
        description = text_of(row, "text" if "text" in row else "prompt")
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError("field 'test_list' must be a list of at least one assertion")
        prompt = FimPrompt(f'"""\n{description}\n{tests[0]}\n"""\n')
        return Case(id_of(row, "task_id"), prompt, optional_text_of(row, None, "code"), "python", "function", row)

    def program(case: Case, completion: str) -> str:
        row = case.row
        setup = [*(row.get("test_imports") or ()), row.get("test_setup_code")]
        return "\n".join([case.prompt.prefix + completion, *(line for line in setup if line), *row["test_list"]])

    return Task(
        name="mbpp",
        about="MBPP (google-research/mbpp; Austin et al. 2021, arXiv:2108.07732), full or sanitized: zero-shot after "
        "InCoder as bigcode-evaluation-harness has it, a docstring with the description and the first test; one greedy "
        "sample, its stop strings, pass@k. Unlike there, a row's own set-up code and imports run before its tests.",
        read=read,
        options=FimOptions(header="none"),
        sampling=SamplingParams(max_new_tokens=512, stop=MBPP_STOPS),
        finish=lambda case, text: postprocess.cut_at(text, MBPP_STOPS),
        predict=completion_row,
        metrics=(),
        program=program,
    )
