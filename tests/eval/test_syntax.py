"""Syntax trees: every language has a parser, extensions name languages, offsets count characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_infer.eval import syntax
from tests.eval.sources import EXTENSIONS, SOURCES


@pytest.mark.parametrize("language", SOURCES)
def test_a_whole_file_parses_and_half_of_it_does_not(language: str) -> None:
    text = SOURCES[language]
    assert syntax.parses(language, text)
    assert syntax.parses(language, text.replace("\n", "\r\n"))
    assert not syntax.parses(language, text[: text.index("limit")])


def test_a_missing_token_is_an_error() -> None:
    assert syntax.parses("java", "class A { int x = 1; }")
    assert not syntax.parses("java", "class A { int x = 1 }")


def test_jsx_needs_its_own_grammar() -> None:
    assert syntax.parses("tsx", "const a = <b>c</b>;")
    assert not syntax.parses("typescript", "const a = <b>c</b>;")


def test_extensions_name_languages() -> None:
    for language, extension in EXTENSIONS.items():
        assert syntax.language_of(f"dir.d/File{extension}") == language
        assert syntax.language_of(Path(f"FILE{extension.upper()}")) == language
    assert syntax.language_of("a.tsx") == "tsx"
    assert [syntax.language_of(path) for path in ("a.txt", "Makefile", ".py", "py", "")] == [""] * 5


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cobol'.*python, java, cpp"):
        syntax.parser("cobol")


def test_a_parser_is_made_once() -> None:
    assert syntax.parser("go") is syntax.parser("go")


@given(st.text(st.characters(exclude_characters="\r\n'\\\0"), max_size=30), st.text("xyz", min_size=1, max_size=5))
def test_byte_offsets_become_character_offsets_even_behind_lone_surrogates(word: str, name: str) -> None:
    text = f"'{word}'\n{name} = 1\n"
    node = syntax.parse("python", text).root_node.named_children[-1]
    source = syntax.encode(text)
    start, end = (syntax.char_offset(source, offset) for offset in (node.start_byte, node.end_byte))
    assert text[start:end] == f"{name} = 1"
