"""The identifiers of a piece of code and how far two lists of them agree, as CrossCodeEval counts them.

Works on text alone: string literals are dropped, keywords are no identifiers. Knows no task.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"' + r"|'[^'\\]*(?:\\.[^'\\]*)*'")
_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"[_a-zA-Z]")

_WORDS = {
    "java": "abstract assert boolean break byte case catch char class continue default do double else enum "
    "extends final finally float for if implements import instanceof int interface long native new "
    "package private protected public return short static strictfp super switch synchronized this throw "
    "throws transient try void volatile while var const goto",
    "csharp": "abstract as base bool break byte case catch char checked class const continue decimal default "
    "delegate do double else enum event explicit extern finally fixed float for foreach goto if implicit "
    "in int interface internal is lock long namespace new null object operator out override params "
    "private protected public readonly ref return sbyte sealed short sizeof stackalloc static string "
    "struct switch this throw try typeof uint ulong unchecked unsafe ushort using virtual void volatile "
    "while",
    "javascript": "break case catch class const continue debugger default delete do else export extends finally for "
    "function if import in instanceof new return super switch this throw try typeof var void while with "
    "yield enum implements interface let package private protected public static",
}
_KEYWORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_KEYWORDS |= {"typescript": _KEYWORDS["javascript"], "python": frozenset(keyword.kwlist) - {"True", "False"}}
"""The lists of CrossCodeEval (scripts/keywords, after microsoft/dpu-utils). Literals such as true are not in them."""

IDENTIFIER_LANGUAGES = tuple(_KEYWORDS)
"""Languages whose keywords are known."""


def identifiers(code: str, language: str) -> list[str]:
    """Words outside string literals that begin as an identifier and are no keyword, in order, repeated if repeated.

    Raises KeyError for a language that is not in IDENTIFIER_LANGUAGES. Source: CrossCodeEval, eval_utils.py.
    """
    words = _WORD.findall(_STRING.sub("", code))
    return [word for word in words if _FIRST.match(word) and word not in _KEYWORDS[language]]


def match_identifiers(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """How far predicted identifiers agree with the expected ones, each value in [0, 1].

    identifier_exact_match: 1 if both lists are equal, order and repetitions included. The rest is over the sets, and 0
    where the divisor is 0. Source: CrossCodeEval, eval_metric.py.
    """
    found, wanted = set(predicted), set(expected)
    common = len(found & wanted)
    return {
        "identifier_exact_match": float(list(predicted) == list(expected)),
        "identifier_precision": common / len(found) if found else 0.0,
        "identifier_recall": common / len(wanted) if wanted else 0.0,
        "identifier_f1": 2 * common / (len(found) + len(wanted)) if found or wanted else 0.0,
    }
