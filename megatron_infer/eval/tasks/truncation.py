"""Truncation rules by name: how much of what a model wrote is judged. One run can be judged under several.

raw, line, suffix and ending suit any benchmark; to these come the cuts that a benchmark's figures were published with
(postprocess.py), of which `official` is the first. Works on rows of completions.jsonl; knows no metric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_infer.ending.ending import find_end
from megatron_infer.ending.hole import Hole
from megatron_infer.ending.scanner import syntax_of
from megatron_infer.eval.cases import Case, Task
from megatron_infer.eval.tasks.registry import CUTS_ABOUT

OFFICIAL = "official"
GENERAL = {
    "raw": "all that the model wrote",
    "line": "up to the end of the first line that is not blank",
    "suffix": "up to where the first line of the suffix that is not blank comes again",
    "ending": "as run --ending auto ends it (docs/endings.md)",
}
_FIRST_LINE = re.compile(r"\s*[^\n]*\n?")


def rules_of(text: str, task: Task) -> tuple[str, ...]:
    """The rules that --truncate names. Raises ValueError, with the names there are, for any other."""
    known = (OFFICIAL, *GENERAL, *task.cuts)
    rules = tuple(dict.fromkeys(rule.strip() for rule in text.split(",")))
    for rule in rules:
        if rule not in known:
            raise ValueError(f"there is no truncation {rule!r} for task {task.name!r}; known are {', '.join(known)}")
    return rules


def about(rule: str, task: Task) -> str:
    """What a rule does."""
    if rule == OFFICIAL:
        return f"{task.official_cut}: {CUTS_ABOUT[task.official_cut]}"
    return GENERAL.get(rule) or CUTS_ABOUT[rule]


def raw_text(row: Mapping[str, Any]) -> str:
    """All that the model wrote; where a run has an --ending, the answer is only the beginning of it."""
    raw = row.get("raw_text")
    return str(row["text"] if raw is None else raw)


def truncate(rule: str, task: Task, case: Case, row: Mapping[str, Any]) -> str:
    """What a rule leaves of a completion. The published cuts are made on the answer, as their harnesses do."""
    if rule not in GENERAL:
        return task.finish(case, row["text"]) if rule == OFFICIAL else task.cuts[rule](case, row["text"])
    text, prompt = raw_text(row), case.prompt
    if rule == "ending":
        is_complete = row["finish_reason"] != "length"
        return find_end(prompt.prefix, prompt.suffix, text, case.language, is_complete=is_complete)[0]
    if rule == "raw":
        return text
    hole = Hole(prompt.prefix, prompt.suffix, syntax_of(case.language))
    return _first_line(text, hole) if rule == "line" else _before_suffix(text, hole)


def _first_line(text: str, hole: Hole) -> str:
    match = _FIRST_LINE.match(text)
    assert match is not None
    return _closed(match[0], hole)


def _before_suffix(text: str, hole: Hole) -> str:
    first = hole.below[0].strip() if hole.below else None
    kept = 0
    for line in text.splitlines(keepends=True):
        if line.strip() == first:
            return _closed(text[:kept], hole)
        kept += len(line)
    return text


def _closed(kept: str, hole: Hole) -> str:
    """What is cut keeps its last line break where the suffix goes on with a line of its own, and only there."""
    return kept if hole.is_whole_lines else kept.removesuffix("\n").removesuffix("\r")
