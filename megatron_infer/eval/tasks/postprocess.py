"""What the benchmarks cut from a completion before they judge it.

Owns CUTS, the published cuts by name, among them SAFIM's truncators and CrossCodeEval's statement; and the removal of
line comments. Where an official cut has a bug, both ways are here, by name. Knows no metric.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from tree_sitter import Node

from megatron_infer.eval import syntax
from megatron_infer.eval.cases import Case, Row
from megatron_infer.eval.tasks.fields import text_of

SAFIM_HOLE = "{{completion}}"

_STATEMENT_ENDS = frozenset(";{}")
_STRING = r'"(?:[^"\\\n]|\\.)*"' + r"|'(?:[^'\\\n]|\\.)*'" + r"|`(?:[^`\\]|\\.)*`"
_LINE_COMMENTS = {mark: re.compile(f"({_STRING})|{mark}.*") for mark in ("#", "//")}
_HASH_OR_SLASHES = re.compile(r"#.*|//.*")

Trace = list[tuple[bool, str]]
"""Node types of a tree in the order of entering (True) and leaving (False) them."""


def cut_at(text: str, stops: Iterable[str]) -> str:
    """The text before the first of `stops` that appears in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def comment_mark(language: str) -> str:
    """What begins a line comment."""
    return "#" if language == "python" else "//"


def remove_line_comments(code: str, language: str) -> str:
    """The code without line comments; marks inside string literals begin none."""
    return _LINE_COMMENTS[comment_mark(language)].sub(lambda match: match[1] or "", code)


def remove_line_comments_bug_compatible(code: str, language: str = "") -> str:
    """As CrossCodeEval's scorer: from any `#` or `//` on, whatever the language, inside string literals too.

    Python's floor division and C#'s `#region` are lost by it. Source: eval_utils.py, `remove_comments`.
    """
    return _HASH_OR_SLASHES.sub("", code)


def crosscodeeval_statement(language: str, prompt: str, completion: str) -> str:
    """A completion cut to one statement.

    Python: the shortest part before a line break that completes `prompt` to a text without syntax error. Elsewhere: up
    to the first `;`, `{` or `}`. Uncut where there is no such place. Source: CrossCodeEval, `postprocess_code_lines`.
    """
    if language == "python":
        return _python_statement(prompt, completion)
    end = next((at for at, character in enumerate(completion) if character in _STATEMENT_ENDS), len(completion))
    return completion[: end + 1]


def crosscodeeval_statement_bug_compatible(language: str, prompt: str, completion: str) -> str:
    """As CrossCodeEval's scorer: outside Python, a completion that begins with `;`, `{` or `}` is not cut at all.

    For Python there is nothing to reproduce: its scorer looks one character past the end, and what it then swallows
    and returns, the whole completion, is what it returns without that.
    """
    if language != "python" and completion[:1] in _STATEMENT_ENDS:
        return completion
    return crosscodeeval_statement(language, prompt, completion)


def truncate_line_until_block(language: str, before: str, after: str, completion: str) -> str:
    """A completion less as many last lines as it takes until it fills the hole with one block and no more.

    Filled in between `before` and `after`, it must have no syntax error, and the tree around it must be that of the
    empty hole (in Python, of `pass`). Where the file with the empty hole has an error itself there is nothing to
    compare with, and the completion stays whole. Source: SAFIM, prompt_utils.py.
    """
    placeholder = "pass" if language == "python" else ""
    empty = _trace(language, before + placeholder + after)
    if empty is None:
        return completion
    placeholder_events = 4 if language == "python" else 0  # pass_statement and its keyword, entered and left
    lines = completion.splitlines(keepends=True)
    while lines:
        filled = _trace(language, before + "".join(lines) + after)
        if filled is not None and len(empty) <= len(filled):
            head, tail = _common_ends(empty, filled)
            if len(empty) - head - tail == placeholder_events:
                break
        lines.pop()
    return "".join(lines)


def truncate_control(language: str, completion: str) -> str:
    """Python: the first line that is not blank. Elsewhere: what comes before the first unmatched `)`. Source: SAFIM."""
    if language == "python":
        return next((line for line in completion.splitlines() if line.strip()), "")
    depth = 0
    for at, character in enumerate(completion):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return completion[:at]
    return completion


def truncate_api_call(completion: str) -> str:
    """Up to and with the `)` that closes the first call, or that was never opened. Source: SAFIM, prompt_utils.py."""
    depth = 0
    for at, character in enumerate(completion):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == ")" and depth <= 0:
            return completion[: at + 1]
    return completion


def _python_statement(prompt: str, completion: str) -> str:
    at = completion.find("\n", 1)
    while at >= 0:
        if not _has_error_node(syntax.parse("python", prompt + completion[:at]).root_node):
            return completion[:at].rstrip()
        at = completion.find("\n", at + 1)
    return completion


def _has_error_node(root: Node) -> bool:
    """Whether there is an ERROR node. A MISSING node is none: CrossCodeEval's scorer does not look for those."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.is_error:
            return True
        nodes += [child for child in node.children if child.has_error]
    return False


def _trace(language: str, text: str) -> Trace | None:
    """The trace of a text's tree, or None if it has a syntax error. An ERROR of a mere `;` is none, as in SAFIM."""
    source = syntax.encode(text)
    cursor = syntax.parser(language).parse(source).walk()
    trace: Trace = []
    while True:
        node = cursor.node
        assert node is not None
        trace.append((True, node.type))
        if node.is_error:
            if source[node.start_byte : node.end_byte] != b";":
                return None
        elif cursor.goto_first_child():
            continue
        trace.append((False, node.type))
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return trace
            assert cursor.node is not None
            trace.append((False, cursor.node.type))


def _common_ends(empty: Sequence[tuple[bool, str]], filled: Sequence[tuple[bool, str]]) -> tuple[int, int]:
    """Lengths of the common head and of the common tail, which may overlap."""
    limit = min(len(empty), len(filled))
    head = next((i for i in range(limit) if empty[i] != filled[i]), limit)
    tail = next((i for i in range(limit) if empty[-1 - i] != filled[-1 - i]), limit)
    return head, tail


def parts(row: Row, field: str, separator: str) -> tuple[str, str]:
    """A field's text before and after `separator`. Raises ValueError where that is not there once."""
    found = text_of(row, field).split(separator)
    if len(found) != 2:
        raise ValueError(f"field {field!r} must have {separator!r} once, not {len(found) - 1} times")
    return found[0], found[1]


def first_line(text: str) -> str:
    """The first line; the second where the text begins with a line break, or with a space and one."""
    return text.split("\n")[text.startswith(("\n", " \n"))]


def as_many_lines(text: str, reference: str) -> str:
    """As many lines that are not blank as the reference has, without the blank ones."""
    num_lines = sum(1 for line in reference.split("\n") if line.strip())
    return "\n".join([line for line in text.split("\n") if line.strip()][:num_lines])


CUTS: dict[str, Callable[[Case, str], str]] = {
    "whole": lambda case, text: text,
    "openai": lambda case, text: text,
    "bigcode": lambda case, text: cut_at(text, ("<|endoftext|>",)),
    "qwen": lambda case, text: first_line(text),
    "qwen-lines": lambda case, text: as_many_lines(text, case.reference or ""),
    "safim-block": lambda case, text: truncate_line_until_block(
        case.language, *parts(case.row, "eval_prompt", SAFIM_HOLE), text
    ),
    "safim-control": lambda case, text: truncate_control(case.language, text),
    "safim-api": lambda case, text: truncate_api_call(text),
    "cceval": lambda case, text: crosscodeeval_statement_bug_compatible(case.language, str(case.row["prompt"]), text),
    "cceval-meant": lambda case, text: crosscodeeval_statement(case.language, str(case.row["prompt"]), text),
    "fim-eval": lambda case, text: cut_at(text, ("</s>",)),
}
"""The published cuts by name; tasks.json says what each does. Those at a task's stop strings are its own."""
