"""METRICS: what a prediction is worth beside its reference, each definition under a name that says which one it is.

Owns exact match, edit similarity, the scores of CrossCodeEval and SAFIM, length, and pass@k; BLEU is bleu.py's. Knows
no task. A `_bug_compatible` metric reproduces published numbers; the one without the ending is what was meant.
"""

from __future__ import annotations

import ast
import difflib
import json
import keyword
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from megatron_infer.eval.cases import Case
from megatron_infer.eval.score import bleu
from megatron_infer.eval.tasks import postprocess

_SPACE = re.compile(r"\s+")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"' + r"|'[^'\\]*(?:\\.[^'\\]*)*'")
_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"[_a-zA-Z]")

_WORDS: dict[str, str] = json.loads(Path(__file__).with_name("keywords.json").read_text(encoding="utf-8"))
_KEYWORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_KEYWORDS |= {"typescript": _KEYWORDS["javascript"], "python": frozenset(keyword.kwlist) - {"True", "False"}}
"""The lists of CrossCodeEval (scripts/keywords, after microsoft/dpu-utils). Literals such as true are not in them."""


@dataclass(frozen=True)
class Metric:
    """One way to judge one prediction.

    about: the definition and its source. values: the names of what `function` returns, unique among all metrics, each
    with the value of a perfect prediction, 1 or 100, or None where it is no share of anything.
    function: a case and the post-processed prediction to values by name, or None where the metric does not apply: the
    case has no reference, or the language is not supported.
    """

    name: str
    about: str
    values: Mapping[str, float | None]
    function: Callable[[Case, str], dict[str, float] | None]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Computed in whole numbers and rounded once. Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    Raises ValueError for fewer than k samples, where no unbiased estimate exists.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct of {num_samples} samples is impossible")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples per case and k >= 1; there are {num_samples}")
    total = math.comb(num_samples, k)
    return (total - math.comb(num_samples - num_correct, k)) / total


def likelihood(log_probabilities: Sequence[float], text: str) -> dict[str, float]:
    """Of a text's tokens, one by one: their sum, that per token and, in bits, per character of `text`."""
    total, num_tokens = math.fsum(log_probabilities), len(log_probabilities)
    return {
        "log_probability": total, "log_probability_per_token": total / num_tokens,
        "bits_per_character": -total / math.log(2) / len(text), "reference_tokens": float(num_tokens),
    }  # fmt: skip


def edit_similarity_difflib(prediction: str, reference: str) -> float:
    """`fuzz.ratio` of pure-Python fuzzywuzzy, a whole number from 0 to 100, of the stripped texts.

    Twice the characters in difflib's matching blocks over all characters. It is not symmetric, and of texts from 200
    characters on difflib leaves frequent characters out of account. Source: CrossCodeEval, `cal_edit_sim`.
    """
    prediction, reference = prediction.strip(), reference.strip()
    if prediction == reference:
        return 100.0
    return float(round(100 * difflib.SequenceMatcher(None, prediction, reference).ratio()))


def edit_similarity_indel(prediction: str, reference: str) -> float:
    """`fuzz.ratio` of rapidfuzz, from 0 to 100, of the stripped texts; thefuzz rounds it to a whole number.

    1 - insertions and deletions over all characters: twice the longest common subsequence.
    """
    return fuzz.ratio(prediction.strip(), reference.strip())


def edit_similarity_levenshtein(prediction: str, reference: str) -> float:
    """100 * (1 - Levenshtein distance / length of the longer text), of the stripped texts.

    The formula of RepoEval, whose scorer first strips each line, drops empty ones, and cuts the prediction to as many
    lines as the reference has. Two empty texts are equal: 100.
    """
    prediction, reference = prediction.strip(), reference.strip()
    longer = max(len(prediction), len(reference))
    return 100 * (1 - Levenshtein.distance(prediction, reference) / longer) if longer else 100.0


def safim_syntax_match(prediction: str, reference: str, language: str) -> bool:
    """Whether two API calls are the same: all whitespace removed, in Python with keyword arguments in any order."""
    return _same_call(prediction, reference, language, compare_functions=True)


def safim_syntax_match_bug_compatible(prediction: str, reference: str, language: str) -> bool:
    """As SAFIM's evaluate.py: two Python calls with equal arguments match whatever they call."""
    return _same_call(prediction, reference, language, compare_functions=False)


def _same_call(prediction: str, reference: str, language: str, *, compare_functions: bool) -> bool:
    prediction, reference = _SPACE.sub("", prediction), _SPACE.sub("", reference)
    if language == "python" and (one := _python_call(prediction)) and (other := _python_call(reference)):
        same_function = not compare_functions or ast.dump(one.func) == ast.dump(other.func)
        return same_function and _arguments(one) == _arguments(other)
    return prediction == reference


def _python_call(code: str) -> ast.Call | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's odd escapes are no news
            body = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body if isinstance(body, ast.Call) else None


def _arguments(call: ast.Call) -> tuple[list[str], dict[str | None, str]]:
    return [ast.dump(item) for item in call.args], {item.arg: ast.dump(item.value) for item in call.keywords}


def identifiers(code: str, language: str) -> list[str]:
    """Words outside string literals that begin as an identifier and are no keyword, in order, repeated if repeated.

    Raises KeyError for a language whose keywords are not known. Source: CrossCodeEval, eval_utils.py.
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


def _crosscodeeval(case: Case, prediction: str) -> dict[str, float] | None:
    statement = postprocess.crosscodeeval_statement(case.language, case.prompt.prefix, prediction)
    values = partial(_crosscodeeval_values, "crosscodeeval")
    return _without_comments(case, statement, postprocess.remove_line_comments, values)


def _crosscodeeval_bug_compatible(case: Case, prediction: str) -> dict[str, float] | None:
    values = partial(_crosscodeeval_values, "crosscodeeval_bug_compatible")
    return _without_comments(case, prediction, postprocess.remove_line_comments_bug_compatible, values)


def _crosscodeeval_values(name: str, predicted: str, expected: str, language: str) -> dict[str, float]:
    """CrossCodeEval's scores of two texts without comments."""
    lines, wanted = ([line for each in text.split("\n") if (line := each.strip())] for text in (predicted, expected))
    return {
        f"{name}_exact_match": float(lines == wanted),
        f"{name}_edit_similarity_difflib": edit_similarity_difflib(predicted, expected),
        **{f"{name}_{value}": score for value, score in _identifier_scores(predicted, expected, language).items()},
    }


def _identifier_match(case: Case, prediction: str) -> dict[str, float] | None:
    return _without_comments(case, prediction, postprocess.remove_line_comments, _identifier_scores)


def _without_comments(
    case: Case, prediction: str, remove: Callable[[str, str], str], judge: Callable[[str, str, str], dict[str, float]]
) -> dict[str, float] | None:
    """`judge` of prediction and reference without comments; None where the keywords of the language are not known."""
    if case.reference is None or case.language not in _KEYWORDS:
        return None
    return judge(remove(prediction, case.language), remove(case.reference, case.language), case.language)


def _identifier_scores(predicted: str, expected: str, language: str) -> dict[str, float]:
    return match_identifiers(identifiers(predicted, language), identifiers(expected, language))


def _length(case: Case, prediction: str) -> dict[str, float] | None:
    if case.reference is None:
        return None
    return {"prediction_characters": float(len(prediction.strip())), "reference_characters": float(len(case.reference))}


def _repoeval(case: Case, prediction: str) -> dict[str, float] | None:
    if case.reference is None:
        return None
    found, wanted = ([line for each in t.splitlines() if (line := each.strip())] for t in (prediction, case.reference))
    found = found[: len(wanted)]
    similarity = edit_similarity_levenshtein("\n".join(found), "\n".join(wanted))
    return {"repoeval_exact_match": float(found == wanted), "repoeval_edit_similarity": similarity}


def _of(
    name: str, function: Callable[[str, str, str], float | bool | None]
) -> Callable[[Case, str], dict[str, float] | None]:
    """A metric of one value, which has its own name, from the prediction, the reference and the language."""

    def judge(case: Case, prediction: str) -> dict[str, float] | None:
        value = None if case.reference is None else function(prediction, case.reference, case.language)
        return None if value is None else {name: float(value)}

    return judge


_SINGLE: dict[str, Callable[[str, str, str], float | bool | None]] = {
    "exact_match": lambda prediction, reference, _: prediction.strip() == reference.strip(),
    "exact_match_verbatim": lambda prediction, reference, _: prediction == reference,
    "exact_match_no_whitespace": lambda a, b, _: _SPACE.sub("", a) == _SPACE.sub("", b),
    "safim_syntax_match": safim_syntax_match,
    "safim_syntax_match_bug_compatible": safim_syntax_match_bug_compatible,
    "edit_similarity_difflib": lambda a, b, _: edit_similarity_difflib(a, b),
    "edit_similarity_indel": lambda a, b, _: edit_similarity_indel(a, b),
    "edit_similarity_levenshtein": lambda a, b, _: edit_similarity_levenshtein(a, b),
    "bleu_4": lambda a, b, _: bleu.bleu_4(a, b),
    "codebleu": bleu.codebleu,
    "length_ratio": lambda prediction, reference, _: len(prediction.strip()) / len(reference) if reference else None,
}
_FUNCTIONS: dict[str, Callable[[Case, str], dict[str, float] | None]] = {
    **{name: _of(name, function) for name, function in _SINGLE.items()},
    "identifier_match": _identifier_match,
    "crosscodeeval": _crosscodeeval,
    "crosscodeeval_bug_compatible": _crosscodeeval_bug_compatible,
    "repoeval": _repoeval,
    "length": _length,
    "likelihood": lambda case, prediction: None,  # of no text, but of what likelihood() is given
}
_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("metrics.json").read_text(encoding="utf-8"))

METRICS: dict[str, Metric] = {name: Metric(name, function=_FUNCTIONS[name], **entry) for name, entry in _DATA.items()}
"""Every metric by its name; metrics.json has their definitions in words, and the value of a perfect prediction."""
