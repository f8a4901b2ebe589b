"""Syntax trees: every language has a parser, extensions name languages."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_infer.eval import syntax
from tests.eval.sources import EXTENSIONS, SOURCES


def parses(language: str, text: str) -> bool:
    return not syntax.parse(language, text).root_node.has_error


@pytest.mark.parametrize("language", SOURCES)
def test_a_whole_file_parses_and_half_of_it_does_not(language: str) -> None:
    text = SOURCES[language]
    assert parses(language, text)
    assert parses(language, text.replace("\n", "\r\n"))
    assert not parses(language, text[: text.index("limit")])


def test_a_missing_token_is_an_error() -> None:
    assert parses("java", "class A { int x = 1; }")
    assert not parses("java", "class A { int x = 1 }")


def test_jsx_needs_its_own_grammar() -> None:
    assert parses("tsx", "const a = <b>c</b>;")
    assert not parses("typescript", "const a = <b>c</b>;")


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
