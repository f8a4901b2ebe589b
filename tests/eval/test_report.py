"""`eval report`: one file that stands alone, says what was run, and in which no text of a model can act."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_infer.commands.options import percentile
from megatron_infer.eval.report import command as report
from megatron_infer.eval.report.plots import Estimate, Panel, interval_plot
from megatron_infer.eval.report.side_by_side import MAX_CASES, differences, visible
from megatron_infer.eval.score import command as score
from tests.eval.finished_runs import GIVEN_UP, fim_row, write_run

HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7 * 7 }} \u202e\x07"
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_report(run: Path, *options: str) -> Page:
    assert score.main([str(run)]) == 0
    assert report.main([str(run), *options]) == 0
    return Page((run / "report.html").read_text(encoding="utf-8"))


def plain_run(root: Path, name: str, texts: dict[str, str], **settings: object) -> Path:
    """Cases of one language and one scenario, which take fewer figures."""
    rows = [fim_row(task_id) for task_id in texts]
    samples = {task_id: [text] for task_id, text in texts.items()}
    return write_run(root / name, root / "data.jsonl", rows, samples, **settings)  # type: ignore[arg-type]


def simple_run(root: Path, name: str, texts: dict[str, str], **settings: object) -> Path:
    rows = [
        fim_row("a", "x = 1"),
        fim_row("b", "y = 2", scenario="if_statement"),
        fim_row("c", "z = 3", scenario="if_statement", language="java"),
    ]
    samples = {task_id: [text] for task_id, text in texts.items()}
    return write_run(root / name, root / "data.jsonl", rows, samples, **settings)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return simple_run(tmp_path, "out", {"a": "x = 1", "b": "y = 4", "c": "z = 3"})


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of two matches and one miss, for the tests that only look at it."""
    run = simple_run(tmp_path_factory.mktemp("report"), "out", {"a": "x = 1", "b": "y = 4", "c": "z = 3"})
    write_report(run)
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# ---- a file on its own ----------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_elsewhere(html: str, page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "video", "audio", "source"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)


def test_the_same_results_give_the_same_bytes(run: Path) -> None:
    score.main([str(run)])
    report.main([str(run)])
    first = (run / "report.html").read_bytes()
    report.main([str(run)])
    assert (run / "report.html").read_bytes() == first


def test_the_browser_may_run_the_pages_own_script_and_no_other(page: Page) -> None:
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{digest}'"


def test_every_figure_is_described_for_those_who_do_not_see_it(page: Page) -> None:
    figures = page.all("svg")
    assert len(figures) >= 3
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in figures)


# ---- hostile text ---------------------------------------------------------------------------------------------------


def test_no_text_of_model_or_data_becomes_markup(tmp_path: Path) -> None:
    hostile = fim_row(HOSTILE, HOSTILE, prefix=HOSTILE, suffix=HOSTILE, scenario=HOSTILE)
    rows = [hostile, fim_row("tame"), fim_row("broken")]
    run = write_run(
        tmp_path / "out",
        tmp_path / "data.jsonl",
        rows,
        {HOSTILE: [f"{HOSTILE} = 1"], "tame": ["x = 1"], "broken": [""]},
        errors={"broken": HOSTILE},
    )
    other = write_run(
        tmp_path / "other",
        tmp_path / "data.jsonl",
        rows,
        {HOSTILE: [HOSTILE], "tame": [HOSTILE], "broken": ["x = 1"]},
    )
    score.main([str(other)])
    page = write_report(run, "--against", str(other))
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not page.all("img")
    assert "</pre></details><script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.text and "⟨U+202E⟩" in page.text and "⟨U+0007⟩" in page.text
    assert len(page.all("details")) == 3


def test_characters_that_hide_or_reorder_others_are_shown() -> None:
    assert visible("a\tb\n") == "a\tb\n"
    assert visible("a\u200bb\u2066\ud800\r\n") == "a⟨U+200B⟩b⟨U+2066⟩⟨U+D800⟩␍\n"
    assert visible("déjà 快速") == "déjà 快速"


def test_a_dollar_in_a_label_is_no_formula() -> None:
    svg = interval_plot("p", 'about <this> "plot" & more', [Panel("m", (Estimate("$\\frac", 1, 0, 2),))])
    assert "$\\frac" in svg
    assert 'aria-label="about &lt;this> &quot;plot&quot; &amp; more"' in svg


# ---- what it tells --------------------------------------------------------------------------------------------------


def test_what_was_run_is_told(page: Page) -> None:
    for words in ("tiny-model on fim", "ab" * 32, "temperature=0.0", "eval run --data 'some data.jsonl'", "torch 2.0"):
        assert words in page.text
    assert "2026-01-02T03:04:05+00:00" in page.text
    assert (
        "/models/" not in page.text and "/data.jsonl" not in page.text
    )  # names of this machine's folders are no result


def test_results_are_the_scored_ones(page: Page) -> None:
    text = re.sub(r"\s+", " ", page.text)
    assert "exact_match66.73 cases" in text, "three cases are too few for an interval"
    for group in ("if_statement", "single_line", "java", "python"):
        assert group in text


def test_speed_is_that_of_the_last_attempt_and_of_what_was_completed(tmp_path: Path) -> None:
    run = plain_run(tmp_path, "out", {"a": "x", "b": "y", "c": "z"}, attempts=2, errors={"c": "the prompt is too long"})
    text = write_report(run).text
    # 2 completions of 5 tokens in 2 s, 4 of 10 prompt tokens cached in each.
    assert "2 completions in 2 s, in the last of 2 attempts" in text
    assert "5.0 new tokens/s, 1.00 completions/s" in text
    assert "40.0% of prompt tokens came from the prefix cache" in text


def test_errors_and_cases_given_up_are_listed(tmp_path: Path) -> None:
    run = plain_run(tmp_path, "out", {"a": "x", "b": "", "c": ""}, errors={"b": "too long by 7", "c": GIVEN_UP})
    text = write_report(run).text
    assert "too long by 7" in text and GIVEN_UP in text
    assert "2 of 3 completions failed and count as 0" in text


def test_a_run_of_errors_alone_is_reported_too(tmp_path: Path) -> None:
    errors = dict.fromkeys("abc", "no")
    run = plain_run(tmp_path, "out", {"a": "", "b": "", "c": ""}, errors=errors)
    assert "nothing to measure" in write_report(run).text


def test_a_task_without_scores_is_reported_too(tmp_path: Path) -> None:
    row = {"task_id": "H/0", "prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    pass"}
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", [row], {"H/0": ["    return 1"]}, task="humaneval")
    assert [case["data-outcome"] for case in write_report(run).all("details")] == ["unscored"]


def test_the_tests_isolation_is_told(tmp_path: Path) -> None:
    row = {
        "task_id": "H/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(f):\n    assert f() == 1",
    }
    run = write_run(tmp_path / "o", tmp_path / "d.jsonl", [row], {"H/0": ["    return 1"]}, task="humaneval")
    assert score.main([str(run), "--allow_exec"]) == 0
    assert report.main([str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "Tests ran under the isolation" in page.text
    assert page.all("details")[0]["data-outcome"] == "right"


# ---- cases ----------------------------------------------------------------------------------------------------------


def test_cases_can_be_filtered(page: Page) -> None:
    cases = page.all("details")
    assert [case["data-outcome"] for case in cases] == ["right", "wrong", "right"]
    assert [case["data-language"] for case in cases] == ["python", "python", "java"]
    assert {select["name"] for select in page.all("select")} == {"language", "scenario", "finish", "outcome"}
    options = [option["value"] for option in page.all("option")]
    assert {"java", "if_statement", "wrong"} <= set(options)


def test_the_first_cases_are_shown_and_it_says_so(tmp_path: Path) -> None:
    rows = [fim_row(f"case-{i:03d}", prefix="", suffix="") for i in range(MAX_CASES + 1)]
    texts = {str(row["task_id"]): ["x = 1"] for row in rows}
    page = write_report(write_run(tmp_path / "o", tmp_path / "d.jsonl", rows, texts))
    assert len(page.all("details")) == MAX_CASES
    assert f"The first {MAX_CASES} of {MAX_CASES + 1} cases, in the order of the data" in page.text
    assert "case-199" in page.text and "case-200" not in page.text


def test_differences_are_marked_on_both_sides_and_lose_nothing() -> None:
    first, second = "total = width * height\n", "total = w * height + 1\n"
    pieces = differences(first, second)
    assert "".join(text for text, _ in pieces[0]) == first
    assert "".join(text for text, _ in pieces[1]) == second
    assert [text for text, changed in pieces[0] if changed] == ["width"]
    assert [text for text, changed in pieces[1] if changed] == ["w", " + 1"]
    assert differences("x" * 5 + " y" * 4000, "z") == (((f"{'x' * 5}{' y' * 4000}", False),), (("z", False),))


def test_what_a_truncation_removes_is_struck_out_and_every_answer_says_how_it_ended(tmp_path: Path) -> None:
    texts = {"a": "x = 1\ny = 2\nprint(y)\n", "b": "x = 1", "c": "z"}
    run = plain_run(tmp_path, "out", texts, ended={"a": "length"})
    assert score.main([str(run), "--truncate", "line,raw"]) == 0
    assert report.main([str(run)]) == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<s>\ny = 2\nprint(y)\n</s>" in html
    text = re.sub(r"\s+", " ", Page(html).text)
    assert "1 of 3 completions ended at max_new_tokens" in text
    assert "By truncation" in text and "line3015.3" in text.replace(" ", ""), "3 cases, 0 errors, 1 cut of 16"
    assert text.count("ended by stop") == 2 and "ended by length" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0123, "12.3 ms"), (1.234, "1.23 s"), (99.4, "99.4 s"), (405.7, "6 min 46 s")]
)
def test_times_are_written_as_they_are_read(seconds: float, words: str) -> None:
    assert report.duration(seconds) == words


# ---- two runs -------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_case_by_case(tmp_path: Path, run: Path) -> None:
    other = simple_run(tmp_path, "other", {"a": "x = 9", "b": "y = 8", "c": "z = 3"}, seed=5)
    score.main([str(other)])
    page = write_report(run, "--against", str(other))
    text = re.sub(r"\s+", " ", page.text)
    assert "Won: 1 cases" in text and "Lost: 0 cases" in text
    assert "seed05" in text.replace(" ", "")  # the setting that differs, and its two values
    assert "exact_match66.733.3+33.31021" in text.replace(" ", "")  # won 1, lost 0, tied 2, p 1
    assert text.count("completion of the other run") == 3


def test_runs_under_different_truncations_say_so(tmp_path: Path, run: Path) -> None:
    other = simple_run(tmp_path, "other", {"a": "x = 1\nmore", "b": "y", "c": "z"})
    assert score.main([str(other), "--truncate", "line,official"]) == 0
    assert "truncationofficialline" in re.sub(r"\s+", "", write_report(run, "--against", str(other)).text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_sha256": "cd" * 32}, None),
        ({"data_sha256": "cd" * 32}, "cannot be compared"),
        ({"task": "mbpp"}, "task"),
    ],
)
def test_only_runs_of_the_same_task_and_data_are_compared(
    tmp_path: Path, run: Path, settings: dict[str, str], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    other = simple_run(tmp_path, "other", {"a": "x", "b": "y", "c": "z"}, **settings)
    if words is None:
        assert score.main([str(other)]) == 0
    assert score.main([str(run)]) == 0
    assert report.main([str(run), "--against", str(other)]) == (0 if words is None else 2)
    assert words is None or words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.json", "scores.jsonl", "completions.jsonl", "timings.jsonl"])
def test_results_that_do_not_belong_together_are_refused(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    score.main([str(run)])
    path = run / name
    path.write_bytes(path.read_bytes().replace(b'"completions_sha256": "', b'"completions_sha256": "0') + b"\n")
    assert report.main([str(run)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (run / "report.html").exists()


def test_a_run_must_be_scored_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(run)]) == 2
    assert "eval score" in capsys.readouterr().err


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0
