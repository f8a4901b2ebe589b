"""Truncation rules: what each leaves of a text, and that the text still fits between prefix and suffix."""

from __future__ import annotations

import random

import pytest

from megatron_infer.ending.ending import find_end
from megatron_infer.eval.cases import Case
from megatron_infer.eval.tasks.postprocess import CUTS
from megatron_infer.eval.tasks.registry import CUTS_ABOUT, TASKS, task
from megatron_infer.eval.tasks.truncation import GENERAL, about, rules_of, truncate
from megatron_infer.text.fim import FimPrompt


def cut(rule: str, prefix: str, suffix: str, text: str, finish_reason: str = "stop", name: str = "fim") -> str:
    case = Case("c", FimPrompt(prefix, suffix), "", "python")
    return truncate(rule, task(name), case, {"text": text, "finish_reason": finish_reason})


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "expected"),
    [
        # The suffix goes on with a line of its own: the line break stays.
        ("def f(x):\n", "    return y\n", "    y = x\n    return y\n", "    y = x\n"),
        ("def f(x):\n", "    return y\n", "\n    y = x\n    return y\n", "\n    y = x\n"),
        # The prefix lacks its own line break, as in SantaCoder's rows.
        ("def f(x):", "    return y\n", "\n    y = x\n    return y\n", "\n    y = x\n"),
        # The line break is the suffix's.
        ("    return ", "\n\nx = 1\n", "y\nz\n", "y"),
        ("    else:", "\n", "\n        return False\n\nmore", "\n        return False"),
        ("    return ", "\r\n", "y\r\nz\r\n", "y"),
        # Nothing to cut, nothing follows, nothing there.
        ("x = ", "\n", "1", "1"),
        ("x = ", "", "1\ny = 2\n", "1"),
        ("x = ", "\n", " \n ", " \n "),
        ("x = ", "\n", "", ""),
    ],
)
def test_line_keeps_the_line_break_that_the_hole_needs(prefix: str, suffix: str, text: str, expected: str) -> None:
    assert cut("line", prefix, suffix, text) == expected


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "expected"),
    [
        ("def f(x):\n", "    return y\n", "    y = x\n    return y\n", "    y = x\n"),
        ("def f(x):\n", "\n    return y\n", "    y = x\n  return y\nmore", "    y = x"),
        ("a\n", "b\nc\n", "x\ny\n", "x\ny\n"),
        ("a\n", "b\n", "b\nx\n", ""),
        ("f(", ")\nnext()\n", "1)\nnext()\n", "1)"),
        ("a\n", "", "x\ny\n", "x\ny\n"),
        ("a\n", "  \n\n", "x\n\ny\n", "x\n\ny\n"),
    ],
)
def test_suffix_cuts_where_the_suffix_begins_again(prefix: str, suffix: str, text: str, expected: str) -> None:
    assert cut("suffix", prefix, suffix, text) == expected


def test_ending_is_the_engines_own() -> None:
    prefix, suffix, text = "def f(x):\n    y = 1\n", "    return y\n", "    y += x\n    return y\n\nprint(f(1))\nif"
    for reason in ("stop", "length"):
        expected, _ = find_end(prefix, suffix, text, "python", is_complete=reason == "stop")
        assert cut("ending", prefix, suffix, text, reason) == expected == "    y += x\n"


def test_every_rule_leaves_a_beginning_of_what_was_written() -> None:
    rng = random.Random(7)
    pieces = ["x", "\n", " ", "return y", "\r\n", "(", ")", "    ", "\u2028", "é"]
    for _ in range(300):
        prefix, suffix, text = ("".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(3))
        for rule in ("raw", "line", "suffix"):
            assert text.startswith(cut(rule, prefix, suffix, text)), (rule, prefix, suffix, text)


def test_first_lines_as_qwen_takes_them() -> None:
    for text, expected in (("a\nb", "a"), ("\na\nb", "a"), (" \na\nb", "a"), ("  \na", "  "), ("\n", ""), ("", "")):
        assert cut("qwen", "", "", text, name="santacoder-fim") == expected


def test_as_many_lines_as_the_reference_has() -> None:
    case = Case("c", FimPrompt(""), "a\n\n  b\n")
    assert CUTS["qwen-lines"](case, "\nx\n\n y\nz") == "x\n y"


def test_official_is_the_first_published_cut_and_all_have_words() -> None:
    for name, each in TASKS.items():
        rules = rules_of(",".join(("official", *GENERAL, *each.cuts)), each)
        assert all(about(rule, each) for rule in rules), name
        assert about("official", each).startswith(each.official_cut)
        assert not set(each.cuts) - CUTS_ABOUT.keys()
    assert list(task("santacoder-fim").cuts) == ["bigcode", "qwen"]
    assert list(task("crosscodeeval").cuts) == ["cceval", "cceval-meant"]
