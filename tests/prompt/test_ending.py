"""Where completions end: a table over many languages, whole and in pieces, and what holds for any text at all."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_infer.checks import ENDINGS as MODES
from megatron_infer.ending import ending as ending_module
from megatron_infer.ending.ending import Ending, find_end
from megatron_infer.ending.scanner import Scanner, Syntax, columns, first_word, syntax_of
from megatron_infer.languages import load_languages
from tests.prompt.ending_cases import FIRST_CASES, Case
from tests.prompt.ending_kinds import KINDS

LANGUAGES = ("python", "javascript", "java", "c", "rust", "ruby", "lua", "shell", "klingon")
WORDS = ("a", "b1", "return x", "if a:", "else", "end", "} else {", "longer_line = 1", "é", " ", "    ", "\t")
MARKS = ("\n", "\n\n", "\r\n", "\r", *"()[]{}\"'`\\#,;:", '"""', "//", "/*", "*/", "--")
CASES = [*FIRST_CASES, *chain(*KINDS.values())]
CODE = st.lists(st.sampled_from(WORDS + MARKS), max_size=24).map("".join)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def stream(ending: Ending, pieces: list[str], *, is_complete: bool = True) -> tuple[str, str | None]:
    emitted = [ending.feed(piece)[0] for piece in pieces]
    rest, reason = ending.finish(is_complete)
    return "".join([*emitted, rest]), reason


def parts(case: Case) -> tuple[tuple[str, str, str, str], str, str, str | None]:
    _, language, file, text, answer, reason = case
    mode, _, name = language.rpartition(" ")
    prefix, suffix = file.split("▮")
    return (prefix, suffix, name, mode or "auto"), text, answer, reason


@pytest.mark.parametrize("case", CASES, ids=[f"{case[1]}: {case[0]}" for case in CASES])
def test_table(case: Case) -> None:
    (prefix, suffix, language, mode), text, answer, reason = parts(case)
    assert find_end(prefix, suffix, text, language, mode) == (answer, reason)
    assert stream(Ending(prefix, suffix, language, mode), list(text)) == (answer, reason)
    for cut in range(len(text) + 1):
        pieces = [text[:cut], text[cut:]]
        assert stream(Ending(prefix, suffix, language, mode), pieces) == (answer, reason), pieces


def test_the_table_is_broad() -> None:
    languages = Counter(case[1].split(" ")[-1] for case in CASES)
    assert len(CASES) == len({case[2:4] for case in CASES}) == sum(languages.values()) >= 195
    assert len(languages) >= 22
    assert sum(count >= 5 for count in languages.values()) >= 10, languages
    others = [case for case in CASES if case[1] != "python"]
    assert len(others) >= 100
    assert {case[5] for case in others} == {case[5] for case in CASES} - {"repeat"}
    for kind, cases in KINDS.items():
        assert len(cases) >= 4, kind
    for mark in ("\r\n", "\t"):
        assert sum(mark in case[2] for case in CASES) >= 10
    assert sum(case[2].endswith("▮") for case in CASES) >= 10, "an empty suffix"


@settings(max_examples=300, deadline=None)
@given(
    CODE, CODE, CODE, st.lists(st.integers(0, 200), max_size=8), st.sampled_from(LANGUAGES), st.sampled_from(MODES),
    st.booleans(),
)  # fmt: skip
@example("f(", ")\n", "a)\r\n", [3], "python", "auto", True)
@example("x = ", "\r\n", "1\r\n2", [2], "python", "line", True)
def test_pieces_make_no_difference(
    prefix: str, suffix: str, text: str, cuts: list[int], language: str, mode: str, is_complete: bool
) -> None:
    whole = stream(Ending(prefix, suffix, language, mode), [text], is_complete=is_complete)
    pieces = stream(Ending(prefix, suffix, language, mode), pieces_of(text, cuts), is_complete=is_complete)
    assert pieces == whole
    characters = Ending(prefix, suffix, language, mode)
    assert stream(characters, list(text), is_complete=is_complete) == whole


@settings(max_examples=300, deadline=None)
@given(CODE, CODE, CODE, st.sampled_from(LANGUAGES), st.sampled_from(MODES))
def test_an_answer_is_the_beginning_of_the_text(prefix: str, suffix: str, text: str, language: str, mode: str) -> None:
    answer, _ = find_end(prefix, suffix, text, language, mode)
    assert text.startswith(answer) or text.lstrip(" ").startswith(answer)
    if mode == "raw":
        assert answer == text


@settings(max_examples=300, deadline=None)
@given(CODE, CODE, CODE, CODE, st.sampled_from(LANGUAGES), st.sampled_from(MODES))
def test_once_a_rule_has_spoken_the_rest_does_not_count(
    prefix: str, suffix: str, text: str, more: str, language: str, mode: str
) -> None:
    ending = Ending(prefix, suffix, language, mode)
    emitted, reason = ending.feed(text)
    if reason is None:
        return
    assert ending.feed(more) == ("", reason)
    assert ending.finish() == ("", reason)
    assert find_end(prefix, suffix, text + more, language, mode) == (emitted, reason)


@settings(max_examples=300, deadline=None)
@given(CODE, CODE, CODE, CODE, st.sampled_from(LANGUAGES), st.sampled_from(MODES))
def test_what_is_emitted_is_never_taken_back(
    prefix: str, suffix: str, text: str, more: str, language: str, mode: str
) -> None:
    emitted, _ = Ending(prefix, suffix, language, mode).feed(text)
    for continuation in ("", more):
        assert find_end(prefix, suffix, text + continuation, language, mode)[0].startswith(emitted)


@settings(max_examples=300, deadline=None)
@given(CODE, CODE, CODE, st.sampled_from(LANGUAGES), st.sampled_from(MODES))
def test_cutting_twice_is_cutting_once(prefix: str, suffix: str, text: str, language: str, mode: str) -> None:
    """Of a block, too, unless that the answer is all there is tells the rules more: a last line that the suffix has."""
    answer, _ = find_end(prefix, suffix, text, language, mode)
    if mode in ("raw", "line"):
        assert find_end(prefix, suffix, answer, language, mode)[0] == answer
    emitted, reason = Ending(prefix, suffix, language, mode).feed(answer)
    assert reason is None or emitted == answer


@pytest.mark.parametrize("case", CASES, ids=[f"{case[1]}: {case[0]}" for case in CASES])
def test_the_answers_of_the_table_stay(case: Case) -> None:
    arguments, _, answer, _ = parts(case)
    prefix, suffix, language, mode = arguments
    assert find_end(prefix, suffix, answer, language, mode)[0] == answer


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "rule"),
    [
        ("x = ", "\n", "1\n", "line"),
        ("print(", ")\n", "1)", "closer"),
        ("def f():\n", "    return total(x)\n", "    x = 1\n    return total(x)\n", "line-below"),
        ("def f():\n    ", "\n", "return 1\n\nd", "dedent"),
        ("def f():\n    ", "\n", "x()\n\n\n", "blank"),
        ("    ", "\n", "x()\n    x()\n    x()\n", "repeat"),
        ("a + ", "b\n", "b\n", "rest-of-line"),
    ],
)
def test_a_rule_speaks_at_the_first_character_that_decides(prefix: str, suffix: str, text: str, rule: str) -> None:
    mode = "line" if rule == "line" else "auto"
    ending = Ending(prefix, suffix, "python", mode)
    reasons = [ending.feed(character)[1] for character in text]
    assert reasons == [None] * (len(text) - 1) + [rule]


def test_a_line_is_shown_while_it_comes_a_block_by_statements() -> None:
    line = Ending("x = ", "\n", "python", "line")
    assert [line.feed(piece)[0] for piece in ("1 + ", "2", "\n")] == ["1 +", " 2", ""]
    block = Ending("def f():\n    ", "\n", "python")
    assert [block.feed(piece)[0] for piece in ("a()", "\n", "    b(\n", "1)\n")] == ["", "a()", "", "\n    b(\n1)"]


def test_what_a_limit_cuts_ends_where_the_suffix_fits() -> None:
    block = Ending("def f(a):\n    ", "\n", "python")
    assert stream(block, ["b()\n    if a:\n        c"], is_complete=False) == ("b()", "unfinished")
    assert find_end("def f(a):\n    ", "\n", "b(1, 2", "python", is_complete=False) == ("b(1, 2", None)
    assert find_end("x = ", "\n", "b(1, 2", "python", "line", is_complete=False) == ("b(1, 2", None)


@pytest.mark.parametrize(
    ("language", "file", "mode"),
    [
        ("python", "x = foo(▮, 3)\n", "line"),
        ("python", "x = ▮ + 1\n", "line"),
        ("python", "# a ▮\n", "line"),
        ("python", "    s = 'a ▮'\n", "line"),
        ("c", "/* a ▮ */\n", "line"),
        ("python", "foo(▮)\n", "block"),
        ("python", "if a:▮\n", "block"),
        ("python", "def f():\n    ▮\n    return 1\n", "block"),
        ("python", "def f():\n▮    return 1\n", "block"),
        ("python", 'def f():\n    """▮\n    """\n', "block"),
        ("c", "int f() {▮}\n", "block"),
        ("shell", "x=$#▮\n", "block"),
    ],
)
def test_auto_chooses_by_prefix_and_suffix(language: str, file: str, mode: str) -> None:
    prefix, suffix = file.split("▮")
    assert Ending(prefix, suffix, language).mode == mode


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be one of raw, line, block, auto; got 'words'"):
        Ending("", "", "python", "words")


# ---- Languages and the scanner --------------------------------------------------------------------------------------


def test_every_language_of_a_header_line_is_known() -> None:
    for language in load_languages().values():
        assert syntax_of(language.name) != Syntax(), language.name
    assert syntax_of("klingon") == Syntax()
    assert syntax_of("C++") == syntax_of("cpp")
    assert syntax_of("TypeScript with JSX") == syntax_of("tsx")


def test_the_language_file_says_nothing_twice() -> None:
    path = Path(ending_module.__file__).with_name("languages.json")
    entries = json.loads(path.read_text(encoding="utf-8"))
    names = [name for entry in entries for name in entry["names"]]
    assert len(names) == len(set(names))
    known = {"names", *Syntax.__dataclass_fields__}
    assert all(entry.keys() <= known for entry in entries)


@pytest.mark.parametrize(
    ("language", "code", "open_", "until"),
    [
        ("python", "f(a, [b", "([", ""),
        ("python", "'(' + \"[\" + (", "(", ""),
        ("python", "x = '''(\n[", "", "'''"),
        ("python", "'''(''' + '' + (", "(", ""),
        ("python", "'not closed (\n(", "(", ""),
        ("python", "'\\'(' + (", "(", ""),
        ("python", "# (", "", "\n"),
        ("c", "/* ( */ {", "{", ""),
        ("c", "/*/ (", "", "*/"),
        ("c", "// (\n{", "{", ""),
        ("javascript", "`( ${a}\n(`[", "[", ""),
        ("rust", "fn f<'a>(x: &'a str, '{', '\"', [", "([", ""),
        ("shell", "$# ${#a} (", "(", ""),
        ("shell", "ls # (", "", "\n"),
        ("lua", "--[[ (\n( ]] {", "{", ""),
        ("lua", "-- [ (\n{", "{", ""),
        ("ocaml", "(* ( *) [", "[", ""),
        ("haskell", "f (g x' {- ( -} [", "([", ""),
        ("html", "<!-- ( --> [", "[", ""),
    ],
)
def test_scanner(language: str, code: str, open_: str, until: str) -> None:
    scanner = Scanner(syntax_of(language))
    scanner.feed(code)
    assert "".join(bracket for bracket, _ in scanner.open) == open_
    assert scanner.until == until


def test_scanner_tells_where_brackets_stand() -> None:
    scanner = Scanner(syntax_of("c"))
    scanner.feed("x)\n  }\n\tf({\n")
    assert scanner.closed == [(")", None), ("}", 2)]
    assert scanner.open == [("(", 4), ("{", 4)]


def test_columns_and_words() -> None:
    assert [columns(line) for line in ("", "a", "  a", "\ta", " \ta", "\t a")] == [0, 0, 2, 4, 4, 5]
    assert [first_word(line) for line in ("  else:", "} else", "@a.b", "", "x1 = 2")] == ["else", "", "@a", "", "x1"]
