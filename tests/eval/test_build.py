"""`eval build`: holes fit their files exactly, the same trees give the same bytes, sides never mix, and nothing is left
half-written.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_infer.eval.build import command as build
from megatron_infer.eval.build import sources
from megatron_infer.eval.build.command import main
from megatron_infer.eval.build.scenarios import SCENARIOS
from megatron_infer.eval.build.selection import Selection
from tests.eval.sources import EXTENSIONS, HOLES, SOURCES

Rows = list[dict[str, Any]]


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def built(out: Path, *arguments: str | Path) -> Rows:
    assert run(*arguments, "--out", out, "--force") == 0
    return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def module(index: int, functions: int = 3) -> str:
    """A Python file unlike those of other indices."""
    return "".join(
        f"def f_{index}_{k}(a):\n    b_{index}_{k} = a + {k}\n    print({index}, b_{index}_{k})\n    return {k}\n\n"
        for k in range(functions)
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A file in every language, and some Python modules."""
    files: dict[str, str | bytes] = {
        f"src/sums{EXTENSIONS[language]}": text.replace("result", "größe") for language, text in SOURCES.items()
    }
    files |= {f"pkg/module_{index}.py": module(index) for index in range(12)}
    return write_tree(tmp_path / "tree", files)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_prefix_reference_and_suffix_are_the_file_to_the_byte(tree: Path, tmp_path: Path, newline: str) -> None:
    for path in tree.rglob("*.*"):
        path.write_bytes(path.read_bytes().replace(b"\n", newline.encode()))
    rows = built(tmp_path / "all.jsonl", tree, "--per_scenario", "1000", "--min_reference_chars", "1")
    seen = Counter((row["language"], row["scenario"]) for row in rows)
    for language, holes in HOLES.items():
        for scenario in SCENARIOS:
            if scenario.endswith("_statement"):
                assert seen[language, scenario] == len(holes.get(scenario, [])), (language, scenario)
            else:
                assert seen[language, scenario] >= 1, (language, scenario)
    for row in rows:
        data = (tree / row["path"]).read_bytes()
        assert (row["prefix"] + row["reference"] + row["suffix"]).encode() == data
        assert row["source_sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["reference"] == "") == (row["scenario"] == "empty")
        assert row["reference"] == row["reference"].strip()
    assert len({row["task_id"] for row in rows}) == len(rows)
    assert any(newline in row["reference"] for row in rows)
    assert any("größe" in row["reference"] and "größe" in row["prefix"] for row in rows)


def test_a_task_id_is_the_place_and_rows_are_in_order(tree: Path, tmp_path: Path) -> None:
    rows = built(tmp_path / "all.jsonl", tree, "--languages", "go,java", "--scenarios", "while_statement,if_statement")
    assert [row["task_id"] for row in rows] == [
        "src/sums.go:7:3:if_statement",
        "src/sums.go:13:2:while_statement",
        "src/sums.java:7:13:if_statement",
        "src/sums.java:13:9:while_statement",
    ]
    assert {row["path"] for row in rows} == {"src/sums.go", "src/sums.java"}


def test_references_keep_their_bounds_and_empty_holes_have_none(tree: Path, tmp_path: Path) -> None:
    rows = built(tmp_path / "a.jsonl", tree, "--min_reference_chars", "20", "--max_reference_chars", "60")
    lengths = {len(row["reference"]) for row in rows if row["scenario"] != "empty"}
    assert min(lengths) >= 20 and max(lengths) <= 60
    assert any(row["scenario"] == "empty" for row in rows)


def test_a_shorter_context_is_the_whole_lines_that_fit(tree: Path, tmp_path: Path) -> None:
    for row in built(tmp_path / "a.jsonl", tree, "--max_context_chars", "100"):
        text = (tree / row["path"]).read_bytes().decode()
        before, after = text.split(row["prefix"] + row["reference"] + row["suffix"])
        assert max(len(row["prefix"]), len(row["suffix"])) <= 100
        if before:
            assert before.endswith("\n") and len(row["prefix"] + before.splitlines()[-1]) + 1 > 100
        if after:
            assert row["suffix"].endswith("\n") and len(row["suffix"] + after.splitlines()[0]) + 1 > 100


def test_a_byte_order_mark_stays(tmp_path: Path) -> None:
    write_tree(tmp_path / "t", {"a.py": b"\xef\xbb\xbf" + PLAIN.encode()})
    rows = built(tmp_path / "a.jsonl", tmp_path / "t")
    assert all(row["prefix"].startswith("\ufeff") for row in rows) and rows


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_same_tree_and_seed_give_the_same_bytes_wherever_it_lies(tree: Path, tmp_path: Path) -> None:
    built(tmp_path / "a.jsonl", tree, "--per_scenario", "5")
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    names = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    random.Random(1).shuffle(names)
    for name in names:  # directory entries in another order
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, moved / name)
    built(tmp_path / "b.jsonl", moved, "--per_scenario", "5")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    built(tmp_path / "c.jsonl", tree, "--per_scenario", "5", "--seed", "1")
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_files_may_be_listed_in_any_order(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())
    by_tree = built(tmp_path / "a.jsonl", ".", "--per_scenario", "4")
    assert built(tmp_path / "b.jsonl", *names, "--per_scenario", "4") == by_tree
    assert built(tmp_path / "c.jsonl", *reversed(names), names[0], "--per_scenario", "4") == by_tree


def test_cases_are_spread_evenly_over_files(tree: Path, tmp_path: Path) -> None:
    for number, most in ((12, 1), (24, 2), (30, 3)):
        rows = built(
            tmp_path / "a.jsonl", tree / "pkg", "--scenarios", "method_signature", "--per_scenario", str(number)
        )
        per_file = Counter(row["path"] for row in rows)
        assert len(rows) == number and len(per_file) == 12 and max(per_file.values()) == most


def test_more_cases_contain_the_fewer(tree: Path, tmp_path: Path) -> None:
    few = built(tmp_path / "a.jsonl", tree, "--per_scenario", "3")
    many = built(tmp_path / "b.jsonl", tree, "--per_scenario", "7")
    assert {row["task_id"] for row in few} < {row["task_id"] for row in many}


def test_a_selection_is_the_same_in_any_sequence_of_offers() -> None:
    rng = random.Random(0)
    offers = [(bytes([rng.randrange(40)]), (rng.randrange(3), rng.randrange(1000)), index) for index in range(300)]
    first = {content: min((order, index) for c, order, index in offers if c == content) for content, _, _ in offers}
    expected = sorted(index for _, index in sorted(first.values())[:25])
    for _ in range(5):
        selection = Selection(25)
        for content, order, index in offers:
            if selection.wants(order):
                selection.offer(content, order, index)  # type: ignore[arg-type]
        assert sorted(selection.candidates()) == expected  # type: ignore[type-var]
        rng.shuffle(offers)


# ---- duplicates, sides and exclusion --------------------------------------------------------------------------------

PLAIN = "def f(a):\n    b = a + 1\n    print(a, b)\n    return b\n"


def test_a_file_counts_once_whatever_its_white_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = {"c.py": "\ufeff" + PLAIN, "b/a.py": PLAIN.replace("\n", "\r\n"), "a.py": PLAIN.replace("    ", "\t")}
    monkeypatch.chdir(write_tree(tmp_path / "t", copies))  # type: ignore[arg-type]
    for sources_ in ([Path(".")], list(copies), list(copies)[::-1]):
        assert {row["path"] for row in built(tmp_path / "a.jsonl", *sources_)} == {"a.py"}


def test_a_near_duplicate_hole_counts_once(tmp_path: Path) -> None:
    filler = "".join(f"x{k} = {k}\n" for k in range(60))
    write_tree(tmp_path / "t", {"a.py": f"a = 1\n{filler}{PLAIN}{filler}", "b.py": f"b = 2\n{filler}{PLAIN}\n{filler}"})
    rows = built(tmp_path / "a.jsonl", tmp_path / "t", "--scenarios", "method_body,empty")
    assert Counter(row["scenario"] for row in rows) == {"method_body": 1, "empty": 3}
    other = f"b = 2\n{filler}y = 1\n{PLAIN}{filler}"
    write_tree(tmp_path / "t", {"b.py": other})
    assert len(built(tmp_path / "a.jsonl", tmp_path / "t", "--scenarios", "method_body")) == 2


def test_a_file_falls_on_one_side_by_its_name_alone(tree: Path, tmp_path: Path) -> None:
    def paths(split: str, *more: str) -> set[str]:
        rows = built(tmp_path / "a.jsonl", tree, "--held_out", "0.3", "--split", split, *more)
        return {row["path"] for row in rows}

    test, rest = paths("test"), paths("rest")
    every = {row["path"] for row in built(tmp_path / "a.jsonl", tree)}
    assert test and rest and not test & rest and test | rest == every
    assert test == {p for p in every if int(hashlib.sha256(p.encode()).hexdigest(), 16) % 10 < 3}
    for more in (("--seed", "5"), ("--per_scenario", "2"), ("--languages", "python")):
        assert paths("test", *more) <= test
        assert paths("rest", *more) <= rest


def test_a_copy_on_the_other_side_takes_a_file_from_the_test_side(tmp_path: Path) -> None:
    names = [f"m{index}.py" for index in range(40)]
    held_out = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 4 == 0]
    rest = next(name for name in names if name not in held_out)
    files = {name: module(index) for index, name in enumerate(names)}
    write_tree(tmp_path / "t", {**files, rest: files[held_out[0]].replace("\n", "\n\n")})
    rows = built(tmp_path / "a.jsonl", tmp_path / "t", "--held_out", "1/4")
    assert {row["path"] for row in rows} == set(held_out[1:])


def test_a_repository_falls_on_one_side_as_a_whole(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"repo{r}/src/m{k}.py": module(10 * r + k) for r in range(8) for k in range(3)}
    write_tree(tmp_path / "t", files)
    sides = [
        {row["repository"] for row in built(tmp_path / "a.jsonl", tmp_path / "t", "--repositories", *more)}
        for more in (("--held_out", "1/2"), ("--held_out", "1/2", "--split", "rest"))
    ]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8
    row = built(tmp_path / "a.jsonl", tmp_path / "t", "--repositories")[0]
    assert row["path"].startswith("src/m") and row["task_id"].startswith(f"{row['repository']}/src/m")


def test_what_a_model_was_trained_on_is_left_out_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, str | bytes] = {f"m{index}.py": module(index) for index in range(5)}
    tree = write_tree(tmp_path / "t", files)
    training = write_tree(
        tmp_path / "training",
        {
            ".hidden/vendor/other_name.py": module(1).replace("\n", "\r\n\r\n"),
            "not_code.md": module(0),
            "m2.py": module(9),
        },
    )
    (training / "loop").symlink_to(training)
    single = write_tree(tmp_path, {"x.py": module(3)}) / "x.py"
    (tmp_path / "list.txt").write_text("x.py\ntraining\n")

    def paths(*exclude: Path) -> set[str]:
        options = [item for path in exclude for item in ("--exclude", path)]
        return {row["path"] for row in built(tmp_path / "a.jsonl", tree, *options)}

    assert paths(training) == {"m0.py", "m2.py", "m3.py", "m4.py"}
    assert "skipped, excluded by content: 1" in capsys.readouterr().err
    assert paths(training, single) == paths(tmp_path / "list.txt") == {"m0.py", "m2.py", "m4.py"}


# ---- files that are passed over -------------------------------------------------------------------------------------


def test_unfit_files_are_counted_and_not_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(
        tmp_path / "t",
        {
            "good.py": PLAIN,
            ".git/a.py": module(1),
            ".hidden.py": module(2),
            "node_modules/p/a.js": SOURCES["javascript"],
            "lib.min.js": SOURCES["javascript"],
            "made.py": "# This file is automatically generated; DO NOT EDIT\n" + module(3),
            "latin.py": "x = 'ä'\n".encode("latin-1"),
            "binary.py": b"x = 1\n\0",
            "wide.py": f"x = '{'a' * 2000}'\n" + module(4),
            "big.py": module(5) * 10_000,
            "wrong.py": "def f(:\n" + module(6),
            "skipped/a.py": module(7),
            "readme.md": "hello",
            "locked.py": module(8),
            "line\nbreak.py": module(9),
        },
    )
    (tree / "loop").symlink_to(tree)
    (tree / "link.py").symlink_to(tree / "good.py")
    os.mkfifo(tree / "pipe.py")
    original = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == "locked.py":
            raise PermissionError(13, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    rows = built(tmp_path / "a.jsonl", tree, "--skip", "skipped/*")
    assert {row["path"] for row in rows} == {"good.py"}
    captured = capsys.readouterr()
    assert captured.out == ""
    reported = dict(
        line.removeprefix("skipped, ").rsplit(": ", 1)
        for line in captured.err.splitlines()
        if line.startswith("skipped")
    )
    assert reported == {
        "--skip": "1",
        "another language": "1",
        "binary": "1",
        "folder of vendored or built files": "1",
        "generated or minified": "2",
        "hidden": "2",
        "larger than 1,000,000 bytes": "1",
        "lines over 1,000 bytes": "1",
        "not UTF-8": "1",
        "symbolic link": "2",
        "syntax errors": "1",
        "unprintable name": "1",
        "unreadable": "1",
    }


def test_the_table_counts_what_was_found_and_kept(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(tmp_path / "a.jsonl", tree / "pkg", tree / "src/sums.go", "--per_scenario", "5")
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().err.splitlines()}
    assert table["kept"] == ["/", "found", "python", "go"]
    assert table["method_signature"] == ["5", "/", "36", "2", "/", "2"]
    assert table["try_statement"] == ["0", "/", "0", "none"]


# ---- the output -----------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused command says."""
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_existing_file_is_kept_without_force(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("mine")
    assert "--force" in fails(capsys, tree, "--out", out)
    assert out.read_text() == "mine"


def test_wrong_options_are_refused_before_work(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "survey", lambda *_: pytest.fail("it went to work"))
    out = tmp_path / "a.jsonl"
    for arguments, words in (
        (("--languages", "python,cobol"), "'cobol'"),
        (("--scenarios", "loop"), "'loop'"),
        (("--per_scenario", "0"), "--per_scenario"),
        (("--held_out", "2"), "between 0 and 1"),
        (("--held_out", "1/0"), "1/20"),
        (("--split", "rest"), "--held_out"),
        (("--min_reference_chars", "9", "--max_reference_chars", "8"), "no reference"),
        (("--max_context_chars", "0"), "--max_context_chars"),
        (("--exclude", "/nowhere"), "/nowhere"),
    ):
        assert words in fails(capsys, tree, "--out", out, *arguments), arguments
    assert "/nowhere" in fails(capsys, "/nowhere", "--out", out)
    assert ".jsonl" in fails(capsys, tree, "--out", tmp_path / "a.json")
    assert "no directory" in fails(capsys, tree, "--out", tmp_path / "missing" / "a.jsonl")
    shutil.copytree(tree / "src", tmp_path / "other")
    assert "would both be called sums." in fails(capsys, tree / "src", tmp_path / "other", "--out", out)
    assert not out.exists()


def test_nothing_is_written_where_nothing_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "t", {"a.py": "def f(:\n"})
    assert "no hole" in fails(capsys, tmp_path / "t", "--out", tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_an_interrupt_leaves_the_old_file_and_no_other(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out" / "a.jsonl"
    out.parent.mkdir()
    out.write_text("old")
    original: Callable[[str], tuple[bytes, str]] = sources.read_source
    calls = 0

    def interrupted(path: str) -> tuple[bytes, str]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(path)

    where = "megatron_infer.eval.build.selection" if moment == "reading" else "megatron_infer.eval.build.command"
    monkeypatch.setattr(f"{where}.read_source", interrupted)
    assert run(tree, "--out", out, "--force") == 130
    assert [path.name for path in out.parent.iterdir()] == ["a.jsonl"] and out.read_text() == "old"


def test_a_source_that_changes_meanwhile_is_noticed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_infer.eval.build.command.read_source", lambda path: (b"x = 1\n", ""))
    assert "changed" in fails(capsys, tree, "--out", tmp_path / "a.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]
