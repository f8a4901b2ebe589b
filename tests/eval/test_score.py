"""`eval score`: what it refuses, that nothing is dropped, that means and intervals are those of the definitions."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_infer.eval.report import command as report
from megatron_infer.eval.score import command as score
from megatron_infer.eval.score.judging import bucket
from megatron_infer.eval.score.results import is_quarantined, read_run
from megatron_infer.eval.score.statistics import bootstrap_mean, case_means, compare, sign_test
from megatron_infer.eval.score.tables import GROUPINGS
from megatron_infer.eval.tasks.fields import content_id
from megatron_infer.text.fim import FimPrompt
from tests.eval.finished_runs import GIVEN_UP, fim_row, sha256, write_run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two right and one wrong answer, one error, one case given up, in two languages and two scenarios."""
    rows = [
        fim_row("a", "x = 1"),
        fim_row("b", "y = 2", scenario="if_statement"),
        fim_row("c", "z = 3", language="go", path="c.go"),
        fim_row("d", "x = 1"),
        fim_row("e", "", scenario="if_statement"),
    ]
    texts = {"a": ["x = 1"], "b": ["y = 2\n"], "c": ["w = 3"], "d": ["x = 1"], "e": [""]}
    errors = {"d": "the prompt is too long", "e": GIVEN_UP}
    return write_run(tmp_path / "out", tmp_path / "data.jsonl", rows, texts, errors=errors)


@pytest.fixture
def humaneval(tmp_path: Path) -> Path:
    """Two problems with three samples each: 2 of 3 and 0 of 3 are right."""
    rows = [
        {
            "task_id": "H/0",
            "prompt": "def one():\n",
            "entry_point": "one",
            "test": "def check(f):\n    assert f() == 1",
        },
        {
            "task_id": "H/1",
            "prompt": "def two():\n",
            "entry_point": "two",
            "test": "def check(f):\n    assert f() == 2",
        },
    ]
    texts = {
        "H/0": ["    return 1\n", "    return 2\n", "    return 3 - 2\n"],
        "H/1": ["    return 1\n", "    import os; os._exit(0)\n", "    raise SystemExit(0)\n"],
    }
    return write_run(tmp_path / "out", tmp_path / "data.jsonl", rows, texts, task="humaneval")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_every_completion_has_a_row_and_errors_count_as_zero(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(run)]) == 0
    rows = read_lines(run / "scores.jsonl")
    assert [row["task_id"] for row in rows] == ["a", "b", "c", "d", "e"]
    # The reference of "e" is empty, as is what an error leaves: that must not make it a match.
    assert [row["metrics"]["exact_match"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [row["is_quarantined"] for row in rows] == [False, False, False, False, True]
    overall = json.loads((run / "scores.json").read_text())["tables"]["overall"][0]
    assert overall["num_cases"] == 5 and overall["num_errors"] == 2 and overall["num_quarantined"] == 1
    assert overall["metrics"]["exact_match"]["mean"] == 2 / 5
    assert "2 errors (1 given up), each worth 0" in capsys.readouterr().out


def test_tables_by_language_and_scenario(run: Path) -> None:
    score.main([str(run)])
    tables = json.loads((run / "scores.json").read_text())["tables"]
    means = {
        name: {
            tuple(group[field] for field in fields): group["metrics"]["exact_match"]["mean"] for group in tables[name]
        }
        for name, fields in GROUPINGS.items()
    }
    assert means["language"] == {("go",): 0.0, ("python",): 0.5}
    assert means["scenario"] == {("if_statement",): 0.5, ("single_line",): pytest.approx(1 / 3)}
    assert means["language_scenario"] == {
        ("go", "single_line"): 0.0,
        ("python", "if_statement"): 0.5,
        ("python", "single_line"): 0.5,
    }


def printed_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert score.main([str(run)]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if "  cases" in line]
    return [head.split("  ")[0] for head in heads]


def test_a_table_that_says_nothing_new_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {
        "one": [("python", "single_line")] * 3,
        "languages": [("python", "single_line"), ("go", "single_line")],
        "pairs": [("python", "single_line"), ("go", "method_body")],
        "both": [("python", "single_line"), ("go", "single_line"), ("go", "method_body")],
    }
    found = {}
    for name, cases in kinds.items():
        rows = [fim_row(str(i), language=lang, scenario=scenario) for i, (lang, scenario) in enumerate(cases)]
        texts = {row["task_id"]: ["x"] for row in rows}
        found[name] = printed_tables(write_run(tmp_path / name, tmp_path / f"{name}.jsonl", rows, texts), capsys)
    assert found == {
        "one": ["overall"],
        "languages": ["overall", "language"],
        "pairs": ["overall", "language", "scenario"],
        "both": ["overall", "language", "scenario", "language / scenario"],
    }


def test_groups_by_size_stand_in_the_order_of_their_size(tmp_path: Path) -> None:
    assert [bucket(n, (0, 1, 2, 4, 16)) for n in (0, 1, 3, 9, 99)] == ["0", "1", "2-3", "4-15", "16 or more"]
    rows = [fim_row(str(n), "\n".join(["x"] * n)) for n in (20, 3, 9, 1)]
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", rows, {row["task_id"]: ["x"] for row in rows})
    assert score.main([str(run)]) == 0
    groups = json.loads((run / "scores.json").read_text())["tables"]["hole_lines"]
    assert [(group["hole_lines"], group["num_cases"]) for group in groups] == [
        ("1", 1), ("2-3", 1), ("8-15", 1), ("16 or more", 1),
    ]  # fmt: skip


def test_a_metric_that_does_not_apply_is_null_and_averaged_over_the_others(run: Path) -> None:
    score.main([str(run)])
    # Identifiers are matched in Python, Java, TypeScript and C# only: the case in Go has none.
    assert [row["metrics"]["identifier_f1"] is None for row in read_lines(run / "scores.jsonl")][2]
    table = json.loads((run / "scores.json").read_text())["tables"]
    assert table["overall"][0]["metrics"]["identifier_f1"]["num_cases"] == 4
    assert next(g for g in table["language"] if g["language"] == "go")["metrics"]["identifier_f1"] is None


def test_scoring_twice_writes_the_same_bytes(run: Path) -> None:
    score.main([str(run)])
    before = [sha256(run / name) for name in ("scores.jsonl", "scores.json")]
    score.main([str(run)])
    assert [sha256(run / name) for name in ("scores.jsonl", "scores.json")] == before


def change_line(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "_SUCCESS").unlink(), "is not finished"),
        (lambda run: change_line(run / "completions.jsonl"), "was changed"),
        (lambda run: (run / "completions.jsonl").unlink(), "is missing"),
        (lambda run: change_line(run.parent / "data.jsonl"), "is not the data"),
        (lambda run: (run.parent / "data.jsonl").unlink(), "--data"),
        (lambda run: (run / "manifest.json").write_text("{}"), "was not written by this version"),
        (lambda run: (run / "manifest.json").write_text("{"), "is damaged"),
    ],
)
def test_what_is_not_a_whole_run_is_refused(
    run: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert score.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (run / "scores.json").exists()


def test_moved_data_is_found_with_an_option(run: Path) -> None:
    moved = (run.parent / "data.jsonl").rename(run.parent / "elsewhere.jsonl")
    assert score.main([str(run), "--data", str(moved)]) == 0


def test_field_names_of_the_run_are_used_again(tmp_path: Path) -> None:
    rows = [{"id": 7, "pre": "a", "suffix": "", "path": "x.py", "gold": "b"}]
    fields = {"id_field": "id", "prefix_field": "pre", "reference_field": "gold"}
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", rows, {"7": ["b"]}, fields=fields, id_field="id")
    assert score.main([str(run)]) == 0
    assert read_lines(run / "scores.jsonl")[0]["metrics"]["exact_match"] == 1.0


def test_lone_surrogates_in_data_are_scored_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = "x\ud800"
    rows = [fim_row(f"c{odd}", odd, prefix=odd, suffix=odd, scenario=odd), fim_row("b", odd, path=odd, language=odd)]
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", rows, {row["task_id"]: ["x"] for row in rows})
    assert score.main([str(run)]) == 0, capfd.readouterr().err
    assert report.main([str(run)]) == 0, capfd.readouterr().err
    assert [row["task_id"] for row in read_lines(run / "scores.jsonl")] == [f"c{odd}", "b"]


def test_a_prompt_given_up_is_told_from_other_errors(run: Path) -> None:
    assert [is_quarantined(row) for row in read_run(run).completions] == [False, False, False, False, True]


# ---- truncations ----------------------------------------------------------------------------------------------------


def test_several_truncations_stand_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(run), "--truncate", "line, raw,official"]) == 0
    rows = read_lines(run / "scores.jsonl")
    assert [row["truncation"] for row in rows] == ["line"] * 5 + ["raw"] * 5 + ["official"] * 5
    assert [row["completion"] for row in rows if row["task_id"] == "b"] == ["y = 2", "y = 2\n", "y = 2\n"]
    tables = json.loads((run / "scores.json").read_text())
    assert list(tables["truncations"]) == ["line", "raw", "official"]
    assert [(group["truncation"], group["num_cut"]) for group in tables["tables"]["truncation"]] == [
        ("line", 1), ("raw", 0), ("official", 0),
    ]  # fmt: skip
    assert tables["tables"]["overall"][0]["num_completions"] == 5, "the other tables are about the first rule"
    out = capsys.readouterr().out
    assert "truncation official: whole: nothing is cut" in out
    assert report.main([str(run)]) == 0


def test_an_unknown_truncation_is_refused_with_the_names_there_are(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score.main([str(run), "--truncate", "raw,qwen"]) == 2
    assert "there is no truncation 'qwen' for task 'fim'; known are official, raw, line" in capsys.readouterr().err


def test_a_run_that_ran_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [fim_row(name) for name in "abcdef"]
    texts = {name: ["x = 1\nmore\n"] for name in "abcdef"}
    for number, ended in enumerate(({"a": "length"}, {"a": "length", "b": "length"})):
        run = write_run(tmp_path / f"o{number}", tmp_path / "d.jsonl", rows, texts, ended=ended)
        assert score.main([str(run)]) == 0
        captured = capsys.readouterr()
        assert f"ended by {len(ended)} length, {6 - len(ended)} stop" in captured.out
        assert ("2 of 6 completions ended at max_new_tokens" in captured.err) == (len(ended) == 2), "above a fifth"
        assert "finish_reason" in captured.out, "a table by reason"


def test_failed_tests_are_grouped_by_their_error(humaneval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(humaneval), "--allow_exec", "--timeout_seconds", "20"]) == 0
    counts = json.loads((humaneval / "scores.json").read_text())["execution"]["num_by_error"]
    assert counts == {"AssertionError": 2, "the program exited before its last line": 2}
    assert "errors of failed tests: 2 AssertionError, 2 the program exited" in capsys.readouterr().out


def test_tests_are_run_under_every_truncation(tmp_path: Path) -> None:
    row = {
        "task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n", "suffix": "    return y\n",
        "canonical_solution": "    y = 2 * x\n", "entry_point": "f", "test": "def check(f):\n    assert f(2) == 4\n",
    }  # fmt: skip
    texts = {row["task_id"]: ["    y = 2 * x\n    return y\n\nprint(unknown)\n"]}
    task = "humaneval-infilling-single-line"
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", [row], texts, task=task, ended={row["task_id"]: "length"})
    assert score.main([str(run), "--allow_exec", "--truncate", "raw,line,suffix,ending,official"]) == 0
    passed = {each["truncation"]: each["metrics"]["passed"] for each in read_lines(run / "scores.jsonl")}
    assert passed == {"raw": 0.0, "line": 1.0, "suffix": 1.0, "ending": 1.0, "official": 0.0}


def test_what_an_ending_of_the_run_cut_off_is_judged_as_raw(tmp_path: Path) -> None:
    rows = [fim_row("a", "x = 1")]
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", rows, {"a": ["x = 1"]}, raw={"a": "x = 1\ny"})
    assert score.main([str(run), "--truncate", "official,raw"]) == 0
    assert [row["completion"] for row in read_lines(run / "scores.jsonl")] == ["x = 1", "x = 1\ny"]


def test_a_run_with_older_names_of_its_cases_is_scored(tmp_path: Path) -> None:
    row = {"name": "p-L3", "language": "py", "prompt": "a", "suffix": "b", "canonical_solution": "x", "old": "o"}
    old = f"python/{content_id(FimPrompt('a', 'b'))}"
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", [{**row, "old": old}], {old: ["x\ny"]},
                    task="santacoder-fim", id_field="old")  # fmt: skip
    assert score.main([str(run), "--truncate", "qwen,bigcode"]) == 0
    assert [row["metrics"]["exact_match"] for row in read_lines(run / "scores.jsonl")] == [1.0, 0.0]


# ---- another engine's completions -----------------------------------------------------------------------------------


def judged(out: Path, data: Path, predictions: Path, task: str, *options: str) -> int:
    return score.main([str(out), "--predictions", str(predictions), "--data", str(data), "--task", task, *options])


def test_predictions_of_another_engine_are_judged_as_our_own(run: Path, tmp_path: Path, capsys) -> None:
    """The very rows that eval run leaves for an official scorer give the very same metrics."""
    texts = {"a": "x = 1", "b": "y = 2\n", "c": "w = 3"}
    predictions = tmp_path / "theirs.jsonl"
    predictions.write_text("".join(json.dumps({"task_id": t, "completion": c}) + "\n" for t, c in texts.items()))
    assert judged(tmp_path / "theirs", tmp_path / "data.jsonl", predictions, "fim", "--truncate", "raw,line") == 0
    assert "2 of 5 completions are not in" in capsys.readouterr().err
    assert score.main([str(run), "--truncate", "raw,line"]) == 0
    ours, theirs = (read_lines(each / "scores.jsonl") for each in (run, tmp_path / "theirs"))
    assert [row["metrics"] for row in ours] == [row["metrics"] for row in theirs]
    assert [row["error"] for row in theirs[:5]] == [None, None, None, *["there is no prediction"] * 2]
    assert report.main([str(tmp_path / "theirs")]) == 0
    assert report.main([str(run), "--against", str(tmp_path / "theirs")]) == 0
    # Scored again, with other rules, and after an interruption: the same run.
    (tmp_path / "theirs" / "_SUCCESS").unlink()
    assert judged(tmp_path / "theirs", tmp_path / "data.jsonl", predictions, "fim") == 0


def test_samples_and_generations_of_other_engines(humaneval: Path, tmp_path: Path) -> None:
    lists = [["    return 1\n", "    return 3\n"], ["    return 1\n", "    return 2\n"]]
    generations, rows = tmp_path / "generations.json", tmp_path / "rows.jsonl"
    generations.write_text(json.dumps(lists))
    named = [{"task_id": f"H/{i}", "completion": text} for i, own in enumerate(lists) for text in own]
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(named)))
    for path, sample in ((generations, "    return 1\n"), (rows, "    return 2\n")):
        assert (
            judged(tmp_path / path.stem, tmp_path / "data.jsonl", path, "humaneval", "--allow_exec", "--k", "1,2") == 0
        )
        overall = json.loads((tmp_path / path.stem / "scores.json").read_text())["tables"]["overall"][0]
        assert overall["metrics"]["pass@1"]["mean"] == 0.5 and overall["metrics"]["pass@2"]["mean"] == 1.0
        assert sample in [row["completion"] for row in read_lines(tmp_path / path.stem / "scores.jsonl")]


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ('{"task_id": "a", "completion": "x"}\n{"task_id": "zz", "completion": "x"}', ".jsonl", "among them 'zz'"),
        ('{"task_id": "a", "pred": "x"}', ".jsonl", "line 1: no field 'completion', which the scorer of task 'fim'"),
        ('{"task_id": "a", "completion": 3}', ".jsonl", "line 1: field 'completion' must be text"),
        ("", ".jsonl", "holds no prediction"),
        ('[["x"]]', ".json", "has 1 cases, the data 5"),
        ('["x"]', ".json", "must hold a list with a list of texts"),
        ("{", ".json", "cannot read"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    run: Path, tmp_path: Path, text: str, suffix: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_text(text)
    assert judged(tmp_path / "new", tmp_path / "data.jsonl", path, "fim") == 2
    assert words in capsys.readouterr().err
    assert judged(run, tmp_path / "data.jsonl", path, "fim") == 2, "a run of eval run is not overwritten"


def test_predictions_need_a_task_and_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(run), "--predictions", "p.jsonl"]) == 2
    assert "--predictions needs --task and --data" in capsys.readouterr().err
    assert score.main([str(run), "--task", "fim"]) == 2
    assert "--task goes with --predictions" in capsys.readouterr().err


# ---- tests of the benchmark -----------------------------------------------------------------------------------------


def test_tests_are_not_run_unasked(humaneval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(humaneval)]) == 0
    assert "--allow_exec" in capsys.readouterr().err
    assert json.loads((humaneval / "scores.json").read_text())["execution"] is None
    assert "test" not in read_lines(humaneval / "scores.jsonl")[0]


def test_pass_at_k_of_the_samples(humaneval: Path) -> None:
    assert score.main([str(humaneval), "--allow_exec", "--k", "1,2", "--timeout_seconds", "20"]) == 0
    tables = json.loads((humaneval / "scores.json").read_text())
    metrics = tables["tables"]["overall"][0]["metrics"]
    # Of 3 samples 2 are right: the share of pairs with at least one right is 3 of 3.
    pairs = list(itertools.combinations([True, False, True], 2))
    assert metrics["pass@1"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["pass@2"]["mean"] == sum(map(any, pairs)) / len(pairs) / 2
    assert tables["execution"]["num_by_status"] == {"failed": 4, "passed": 2}
    assert tables["execution"]["isolation"] in ("namespaces", "guard")
    assert tables["execution"]["limits"]["timeout_seconds"] == 20.0


@pytest.mark.parametrize("k", ["0", "4", "1,x", "-1"])
def test_an_impossible_k_is_refused(humaneval: Path, k: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(humaneval), "--allow_exec", f"--k={k}"]) == 2
    assert "--k" in capsys.readouterr().err


def test_a_task_without_tests_refuses_to_run_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main([str(run), "--allow_exec"]) == 2
    assert "no test programs" in capsys.readouterr().err


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_all_possible_resamples() -> None:
    values = [0.0, 1.0, 1.0, 4.0, 9.0]
    means = sorted(sum(drawn) / 5 for drawn in itertools.product(values, repeat=5))  # every resample there is
    found = bootstrap_mean(values, num_resamples=400_000)
    assert found.mean == 3.0 and found.num_cases == found.num_clusters == 5
    assert found.low == means[math.floor(0.025 * len(means))]
    assert found.high == means[math.floor(0.975 * len(means))]


def test_clusters_are_drawn_whole_and_weights_count() -> None:
    values, clusters, weights = (
        [0.0, 1.0, 1.0, 4.0, 9.0, 2.0, 2.0],
        list("aabcdee"),
        [1.0, 3.0, 2.0, 1.0, 1.0, 5.0, 1.0],
    )
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in "abcde"}
    for value, cluster, weight in zip(values, clusters, weights, strict=True):
        sums[cluster][0] += weight * value
        sums[cluster][1] += weight
    drawn = itertools.product(sums.values(), repeat=5)
    means = sorted(sum(total for total, _ in each) / sum(weight for _, weight in each) for each in drawn)
    found = bootstrap_mean(values, clusters, weights, num_resamples=400_000)
    assert found.mean == sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    assert (found.num_cases, found.num_clusters) == (7, 5)
    assert found.low == pytest.approx(means[math.floor(0.025 * len(means))], rel=1e-12)
    assert found.high == pytest.approx(means[math.floor(0.975 * len(means))], rel=1e-12)


def test_cases_of_one_problem_count_as_one_observation() -> None:
    """Ten equal cases of each of 20 problems say no more than one of each."""
    generator = random.Random(3)
    problems = [float(generator.random() < 0.5) for _ in range(20)]
    values = [value for value in problems for _ in range(10)]
    clusters = [str(i) for i in range(20) for _ in range(10)]
    whole, naive = bootstrap_mean(values, clusters), bootstrap_mean(values)
    assert whole.low is not None and whole.high is not None and naive.low is not None and naive.high is not None
    assert whole.high - whole.low > 2.5 * (naive.high - naive.low)


def test_there_is_no_interval_from_fewer_than_five() -> None:
    assert bootstrap_mean([0.0, 1.0, 1.0, 0.0]).low is None
    assert bootstrap_mean([0.0, 1.0] * 30, ["a", "b"] * 30).high is None
    assert compare({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}).difference.low is None


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = random.Random(5)
    samples = [[float(generator.random() < 0.3) for _ in range(150)] for _ in range(300)]
    intervals = [bootstrap_mean(values, num_resamples=500) for values in samples]
    covered = sum(interval.low <= 0.3 <= interval.high for interval in intervals)
    assert 0.90 <= covered / len(intervals) <= 0.98


def test_samples_of_one_case_stay_together() -> None:
    generator = random.Random(3)
    cases = {str(i): [float(generator.random() < 0.5)] * 10 for i in range(50)}  # ten equal samples of each
    one = bootstrap_mean(list(case_means({name: values[:1] for name, values in cases.items()}).values()))
    assert bootstrap_mean(list(case_means(cases).values())) == one


def test_missing_values_are_left_out_of_a_case() -> None:
    assert case_means({"a": [1.0, None, 0.0], "b": [None]}) == {"a": 0.5}


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter() -> None:
    values = [float(i % 7) for i in range(40_000)]  # more than one chunk
    assert bootstrap_mean(values, num_resamples=150) == bootstrap_mean(values, num_resamples=150)
    assert bootstrap_mean(values, num_resamples=150) != bootstrap_mean(values, num_resamples=150, seed=1)


def test_pairing_makes_a_small_steady_gain_visible() -> None:
    generator = random.Random(1)
    against = {str(i): generator.random() for i in range(60)}
    ours = {name: value + 0.01 + 0.001 * generator.random() for name, value in against.items()}
    found = compare(ours, against)
    assert 0 < found.difference.low < found.difference.mean < found.difference.high < 0.012
    assert (found.num_won, found.num_lost, found.num_tied) == (60, 0, 0)
    assert found.p_value == 2 * 0.5**60


def test_only_shared_cases_are_compared() -> None:
    found = compare({"a": 1.0, "b": 0.0, "c": 1.0}, {"b": 1.0, "c": 1.0, "d": 0.0})
    assert (found.num_won, found.num_lost, found.num_tied) == (0, 1, 1)
    assert (found.mean, found.mean_against, found.difference.mean) == (0.5, 1.0, -0.5)
    with pytest.raises(ValueError, match="share no case"):
        compare({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize("won", range(6))
@pytest.mark.parametrize("lost", range(6))
def test_the_sign_test_counts_all_outcomes_of_fair_coins(won: int, lost: int) -> None:
    flips = [sum(coins) for coins in itertools.product((0, 1), repeat=won + lost)]
    as_extreme = sum(min(heads, won + lost - heads) <= min(won, lost) for heads in flips)
    assert sign_test(won, lost) == as_extreme / len(flips)


def test_the_sign_test_holds_for_many_cases() -> None:
    assert sign_test(5000, 5000) == 1.0
    assert sign_test(10_000, 100) == 0.0 or sign_test(10_000, 100) < 1e-300
