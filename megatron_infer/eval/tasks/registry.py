"""TASKS: the benchmarks' fields, prompts, settings, post-processing and output rows, as their own harnesses have them.

Owns what a row's fields mean. The prompt's layout is fim.py's, the cuts are postprocess.py's, the scores metrics.py's.
A benchmark's name stands in several tasks where its harness has several settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_infer.eval import syntax
from megatron_infer.eval.cases import Case, Row, Task
from megatron_infer.eval.tasks import nl2code, postprocess, retrieval
from megatron_infer.eval.tasks.fields import (
    completion_row,
    content_id,
    id_of,
    language_named,
    optional_text_of,
    text_of,
)
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt, load_preset

_SAFIM_PLACEHOLDERS = {"python": "# TODO: Your code here"} | dict.fromkeys(
    ("java", "cpp", "csharp"), "/* TODO: Your code here */"
)
_SAFIM_HOLE = "{{completion}}"
_FIM_EVAL_PATHS = {"python": "test.py", "java": "test.java", "cpp": "test.cpp", "javascript": "test.js"}
_TEXT_METRICS = (
    "exact_match", "edit_similarity_difflib", "edit_similarity_indel", "edit_similarity_levenshtein", "bleu_4",
    "codebleu", "identifier_match", "length", "length_ratio",
)  # fmt: skip


def _as_it_is(case: Case, text: str) -> str:
    return text


def task(name: str) -> Task:
    """A task by its name. Raises ValueError, with the names there are, for any other."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name]


def generic_task(
    *,
    prefix_field: str = "prefix",
    suffix_field: str = "suffix",
    path_field: str | None = None,
    id_field: str | None = None,
    reference_field: str | None = None,
    language_field: str | None = None,
    scenario_field: str | None = None,
) -> Task:
    """A task over rows with a prefix, a suffix and any field names.

    A field that is named here must be in every row. One left None is read as path, task_id, reference, language or
    scenario where a row has that; then the language falls back on the path's extension, and the id on a hash of path,
    prefix and suffix: it stays the same when lines are added, dropped or reordered, which a line number would not.
    """

    def read(row: Row) -> Case:
        prompt = FimPrompt(
            prefix=text_of(row, prefix_field),
            suffix=text_of(row, suffix_field),
            path=optional_text_of(row, path_field, "path") or "",
            repository=optional_text_of(row, None, "repository") or "",
        )
        language = optional_text_of(row, language_field, "language") or syntax.language_of(prompt.path)
        has_id = id_field is not None or "task_id" in row
        return Case(
            task_id=id_of(row, id_field or "task_id") if has_id else content_id(prompt),
            prompt=prompt,
            reference=optional_text_of(row, reference_field, "reference"),
            language=language_named(language),
            scenario=optional_text_of(row, scenario_field, "scenario") or "",
            row=row,
        )

    return Task(
        name="fim",
        about="Any FIM file: prefix and suffix, with path, reference, language and scenario where given. The model "
        "family's own order and header lines, greedy, nothing cut from the completion.",
        read=read,
        options=FimOptions(frame_empty_suffix=True),
        sampling=SamplingParams(max_new_tokens=512),
        finish=_as_it_is,
        predict=completion_row,
        metrics=_TEXT_METRICS,
    )


# ---- HumanEval-Infilling -------------------------------------------------------------------------------------------


def _humaneval_infilling(scenario: str) -> Task:
    def read(row: Row) -> Case:
        prompt = FimPrompt(text_of(row, "prompt"), text_of(row, "suffix"))
        reference = optional_text_of(row, None, "canonical_solution")
        return Case(id_of(row, "task_id"), prompt, reference, "python", scenario, row)

    def program(case: Case, completion: str) -> str:
        row = case.row
        return f"{row['prompt']}{completion}{row['suffix']}\n{row['test']}\ncheck({row['entry_point']})"

    return Task(
        name=f"humaneval-infilling-{scenario}",
        about="HumanEval-Infilling (openai/human-eval-infilling; Bavarian et al. 2022, arXiv:2207.14255): no "
        "post-processing, pass@k. Order and number of samples are left to the evaluator there; here the model family's "
        "order and one greedy sample. Also where nothing follows the hole, the model is shown that it is a hole.",
        read=read,
        options=FimOptions(header="none", frame_empty_suffix=True),
        sampling=SamplingParams(max_new_tokens=512),
        finish=_as_it_is,
        predict=completion_row,
        metrics=("exact_match", "edit_similarity_difflib", "edit_similarity_indel", "edit_similarity_levenshtein"),
        program=program,
    )


# ---- SantaCoder FIM ------------------------------------------------------------------------------------------------


def _santacoder_fim() -> Task:
    def read(row: Row) -> Case:
        prompt = FimPrompt(text_of(row, "prompt"), text_of(row, "suffix"))
        language = language_named(text_of(row, "language"))
        task_id = id_of(row, "task_id") if "task_id" in row else f"{language}/{content_id(prompt)}"
        return Case(task_id, prompt, text_of(row, "canonical_solution"), language, "single_line", row)

    return Task(
        name="santacoder-fim",
        about="SantaCoder FIM (bigcode/santacoder-fim-task; bigcode-evaluation-harness, santacoder_fim.py): PSM, no "
        "header lines, greedy, exact match of the stripped texts per language. Rows have no id; they get a hash of "
        "prefix and suffix.",
        read=read,
        options=FimOptions(order="psm", header="none", frame_empty_suffix=True),
        sampling=SamplingParams(max_new_tokens=512),
        finish=_as_it_is,
        predict=lambda case, completion: {**completion_row(case, completion), "language": case.language},
        metrics=("exact_match", "edit_similarity_difflib", "edit_similarity_indel", "edit_similarity_levenshtein"),
    )


# ---- SAFIM ---------------------------------------------------------------------------------------------------------


def _safim(scenario: str, finish: Callable[[Case, str], str], metrics: tuple[str, ...]) -> Task:
    def read(row: Row) -> Case:
        language = text_of(row, "lang")
        if language not in _SAFIM_PLACEHOLDERS:
            raise ValueError(f"lang must be one of {', '.join(_SAFIM_PLACEHOLDERS)}, not {language!r}")
        prefix, suffix = _parts(row, "prompt", _SAFIM_PLACEHOLDERS[language])
        _parts(row, "eval_prompt", _SAFIM_HOLE)
        reference = text_of(row, "ground_truth")
        return Case(id_of(row, "task_id"), FimPrompt(prefix, suffix), reference, language, scenario, row)

    return Task(
        name=f"safim-{scenario}",
        about="SAFIM (gonglinyuan/safim; Gong et al. 2024, arXiv:2403.04814): mode infilling (PSM), temperature 0.2, "
        "top_p 0.95, 128 tokens, syntax-aware truncation. Block and control are judged by unit tests in four languages "
        "under ExecEval, which is not built in: give predictions.jsonl to SAFIM's evaluate.py for its pass@1.",
        read=read,
        options=FimOptions(order="psm", header="none", frame_empty_suffix=True),
        sampling=SamplingParams(max_new_tokens=128, temperature=0.2, top_p=0.95),
        finish=finish,
        predict=completion_row,
        metrics=metrics,
    )


def _parts(row: Row, field: str, separator: str) -> tuple[str, str]:
    parts = text_of(row, field).split(separator)
    if len(parts) != 2:
        raise ValueError(f"field {field!r} must have {separator!r} once, not {len(parts) - 1} times")
    return parts[0], parts[1]


def _finish_block(case: Case, text: str) -> str:
    before, after = _parts(case.row, "eval_prompt", _SAFIM_HOLE)
    return postprocess.truncate_line_until_block(case.language, before, after, text)


# ---- CrossCodeEval -------------------------------------------------------------------------------------------------


def _crosscodeeval(name: str, about: str, options: FimOptions, context: Callable[[Row, str], str]) -> Task:
    """context: the comment block before a row's prompt, given its language. A prompt framed as a hole has a suffix."""

    def read(row: Row) -> Case:
        metadata = row["metadata"]
        if not isinstance(metadata, Mapping):
            raise ValueError("field 'metadata' must be an object with task_id and file")
        path = text_of(metadata, "file")
        language = language_named(syntax.language_of(path))
        if language not in ("python", "java", "typescript", "csharp"):
            raise ValueError(f"metadata.file {path!r} is in none of CrossCodeEval's languages")
        prefix = context(row, language) + text_of(row, "prompt")
        suffix = text_of(row, "right_context") if options.frame_empty_suffix else ""
        prompt = FimPrompt(prefix, suffix, path)
        return Case(id_of(metadata, "task_id"), prompt, text_of(row, "groundtruth"), language, "line", row)

    def finish(case: Case, text: str) -> str:
        return postprocess.crosscodeeval_statement_bug_compatible(case.language, str(case.row["prompt"]), text)

    return Task(
        name=name,
        about=f"CrossCodeEval (amazon-science/cceval; Ding et al. 2023, arXiv:2310.11248): {about} Greedy, 50 tokens, "
        "cut to one statement. What exceeds the context is cut from the far ends of both sides, retrieved text first.",
        read=read,
        options=options,
        sampling=SamplingParams(max_new_tokens=50),
        finish=finish,
        predict=lambda case, completion: {"task_id": case.task_id, "pred": completion},
        metrics=("crosscodeeval_bug_compatible", "crosscodeeval", "edit_similarity_indel"),
    )


def _crosscodeeval_tasks() -> tuple[Task, ...]:
    fim, left = FimOptions(order="psm", frame_empty_suffix=True), FimOptions(header="none")
    as_aixcoder = "as aiXcoder-7B reports it, with the right context as suffix (PSM, 16K tokens),"
    as_paper = "left to right, as the paper has it,"
    retrieved = "of its crossfile_context field, from whichever retrieval the file is of."
    return (
        _crosscodeeval("crosscodeeval", f"{as_aixcoder} without retrieved context.", fim, lambda row, language: ""),
        _crosscodeeval(
            "crosscodeeval-bm25",
            f"{as_aixcoder} after the first {retrieval.TOP_K} pieces {retrieved}",
            fim,
            lambda row, language: retrieval.dataset_context(row, language, retrieval.TOP_K),
        ),
        _crosscodeeval("crosscodeeval-left", f"{as_paper} without retrieved context.", left, lambda row, language: ""),
        _crosscodeeval(
            "crosscodeeval-left-bm25", f"{as_paper} after the text {retrieved}", left, retrieval.dataset_context
        ),
    )


# ---- FIM-Eval ------------------------------------------------------------------------------------------------------


def _fim_eval(only: str | None) -> Task:
    """only: the language of a whole file; None reads a row's own `language`."""

    def read(row: Row) -> Case:
        if only is None and "language" not in row:
            raise ValueError(
                "there is no field 'language'; FIM-Eval's own files tell it by their name: name the task "
                + ", ".join(f"fim-eval-{language}" for language in _FIM_EVAL_PATHS)
            )
        language = only or language_named(text_of(row, "language"))
        if language not in _FIM_EVAL_PATHS:
            raise ValueError(f"language must be one of {', '.join(_FIM_EVAL_PATHS)}, not {language!r}")
        prompt = FimPrompt(text_of(row, "pre_mask_code"), text_of(row, "post_mask_code"), _FIM_EVAL_PATHS[language])
        scenario = text_of(row, "task_type")
        return Case(id_of(row, "task_id"), prompt, text_of(row, "canonical_solution"), language, scenario, row)

    return Task(
        name="fim-eval" if only is None else f"fim-eval-{only}",
        about="aiXcoder FIM-Eval (aixcoder-plugin/aiXcoder-FIM-Evaluation): PSM, language line but no path line, each "
        "side cut to 7,936 tokens, greedy, 512 tokens, cut at </s>. Both sides, header and control tokens together may "
        "exceed 16,384 tokens by a few: give a max_model_len of 16,640 so that nothing else is cut.",
        read=read,
        options=replace(load_preset("fim-eval"), frame_empty_suffix=True),
        sampling=SamplingParams(max_new_tokens=512),
        finish=lambda case, text: postprocess.cut_at(text, ("</s>",)),
        predict=lambda case, completion: {"task_id": case.task_id, "prediction": completion},
        metrics=_TEXT_METRICS,
    )


TASKS: dict[str, Task] = {
    each.name: each
    for each in (
        generic_task(),
        *map(_humaneval_infilling, ("single-line", "multi-line", "random-span", "random-span-light")),
        _santacoder_fim(),
        _safim("block", _finish_block, ("exact_match_verbatim", "exact_match", "edit_similarity_levenshtein")),
        _safim(
            "control",
            lambda case, text: postprocess.truncate_control(case.language, text),
            ("exact_match_verbatim", "exact_match", "edit_similarity_levenshtein"),
        ),
        _safim(
            "api",
            lambda case, text: postprocess.truncate_api_call(text),
            ("safim_syntax_match_bug_compatible", "safim_syntax_match", "exact_match_no_whitespace"),
        ),
        *_crosscodeeval_tasks(),
        *map(_fim_eval, (None, *_FIM_EVAL_PATHS)),
        nl2code.humaneval(),
        nl2code.mbpp(),
    )
}
"""Every task by its name."""
