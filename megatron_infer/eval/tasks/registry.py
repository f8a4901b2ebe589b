"""TASKS: the benchmarks' fields, prompts, settings, cuts and output rows, as their own harnesses have them.

Owns what a row's fields mean; what is no program stands in tasks.json. The prompt's layout is fim.py's, the cuts are
postprocess.py's, the scores metrics.py's. A benchmark has several tasks where its harness has several settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_infer.eval import syntax
from megatron_infer.eval.cases import Case, Row, Task
from megatron_infer.eval.tasks import retrieval
from megatron_infer.eval.tasks.fields import content_id, id_of, language_named, optional_text_of, text_of
from megatron_infer.eval.tasks.postprocess import CUTS, SAFIM_HOLE, cut_at, parts
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt, load_preset

_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))
CUTS_ABOUT: dict[str, str] = _DATA["cuts"]
"""What each published cut does, and where it was published."""
FIELDS: dict[str, str] = _DATA["fields"]
"""Options that name the fields of the task `fim`, and what these hold."""

_SAFIM_PLACEHOLDERS = {"python": "# TODO: Your code here"} | dict.fromkeys(
    ("java", "cpp", "csharp"), "/* TODO: Your code here */"
)
_FIM_EVAL_PATHS = {"python": "test.py", "java": "test.java", "cpp": "test.cpp", "javascript": "test.js"}


def task(name: str) -> Task:
    """A task by its name. Raises ValueError, with the names there are, for any other."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name]


def generic_task(**fields: str) -> Task:
    """The task `fim` over rows with other names for some of FIELDS."""
    return _make("fim", "", lambda kind, row: _read_fim(kind, row, fields))


# ---- rows to cases: kind is what a task's name adds to that of its benchmark ----------------------------------------


def _read_fim(kind: str, row: Row, fields: Mapping[str, str] = MappingProxyType({})) -> Case:
    """A row with a prefix, a suffix and any field names: `fields` has those of FIELDS that are not the usual ones.

    A field that is named there must be in the row. Without a language, the path's extension tells it. The id falls back
    on a hash of path, prefix and suffix: it stays the same when lines are added, dropped or reordered, which a line
    number would not.
    """

    def optional(name: str) -> str | None:
        return optional_text_of(row, fields.get(f"{name}_field"), name)

    prompt = FimPrompt(
        prefix=text_of(row, fields.get("prefix_field", "prefix")),
        suffix=text_of(row, fields.get("suffix_field", "suffix")),
        path=optional("path") or "",
        repository=optional("repository") or "",
    )
    id_field = fields.get("id_field", "task_id")
    has_id = "id_field" in fields or "task_id" in row
    return Case(
        task_id=id_of(row, id_field) if has_id else content_id(prompt), prompt=prompt, reference=optional("reference"),
        language=language_named(optional("language") or syntax.language_of(prompt.path)),
        scenario=optional("scenario") or "", row=row,
        cluster=f"{prompt.repository}/{prompt.path}" if prompt.path else "",
    )  # fmt: skip


def _read_humaneval_infilling(kind: str, row: Row) -> Case:
    prompt = FimPrompt(text_of(row, "prompt"), text_of(row, "suffix"))
    reference = optional_text_of(row, None, "canonical_solution")
    problem = re.search(r"HumanEval/\d+", str(row["task_id"]))
    return Case(id_of(row, "task_id"), prompt, reference, "python", kind, row, problem[0] if problem else "")


def _read_santacoder_fim(kind: str, row: Row) -> Case:
    prompt = FimPrompt(text_of(row, "prompt"), text_of(row, "suffix"))
    language = language_named(text_of(row, "language"))
    name = id_of(row, "name") if "name" in row else content_id(prompt)
    task_id = id_of(row, "task_id") if "task_id" in row else f"{language}/{name}"
    problem, _, _ = task_id.rpartition("-L")  # what follows is the line of the hole
    return Case(task_id, prompt, text_of(row, "canonical_solution"), language, "single_line", row, problem)


def _read_safim(kind: str, row: Row) -> Case:
    language = text_of(row, "lang")
    if language not in _SAFIM_PLACEHOLDERS:
        raise ValueError(f"lang must be one of {', '.join(_SAFIM_PLACEHOLDERS)}, not {language!r}")
    prefix, suffix = parts(row, "prompt", _SAFIM_PLACEHOLDERS[language])
    parts(row, "eval_prompt", SAFIM_HOLE)
    return Case(id_of(row, "task_id"), FimPrompt(prefix, suffix), text_of(row, "ground_truth"), language, kind, row)


def _metadata_of(row: Row) -> Row:
    metadata: object = row["metadata"]
    if not isinstance(metadata, Mapping):
        raise ValueError("field 'metadata' must be an object, with task_id and more")
    return metadata


def _read_repoeval(kind: str, row: Row) -> Case:
    metadata = _metadata_of(row)
    prompt, path = FimPrompt(text_of(row, "prompt") + "\n"), "/".join(metadata.get("fpath_tuple") or ())
    task_id, reference = id_of(metadata, "task_id"), text_of(metadata, "ground_truth")
    return Case(task_id, prompt, reference, "python", kind, row, path)


def _read_crosscodeeval(kind: str, row: Row) -> Case:
    """Also the cross-file context that comes with the row, as a comment block before its prompt."""
    metadata = _metadata_of(row)
    path = text_of(metadata, "file")
    language = language_named(syntax.language_of(path))
    if language not in ("python", "java", "typescript", "csharp"):
        raise ValueError(f"metadata.file {path!r} is in none of CrossCodeEval's languages")
    is_left, has_context = kind.startswith("left"), kind.endswith("bm25")
    top_k = None if is_left else retrieval.TOP_K
    context = retrieval.dataset_context(row, language, top_k) if has_context else ""
    prompt = FimPrompt(context + text_of(row, "prompt"), "" if is_left else text_of(row, "right_context"), path)
    task_id, reference = id_of(metadata, "task_id"), text_of(row, "groundtruth")
    return Case(task_id, prompt, reference, language, "line", row, f"{metadata.get('repository', '')}/{path}")


def _read_fim_eval(kind: str, row: Row) -> Case:
    if not kind and "language" not in row:
        raise ValueError(
            "there is no field 'language'; FIM-Eval's own files tell it by their name: name the task "
            + ", ".join(f"fim-eval-{language}" for language in _FIM_EVAL_PATHS)
        )
    language = kind or language_named(text_of(row, "language"))
    if language not in _FIM_EVAL_PATHS:
        raise ValueError(f"language must be one of {', '.join(_FIM_EVAL_PATHS)}, not {language!r}")
    prompt = FimPrompt(text_of(row, "pre_mask_code"), text_of(row, "post_mask_code"), _FIM_EVAL_PATHS[language])
    scenario = text_of(row, "task_type")
    return Case(id_of(row, "task_id"), prompt, text_of(row, "canonical_solution"), language, scenario, row)


def _read_text(kind: str, row: Row) -> Case:
    text, path = text_of(row, "text"), optional_text_of(row, None, "path") or ""
    task_id = id_of(row, "task_id") if "task_id" in row else content_id(FimPrompt(text, path=path))
    return Case(task_id, FimPrompt(""), text, language_named(syntax.language_of(path)), "", row, path)


def _read_humaneval(kind: str, row: Row) -> Case:
    """HumanEval of the Codex paper."""
    reference = optional_text_of(row, None, "canonical_solution")
    return Case(id_of(row, "task_id"), FimPrompt(text_of(row, "prompt")), reference, "python", "function", row)


def _humaneval_program(case: Case, completion: str) -> str:
    """Prompt, completion and tests."""
    row = case.row
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def _infilling_program(case: Case, completion: str) -> str:
    """The same with what follows the hole."""
    return _humaneval_program(case, completion + case.row["suffix"])


def _read_mbpp(kind: str, row: Row) -> Case:
    """MBPP, the full file or the sanitized one."""
    description = text_of(row, "text" if "text" in row else "prompt")
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' must be a list of at least one assertion")
    prompt = FimPrompt(f'"""\n{description}\n{tests[0]}\n"""\n')
    return Case(id_of(row, "task_id"), prompt, optional_text_of(row, None, "code"), "python", "function", row)


def _mbpp_program(case: Case, completion: str) -> str:
    """The row's own set-up stands between the answer and all its tests."""
    row = case.row
    setup = [*(row.get("test_imports") or ()), row.get("test_setup_code")]
    return "\n".join([case.prompt.prefix + completion, *(line for line in setup if line), *row["test_list"]])


_READERS: dict[str, Callable[[str, Row], Case]] = {
    "fim": _read_fim, "humaneval-infilling": _read_humaneval_infilling, "santacoder-fim": _read_santacoder_fim,
    "safim": _read_safim, "crosscodeeval": _read_crosscodeeval, "repoeval": _read_repoeval, "fim-eval": _read_fim_eval,
    "humaneval": _read_humaneval, "mbpp": _read_mbpp, "text": _read_text,
}  # fmt: skip
_PROGRAMS = {
    "humaneval-infilling": _infilling_program,
    "humaneval": _humaneval_program,
    "mbpp": _mbpp_program,
}


# ---- tasks ---------------------------------------------------------------------------------------------------------


def _name(family: str, kind: str) -> str:
    return f"{family}-{kind}" if kind else family


_IDS = {
    _name(family, kind): own["ids"]
    for family, shared in _DATA["families"].items()
    for kind, own in shared["tasks"].items()
    if "ids" in own
}
"""How the ids of a task's own data begin."""


def _make(family: str, kind: str, read: Callable[[str, Row], Case]) -> Task:
    shared = _DATA["families"][family]
    entry = {**shared, **shared["tasks"][kind]}
    name = _name(family, kind)

    def checked(row: Row) -> Case:
        case = read(kind, row)
        others = [other for other, start in _IDS.items() if case.task_id.startswith(start)]
        if others and name in _IDS and name not in others:
            raise ValueError(f"task_id {case.task_id!r} is of the task {others[0]!r}, not of {name!r}; check --data")
        return case

    sampling = SamplingParams(**entry["sampling"])

    def at_stop_strings(case: Case, text: str) -> str:
        return cut_at(text, sampling.stop)

    return Task(
        name=name, about=entry["about"].format(variant=entry.get("variant", "")), read=checked,
        options=replace(load_preset(entry["preset"]) if "preset" in entry else FimOptions(), **entry["options"]),
        sampling=sampling, cuts={cut: CUTS.get(cut, at_stop_strings) for cut in entry["cuts"]},
        metrics=tuple(entry["metrics"]), output=tuple(entry.get("output", ("completion",))),
        program=_PROGRAMS.get(family), source=entry["source"], licence=entry.get("licence", ""),
        files=entry.get("files", {}),
    )  # fmt: skip


TASKS: dict[str, Task] = {
    _name(family, kind): _make(family, kind, _READERS[family])
    for family, shared in _DATA["families"].items()
    for kind in shared["tasks"]
}
"""Every task by its name."""
