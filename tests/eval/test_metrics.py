"""Every score is the published definition, recomputed here another way or by a package from PyPI, to the last digit."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
import re
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest
import sacrebleu
from codebleu import calc_codebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz

from megatron_infer.eval.cases import Case
from megatron_infer.eval.score.bleu import bleu_4, codebleu, tokens_13a
from megatron_infer.eval.score.metrics import (
    METRICS,
    edit_similarity_difflib,
    edit_similarity_indel,
    edit_similarity_levenshtein,
    identifiers,
    likelihood,
    match_identifiers,
    pass_at_k,
    safim_syntax_match,
    safim_syntax_match_bug_compatible,
)
from megatron_infer.text.fim import FimPrompt

PAIRS = [
    ("def quick_sort(arr):", "def quicksort(array):"),
    ("for i in range(10):", "for item in items:"),
    ("self.cache[key] = value", "return self._store.get(key, default)"),
    ("  x = compute(a, b)\n  return x\n", "x = compute(a, c)\nreturn x"),
    ("", "x"),
    ("same", " same\n"),
    ("abcdefghij" * 30, "abcdefghij" * 25 + "klmno" * 10),
    ("naïve = 'é' + ü", "naive = 'e' + u"),
]
CODE = st.text(alphabet="ab_1 (),;=\n'.", max_size=40)


def case_of(reference: str | None, language: str = "python", prefix: str = "") -> Case:
    return Case("case", FimPrompt(prefix), reference, language)


def values_of(metric: str, reference: str | None, prediction: str, language: str = "python") -> dict[str, float] | None:
    return METRICS[metric].function(case_of(reference, language), prediction)


# ---- pass@k --------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for num_samples in range(1, 8):
        for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
            subsets = list(itertools.combinations(range(num_samples), k))
            passing = sum(any(sample < num_correct for sample in subset) for subset in subsets)
            assert pass_at_k(num_samples, num_correct, k) == float(Fraction(passing, len(subsets)))


def test_pass_at_k_agrees_with_the_published_product() -> None:
    for num_samples, num_correct, k in ((200, 1, 100), (200, 37, 10), (256, 255, 1), (200, 101, 100), (100, 0, 10)):
        failing = num_samples - num_correct
        product = math.prod(1.0 - k / i for i in range(failing + 1, num_samples + 1)) if failing >= k else 0.0
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(1.0 - product, abs=1e-14)


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_estimate(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(num_samples, num_correct, k)


# ---- edit similarity -----------------------------------------------------------------------------------------------


def distance(a: str, b: str, substitution: int) -> int:
    """Edit distance by its recurrence; a substitution that costs 2 is a deletion and an insertion."""

    @cache
    def below(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = below(i - 1, j - 1) + (0 if a[i - 1] == b[j - 1] else substitution)
        return min(below(i - 1, j) + 1, below(i, j - 1) + 1, replaced)

    for i in range(len(a)):  # bottom up, so that long texts stay within the recursion limit
        for j in range(len(b)):
            below(i, j)
    return below(len(a), len(b))


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_the_three_edit_similarities_are_their_definitions(prediction: str, reference: str) -> None:
    a, b = prediction.strip(), reference.strip()
    matching = sum(block.size for block in difflib.SequenceMatcher(None, a, b).get_matching_blocks())
    longer = max(len(a), len(b))
    assert edit_similarity_difflib(prediction, reference) == round(100 * (2.0 * matching / (len(a) + len(b))))
    indel = distance(a, b, substitution=2) / (len(a) + len(b))
    assert edit_similarity_indel(prediction, reference) == pytest.approx(100 * (1 - indel), abs=1e-10)
    assert edit_similarity_indel(prediction, reference) == fuzz.ratio(a, b)
    assert edit_similarity_levenshtein(prediction, reference) == 100 * (1 - distance(a, b, substitution=1) / longer)


def test_the_three_edit_similarities_are_three_numbers() -> None:
    """Of 'abcd' and 'bcda', 6 of 8 characters match; two edits of four characters lead from one to the other."""
    assert edit_similarity_difflib("abcd", "bcda") == 75
    assert edit_similarity_levenshtein("abcd", "bcda") == 50
    renamed = ("def quick_sort(arr):", "def quicksort(array):")
    # LCS "def quicksort(arr):", 19 of 20 + 21 characters; Levenshtein 3 (drop _, add a and y) of 21
    assert edit_similarity_difflib(*renamed) == round(100 * 38 / 41) == 93
    assert edit_similarity_indel(*renamed) == pytest.approx(100 * 38 / 41, abs=1e-10)
    assert edit_similarity_levenshtein(*renamed) == 100 * (1 - 3 / 21)


def test_difflib_forgets_frequent_characters_of_long_texts_as_fuzzywuzzy_does() -> None:
    text = "x = 1; " * 40
    assert edit_similarity_difflib("y" + text, text) < 5 < 99 < edit_similarity_indel("y" + text, text)


def test_two_empty_texts_are_equal() -> None:
    similarities = (edit_similarity_difflib, edit_similarity_indel, edit_similarity_levenshtein)
    assert [similarity(" \n", "") for similarity in similarities] == [100, 100, 100]
    assert [similarity("", "x") for similarity in similarities] == [0, 0, 0]


# ---- BLEU and CodeBLEU ---------------------------------------------------------------------------------------------


def bleu_by_hand(prediction: str, reference: str) -> float:
    """Papineni's formula in rational numbers but for the root and the penalty."""
    predicted, expected = tokens_13a(prediction), tokens_13a(reference)
    order = max(1, min(4, len(expected)))
    product = Fraction(1)
    for n in range(1, order + 1):
        grams = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (predicted, expected)]
        total = sum(grams[0].values())
        product *= Fraction(sum(min(count, grams[1][gram]) for gram, count in grams[0].items()), total) if total else 0
    penalty = math.exp(min(0.0, 1 - len(expected) / len(predicted)))
    return float(product) ** (1 / order) * penalty


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("return a + b * c", "return a + b - c"),
        ("x = foo(a, b)\nreturn x + 1", "x = foo(a, c)\nreturn x + 1"),
        ("if (a > b) { return a; } else { return b; }", "if (a > b) { return a; }"),
        ("return self.value", "return self.value if self.value else self.compute(1, 2)"),
        ("total += price * quantity &amp; 3", "total += price * quantity & 4"),
        ("no common words", "entirely different text here"),
    ],
)
def test_bleu_4_is_sentence_bleu_where_four_orders_exist(prediction: str, reference: str) -> None:
    assert bleu_4(prediction, reference) == pytest.approx(bleu_by_hand(prediction, reference), rel=1e-14)
    judge = sacrebleu.BLEU(smooth_method="none", tokenize="13a", effective_order=False)
    score = judge.sentence_score(prediction, [reference]).score / 100
    assert bleu_4(prediction, reference) == pytest.approx(score, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_a_short_reference_lowers_the_order(num_tokens: int) -> None:
    reference = " ".join("abc"[:num_tokens])
    assert bleu_4(reference + " d", reference) == pytest.approx(bleu_by_hand(reference + " d", reference), rel=1e-14)
    judge = sacrebleu.BLEU(smooth_method="none", tokenize="13a", effective_order=False, max_ngram_order=num_tokens)
    score = judge.sentence_score(reference + " d", [reference]).score / 100
    assert bleu_4(reference + " d", reference) == pytest.approx(score, rel=1e-12) and score > 0


def test_bleu_4_of_equal_and_of_empty_texts() -> None:
    assert bleu_4(" x\n", "x") == 1.0
    assert bleu_4("", "") == 1.0
    assert bleu_4("x", "") == bleu_4(" ", "x") == 0.0
    assert bleu_4("x", "<skipped>") == 0.0, "a reference whose every token the tokenizer drops"


def test_tokens_are_those_of_sacrebleu() -> None:
    text = "if a[i]-1 >= 2.5:\n    f(x,y)  # 1-2"
    assert " ".join(tokens_13a(text)) == "if a [ i ] -1 > = 2.5 : f ( x , y ) # 1 - 2"


@pytest.mark.parametrize("language", ["python", "java", "cpp", "javascript", "csharp", "go", "rust"])
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("x = a + b\nreturn x", "y = a + b\nreturn y + 1"), ("return 1;", "return 2;"), ("", "x = 1"), ("", "")],
)
def test_codebleu_is_the_packages_with_a_quarter_each(language: str, prediction: str, reference: str) -> None:
    name = "c_sharp" if language == "csharp" else language
    tokenize = sacrebleu.BLEU(tokenize="13a").tokenizer
    scores = calc_codebleu([reference], [prediction], name, tokenizer=lambda text: tokenize(text).split())
    parts = ("ngram_match_score", "weighted_ngram_match_score", "syntax_match_score")
    expected = 0.25 * (sum(scores[part] for part in parts) + (scores["dataflow_match_score"] or 1))
    assert codebleu(prediction, reference, language) == scores["codebleu"] == pytest.approx(expected, rel=1e-14)


def test_codebleu_is_silent_and_leaves_the_logger_alone(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters)
    assert codebleu("pass", "pass", "python") is not None, "a reference without data flow, of which the package warns"
    assert (root.handlers, root.filters) == before
    assert not caplog.records
    assert codebleu("x", "x", "typescript") is None


# ---- exact match and SAFIM -----------------------------------------------------------------------------------------


def test_the_exact_matches_differ_in_what_space_counts() -> None:
    names = ("exact_match_verbatim", "exact_match", "exact_match_no_whitespace")
    judged = {
        "f(a, b)": (1, 1, 1),
        " f(a, b)\n": (0, 1, 1),
        "f( a,b )": (0, 0, 1),
        "f(a, c)": (0, 0, 0),
    }
    for prediction, expected in judged.items():
        assert tuple(values_of(name, "f(a, b)", prediction) for name in names) == tuple(
            {name: float(value)} for name, value in zip(names, expected, strict=True)
        )


@pytest.mark.parametrize(
    ("prediction", "reference", "language", "meant", "published"),
    [
        ("np.ones(( n, n ))", "np.ones((n,n))", "python", True, True),
        ("f(a=1, b=2)", "f(b=2, a=1)", "python", True, True),
        ("np.zeros(n)", "np.ones(n)", "python", False, True),
        ("f(1, 2)", "f(2, 1)", "python", False, False),
        ("f('a b')", "f('ab')", "python", True, True),
        ("f(a, b", "f(a,b", "python", True, True),
        ("f(b=2, a=1)", "f(a=1, b=2)", "java", False, False),
        ("new Foo( x )", "new Foo(x)", "java", True, True),
    ],
)
def test_safim_compares_calls_and_its_bug_forgets_the_function(
    prediction: str, reference: str, language: str, meant: bool, published: bool
) -> None:
    assert safim_syntax_match(prediction, reference, language) is meant
    assert safim_syntax_match_bug_compatible(prediction, reference, language) is published


# ---- CrossCodeEval -------------------------------------------------------------------------------------------------


def test_identifiers_are_words_outside_strings_that_are_no_keywords() -> None:
    code = "for item in self.items(None, 'in \\' x', \"y\", True, False, 2, _z9, 3d, é): return item"
    assert identifiers(code, "python") == ["item", "self", "items", "True", "False", "_z9", "item"]
    java = 'String s = null; var t = true; int x2 = "a".b;'
    assert identifiers(java, "java") == ["String", "s", "null", "t", "true", "x2", "b"]
    assert identifiers("let u = `q ${v}`; const w = null", "typescript") == ["u", "q", "v", "w", "null"]
    assert identifiers("string s = null; Foo<int> f;", "csharp") == ["s", "Foo", "f"]


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abcd"), max_size=5))
def test_identifier_match_is_list_equality_and_the_f1_of_sets(predicted: list[str], expected: list[str]) -> None:
    match = match_identifiers(predicted, expected)
    assert match["identifier_exact_match"] == (predicted == expected)
    true = len([name for name in set(predicted) if name in expected])
    false, missed = len(set(predicted)) - true, len(set(expected)) - true
    assert match["identifier_precision"] == (true / (true + false) if predicted else 0)
    assert match["identifier_recall"] == (true / (true + missed) if expected else 0)
    assert match["identifier_f1"] == (2 * true / (2 * true + false + missed) if predicted or expected else 0)


def crosscodeeval_by_hand(prediction: str, reference: str, language: str) -> dict[str, float]:
    """The scores of a prediction that is one statement already, by the published steps."""
    predicted, expected = (re.sub("//.*", "", re.sub("#.*", "", text)) for text in (prediction, reference))
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in (predicted, expected)]
    a, b = predicted.strip(), expected.strip()
    ratio = 100 if a == b else 0 if not a or not b else round(100 * difflib.SequenceMatcher(None, a, b).ratio())
    match = match_identifiers(identifiers(predicted, language), identifiers(expected, language))
    scores = {
        "exact_match": float(lines[0] == lines[1]),
        "edit_similarity_difflib": float(ratio),
        "identifier_exact_match": match["identifier_exact_match"],
        "identifier_precision": match["identifier_precision"],
        "identifier_recall": match["identifier_recall"],
        "identifier_f1": match["identifier_f1"],
    }
    return {f"crosscodeeval_bug_compatible_{name}": value for name, value in scores.items()}


@settings(max_examples=150, deadline=None)
@given(CODE, CODE, st.sampled_from(["python", "java", "csharp", "typescript"]))
def test_crosscodeeval_bug_compatible_is_the_published_scorer(prediction: str, reference: str, language: str) -> None:
    found = values_of("crosscodeeval_bug_compatible", reference, prediction, language)
    assert found == crosscodeeval_by_hand(prediction, reference, language)


def test_crosscodeeval_as_meant_and_as_published() -> None:
    def both(reference: str, prediction: str, language: str) -> list[float]:
        names = ("crosscodeeval", "crosscodeeval_bug_compatible")
        return [(values_of(name, reference, prediction, language) or {})[f"{name}_exact_match"] for name in names]

    assert both("x = a  # why\n\n", "\n  x = a", "python") == [1, 1]
    assert both("x = a // b", "x = a // c", "python") == [0, 1], "published: floor division is a comment"
    assert both('get("http://a");', 'get("http://b");', "java") == [0, 1], "published: comments begin inside strings"
    assert both("#region A", "#region B", "csharp") == [0, 1], "published: # begins a comment everywhere"
    assert both("}", "}\n}", "java") == [1, 0], "published: a completion that begins with } is not cut"


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"likelihood"}))
def test_a_perfect_prediction_gets_full_marks_and_the_names_it_promises(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name and metric.about
    reference = "result = self.compute(alpha, beta, gamma)"
    found = values_of(name, reference, reference)
    assert found is not None and found.keys() == metric.values.keys()
    assert all(full in (None, found[value]) for value, full in metric.values.items())
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("name", METRICS)
def test_nothing_is_judged_without_a_reference(name: str) -> None:
    assert values_of(name, None, "x") is None


def test_no_two_metrics_share_a_value() -> None:
    names = [value for metric in METRICS.values() for value in metric.values]
    assert len(names) == len(set(names))


def test_what_a_language_does_not_support_is_none_and_not_zero() -> None:
    for name in ("identifier_match", "crosscodeeval", "crosscodeeval_bug_compatible"):
        assert values_of(name, "x", "x", "rust") is None
    assert values_of("codebleu", "x", "x", "") is None


def test_lengths_are_characters_as_fim_eval_counts_them() -> None:
    assert values_of("length", " abc\n", " x ") == {"prediction_characters": 1.0, "reference_characters": 5.0}
    assert values_of("length_ratio", "abcd", " ab ") == {"length_ratio": 0.5}
    assert values_of("length_ratio", "", "ab") is None


def test_likelihood_is_of_the_tokens_and_per_character() -> None:
    values = likelihood([math.log(0.5), math.log(0.25), math.log(0.125)], "abcd")
    assert values.keys() == METRICS["likelihood"].values.keys()
    assert values["log_probability"] == pytest.approx(math.log(1 / 64))
    assert values["log_probability_per_token"] == pytest.approx(math.log(0.25))
    assert values["bits_per_character"] == pytest.approx(6 / 4)
    assert values["reference_tokens"] == 3


def repoeval_by_hand(prediction: str, reference: str) -> dict[str, float]:
    """RepoCoder's two scores, by the published steps."""
    target = [line.strip() for line in reference.splitlines() if line.strip()]
    predicted = [line.strip() for line in prediction.splitlines() if line.strip()][: len(target)]
    a, b = "\n".join(target), "\n".join(predicted)
    similarity = 1 - distance(a, b, substitution=1) / max(len(a), len(b))
    return {
        "repoeval_exact_match": float(len(target) == len(predicted) and target == predicted),
        "repoeval_edit_similarity": pytest.approx(100 * similarity),
    }


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("  call(a)\n\n  more()\nrest\n", "call(a)\nmore()"),
        ("call(a)", "call(a)\n  more()"),
        ("x = 2\ny", "x = 1"),
        ("", "x"),
        *PAIRS[:4],
    ],
)
def test_repoevals_scores_are_of_as_many_lines_as_the_reference_has(prediction: str, reference: str) -> None:
    assert values_of("repoeval", reference, prediction) == repoeval_by_hand(prediction, reference)
