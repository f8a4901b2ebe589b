"""BLEU-4 and CodeBLEU of one prediction, with the conventions of aiXcoder's FIM-Eval (its run_evaluate.py).

Owns the orders, the limits and the tokenizer. Knows no task; CodeBLEU itself is the codebleu package's.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from codebleu import calc_codebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from megatron_infer.eval import syntax

_MAX_ORDER = 4
_CODEBLEU_NAMES = {name: name for name in ("python", "java", "cpp", "javascript", "go", "rust")} | {"csharp": "c_sharp"}
"""Our names of languages -> codebleu's. FIM-Eval scores the first four; codebleu has no TypeScript."""

_tokenizer = Tokenizer13a()  # type: ignore[no-untyped-call]


def tokens_13a(text: str) -> list[str]:
    """The words of a text as mteval-v13a, WMT's tokenizer, splits it."""
    return str(_tokenizer(text)).split()


def bleu_4(prediction: str, reference: str) -> float:
    """Sentence BLEU without smoothing, in [0, 1], of the stripped texts.

    1 for equal texts and 0 if either is empty. The highest order is 4, or the reference's number of tokens if less.
    Source: Papineni et al. 2002 for the formula; FIM-Eval, `calculate_bleu4` and `score`, for the limits.
    """
    prediction, reference = prediction.strip(), reference.strip()
    if prediction == reference:
        return 1.0
    predicted, expected = tokens_13a(prediction), tokens_13a(reference)
    if not predicted or not expected:
        return 0.0
    order = min(_MAX_ORDER, len(expected))
    log_precisions = []
    for n in range(1, order + 1):
        found = _ngrams(predicted, n)
        matches = sum((found & _ngrams(expected, n)).values())
        if not matches:
            return 0.0
        log_precisions.append((1.0 / order) * math.log(matches / found.total()))
    ratio = len(predicted) / len(expected)
    brevity_penalty = 1.0 if ratio > 1.0 else math.exp(1 - 1.0 / ratio)
    return math.exp(sum(log_precisions)) * brevity_penalty


def codebleu(prediction: str, reference: str, language: str) -> float | None:
    """CodeBLEU in [0, 1], or None for a language that the codebleu package does not know.

    A quarter each of n-gram, keyword-weighted n-gram, syntax and data-flow match over tokens of `tokens_13a`; a
    data-flow match of 0 counts as 1, as the package and FIM-Eval have it. Source: Ren et al. 2020, arXiv:2009.10297.
    The package's data flow walks sets of names, so where one value has several sources the result depends on
    PYTHONHASHSEED (by about 1e-4 in the mean of 20-line texts), here as in FIM-Eval; a fixed seed repeats it exactly.
    """
    name = _CODEBLEU_NAMES.get(language)
    if name is None:
        return None
    weights = (0.25, 0.25, 0.25, 0.25)
    # The package cannot take lone surrogates, for which data may have escapes; as "?" they keep their place.
    prediction, reference = (syntax.encode(text).decode() for text in (prediction, reference))
    with _root_logger_silenced():
        scores = calc_codebleu([reference], [prediction], name, weights=weights, tokenizer=tokens_13a)
    return float(scores["codebleu"])


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


@contextmanager
def _root_logger_silenced() -> Iterator[None]:
    """The package warns through the root logger whenever a reference has no data flow, which short holes never have."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def refuse(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)  # without a handler, logging.warning() would install one for good
    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)
        root.removeHandler(handler)
