"""HumanEval and MBPP: a text says what a function shall do, tests tell whether the completion does it.

Owns their prompts and the test programs, those of the infilling tasks made of HumanEval as well. Runs nothing:
execution.py does.
"""

from __future__ import annotations

from megatron_infer.eval.cases import Case, Row
from megatron_infer.eval.tasks.fields import id_of, optional_text_of, text_of
from megatron_infer.text.fim import FimPrompt


def read_humaneval(kind: str, row: Row) -> Case:
    """HumanEval of the Codex paper."""
    reference = optional_text_of(row, None, "canonical_solution")
    return Case(id_of(row, "task_id"), FimPrompt(text_of(row, "prompt")), reference, "python", "function", row)


def humaneval_program(case: Case, completion: str) -> str:
    """Prompt, completion and tests."""
    row = case.row
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def infilling_program(case: Case, completion: str) -> str:
    """The same with what follows the hole."""
    return humaneval_program(case, completion + case.row["suffix"])


def read_mbpp(kind: str, row: Row) -> Case:
    """MBPP, the full file or the sanitized one."""
    description = text_of(row, "text" if "text" in row else "prompt")
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' must be a list of at least one assertion")
    prompt = FimPrompt(f'"""\n{description}\n{tests[0]}\n"""\n')
    return Case(id_of(row, "task_id"), prompt, optional_text_of(row, None, "code"), "python", "function", row)


def mbpp_program(case: Case, completion: str) -> str:
    """The row's own set-up stands between the answer and all its tests."""
    row = case.row
    setup = [*(row.get("test_imports") or ()), row.get("test_setup_code")]
    return "\n".join([case.prompt.prefix + completion, *(line for line in setup if line), *row["test_list"]])
