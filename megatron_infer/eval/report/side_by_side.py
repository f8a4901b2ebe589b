"""Single cases as the report shows them: what stood in the hole beside what the model wrote, with their differences.

Owns the cutting of long texts, the marking of differences, and that no character of a text can hide another one.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infer.eval.cases import Case

MAX_CASES = 200
_BEFORE_LINES, _AFTER_LINES = 12, 8
_CONTEXT_CHARACTERS = 2000
_TEXT_CHARACTERS = 6000
_DIFF_TOKENS = 3000
"""Longer pairs are shown without marks: difflib takes quadratic time."""

_TOKEN = re.compile(r"\n|[^\S\n]+|\w+|[^\w\s]")

Row = Mapping[str, Any]
Pieces = tuple[tuple[str, bool], ...]
"""Consecutive pieces of a text, each with whether the other text lacks it."""


@dataclass(frozen=True)
class Answer:
    """One completion of a case. reference: the reference's pieces beside it. removed: what the truncation cut off."""

    completion: Pieces
    removed: str
    finish_reason: str
    reference: Pieces
    metrics: tuple[tuple[str, str], ...]
    outcome: str
    error: str
    test: str


@dataclass(frozen=True)
class CaseView:
    """A case to show. answers: of the run and, where there is one, of the run it is compared with."""

    task_id: str
    language: str
    scenario: str
    path: str
    before: str
    after: str
    has_reference: bool
    answers: tuple[Answer, ...]


def view(case: Case, rows: Sequence[tuple[Row, str]], columns: Sequence[Row]) -> CaseView:
    """A case with, per run, a row of scores.jsonl and all that the model wrote."""
    before = "".join(case.prompt.prefix.splitlines(keepends=True)[-_BEFORE_LINES:])[-_CONTEXT_CHARACTERS:]
    after = "".join(case.prompt.suffix.splitlines(keepends=True)[:_AFTER_LINES])[:_CONTEXT_CHARACTERS]
    return CaseView(
        task_id=visible(case.task_id), language=visible(case.language), scenario=visible(case.scenario),
        path=visible(case.prompt.path), before=visible(before), after=visible(after),
        has_reference=case.reference is not None, answers=tuple(_answer(case, row, raw, columns) for row, raw in rows),
    )  # fmt: skip


def outcome_column(columns: Sequence[Row]) -> str:
    """The value of a row by which the report says right or wrong: of the tests, else of the first column, if any."""
    first = str(columns[0]["name"]) if columns else ""
    return "passed" if first.startswith("pass@") else first


def _answer(case: Case, row: Row, raw: str, columns: Sequence[Row]) -> Answer:
    at = raw.find(row["completion"])
    removed = raw[at + len(row["completion"]) :] if at >= 0 else ""
    completion, reference = _cut(row["completion"]), _cut(case.reference or "")
    if case.reference is None:
        pieces: tuple[Pieces, Pieces] = ((), ((visible(completion), False),))
    else:
        pieces = differences(visible(reference), visible(completion))
    test = row.get("test") or {"status": "", "error": ""}
    return Answer(
        completion=pieces[1], removed=visible(_cut(removed)), finish_reason=row["finish_reason"], reference=pieces[0],
        metrics=tuple(_shown_metrics(row["metrics"], columns)), outcome=_outcome(row, columns),
        error=visible(row["error"] or ""),
        test=visible(": ".join(part for part in (test["status"].replace("_", " "), test["error"]) if part)),
    )  # fmt: skip


def _outcome(row: Row, columns: Sequence[Row]) -> str:
    if row["error"] is not None:
        return "error"
    value = row["metrics"].get(outcome_column(columns))
    if value is None or columns[0]["full"] is None:
        return "unscored"
    return "right" if value >= columns[0]["full"] else "wrong"


def _shown_metrics(metrics: Mapping[str, float | None], columns: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The shares among a row's metrics, in percent; pass@k is no property of one completion."""
    for column in columns:
        value = metrics.get(column["name"])
        if value is not None and column["full"] is not None:
            yield column["name"], f"{100 * value / column['full']:.1f}"


def differences(first: str, second: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, token by token; marked are those that difflib does not find in the other one."""
    tokens = _TOKEN.findall(first), _TOKEN.findall(second)
    if max(map(len, tokens)) > _DIFF_TOKENS:
        return ((first, False),), ((second, False),)
    pieces: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = difflib.SequenceMatcher(None, tokens[0], tokens[1], autojunk=False)
    for kind, begin, end, begin_second, end_second in matcher.get_opcodes():
        for side, part in enumerate((tokens[0][begin:end], tokens[1][begin_second:end_second])):
            if part:
                pieces[side].append(("".join(part), kind != "equal"))
    return tuple(pieces[0]), tuple(pieces[1])


def visible(text: str) -> str:
    """The text with characters shown that would not show, or would reorder or hide others: controls, bidi, surrogates.

    Source for what to show: Boucher and Anderson 2021, Trojan Source, arXiv:2111.00169.
    """
    return "".join(char if char in "\n\t" or _shows(char) else _shown(char) for char in text)


def _shows(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _shown(char: str) -> str:
    return "␍" if char == "\r" else f"⟨U+{ord(char):04X}⟩"


def _cut(text: str) -> str:
    if len(text) <= _TEXT_CHARACTERS:
        return text
    return f"{text[:_TEXT_CHARACTERS]}\n… and {len(text) - _TEXT_CHARACTERS} more characters"
