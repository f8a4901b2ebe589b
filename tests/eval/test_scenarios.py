"""What a hole is, in every language: the table of sources.py against what the syntax trees give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_infer.eval.build.scenarios import SCENARIOS, find_holes, load_grammars
from megatron_infer.eval.syntax import LANGUAGES
from tests.eval.sources import HOLES, SOURCES


def references(language: str, text: str) -> dict[str, list[str]]:
    """Scenario -> references, in the order of the text."""
    source = text.encode()
    found: dict[str, list[str]] = {scenario: [] for scenario in SCENARIOS}
    for hole in find_holes(language, source) or []:
        found[hole.scenario].append(source[hole.start : hole.end].decode())
    return found


@pytest.mark.parametrize("language", SOURCES)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_scenario_is_found_where_a_reader_finds_it(language: str, newline: str) -> None:
    found = references(language, SOURCES[language].replace("\n", newline))
    for scenario in SCENARIOS:
        if scenario in load_grammars()[language].absent:
            assert found[scenario] == []
        elif scenario not in ("single_line", "empty"):
            expected = [text.replace("\n", newline) for text in HOLES[language][scenario]]
            assert found[scenario] == expected, scenario


@pytest.mark.parametrize("language", SOURCES)
def test_a_single_line_stands_alone_and_an_empty_hole_follows_it(language: str) -> None:
    source, (line, before) = SOURCES[language].encode(), HOLES[language]["single_line"]
    holes = find_holes(language, source)
    assert holes is not None
    singles = [hole for hole in holes if hole.scenario == "single_line"]
    empties = [hole.start for hole in holes if hole.scenario == "empty"]
    assert any(
        source[hole.start : hole.end].decode() == line and source[: hole.start].decode().endswith(before)
        for hole in singles
    )
    assert {hole.end for hole in singles} <= set(empties)
    assert not any(source[hole.start : hole.end].startswith((b"#", b"//")) for hole in singles)
    for hole in singles:
        start = source.rfind(b"\n", 0, hole.start) + 1
        assert source[start : source.index(b"\n", start)].strip() == source[hole.start : hole.end]
    assert all(source[offset : source.find(b"\n", offset)].strip() == b"" for offset in empties)


def test_only_missing_constructs_are_missing() -> None:
    absent = {(language, scenario) for language, grammar in load_grammars().items() for scenario in grammar.absent}
    assert absent == {("go", "try_statement"), ("rust", "try_statement")}
    assert set(load_grammars()) == set(LANGUAGES)
    for language, grammar in load_grammars().items():
        given_ = set(grammar.statements.values()) | ({"while_statement"} if grammar.for_clauses else set())
        assert given_ | set(grammar.absent) == {name for name in SCENARIOS if name.endswith("_statement")}, language


def test_tsx_has_the_holes_of_typescript() -> None:
    assert references("tsx", SOURCES["typescript"]) == references("typescript", SOURCES["typescript"])


@pytest.mark.parametrize("language", SOURCES)
def test_a_file_with_a_syntax_error_has_no_holes(language: str) -> None:
    assert find_holes(language, SOURCES[language].encode() + b"\n((((") is None


def test_an_else_if_a_value_and_a_branch_without_braces_are_no_statements() -> None:
    body = "if (a) { b(); } else if (c) { d(); } if (e) for (;;) { } return switch (a) { default -> 1; };"
    found = references("java", f"class A {{ int f() {{ {body} }} }}")
    assert found["if_statement"] == ["if (a) { b(); } else if (c) { d(); }", "if (e) for (;;) { }"]
    assert found["for_statement"] == found["switch_statement"] == []
    assert references("rust", "fn f() { let a = match b { _ => 1 }; }")["switch_statement"] == []


@pytest.mark.parametrize(
    ("count", "sizes"), [(2, None), (3, (1, 1, 1)), (4, (1, 2, 1)), (5, (2, 1, 2)), (6, (2, 2, 2)), (7, (2, 3, 2))]
)
def test_a_body_is_cut_into_thirds_by_statements(count: int, sizes: tuple[int, int, int] | None) -> None:
    lines = [f"a{index} = {index}" for index in range(count)]
    found = references("python", "def f():\n    '''What it does.'''\n    " + "\n    # why\n    ".join(lines) + "\n")
    parts = [found[f"method_body_{name}"] for name in ("top", "mid", "bottom")]
    if sizes is None:
        assert parts == [[], [], []]
    else:
        top, mid, _ = sizes
        cut = (lines[:top], lines[top : top + mid], lines[top + mid :])
        assert parts == [["\n    # why\n    ".join(part)] for part in cut]


def test_a_comment_counts_right_above_and_with_words_only() -> None:
    for above, counts in [
        ("# Adds both numbers.\n", True),
        ("# Adds both\n# numbers.\n", True),
        ("# Adds both numbers.\n#\n", True),
        ("# 把两个数相加起来\n", True),
        ("# Adds both numbers.\n\n", False),
        ("# --------\n", False),
        ("# noqa\n", False),
        ("x = 1  # Adds both numbers.\n", False),
    ]:
        found = references("python", f"{above}def add(a, b):\n    return a + b\n")
        assert found["method_with_comment"] == (["def add(a, b):\n    return a + b"] if counts else []), above


def test_a_comment_above_something_else_on_the_line_is_not_the_methods() -> None:
    assert references("javascript", "// Adds both numbers.\nfunction f() {}\n")["method_with_comment"]
    assert not references("javascript", "// Adds both numbers.\nlet a = 1; function f() {}\n")["method_with_comment"]


def test_a_method_in_a_method_has_its_own_holes() -> None:
    found = references("python", "def f():\n    def g():\n        return 1\n    return g\n")
    assert found["method_signature"] == ["def f():", "def g():"]
    assert found["method_body"] == ["def g():\n        return 1\n    return g", "return 1"]


def test_a_hole_does_not_end_with_the_line_break_of_its_node() -> None:
    assert references("cpp", "int f() {\n#define A 1\n    return A;\n}\n")["single_line"] == [
        "#define A 1",
        "return A;",
    ]


def test_deep_nesting_is_walked_without_recursion() -> None:
    source = "def f():\n    x = " + "(" * 3000 + "1" + ")" * 3000 + "\n"
    assert references("python", source)["single_line"] == [source.split("\n")[1].strip()]


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\"'\\"), max_size=20),
    st.sampled_from(["\n", "\r\n"]),
)
def test_offsets_are_right_in_any_alphabet(word: str, newline: str) -> None:
    text = f"# {word}\ndef f(a):\n    b = '{word}'  \n    return a, '{word}'\n".replace("\n", newline)
    found = references("python", text)
    assert found["single_line"] == [f"b = '{word}'", f"return a, '{word}'"]
    assert found["method_signature"] == ["def f(a):"]
