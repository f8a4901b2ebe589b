"""Syntax trees: a tree-sitter parser per language, languages by file extension.

Owns the names of the languages that the rest of eval speaks of. Knows no benchmark and no scenario.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path, PurePath

from tree_sitter import Language, Parser, Tree

_GRAMMARS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("grammars.json").read_text(encoding="utf-8"))

LANGUAGES = tuple(_GRAMMARS)
"""Every name that `parser` takes. "tsx" is TypeScript with JSX, a grammar of its own."""

_EXTENSIONS = {extension: name for name, entry in _GRAMMARS.items() for extension in entry["extensions"].split()}


def language_of(path: str | PurePath) -> str:
    """The language of a file by its extension, or "" where no grammar is known. A `.h` counts as C++."""
    return _EXTENSIONS.get(PurePath(path).suffix.lower(), "")


@functools.cache
def parser(language: str) -> Parser:
    """The parser of a language, one per process. Raises ValueError for a name that is not in LANGUAGES."""
    if language not in _GRAMMARS:
        raise ValueError(f"there is no grammar for {language!r}; known are {', '.join(LANGUAGES)}")
    entry = _GRAMMARS[language]
    return Parser(Language(getattr(importlib.import_module(entry["module"]), entry["function"])()))


def encode(text: str) -> bytes:
    """UTF-8, as the parsers take it. A lone surrogate becomes "?": characters keep their number."""
    return text.encode("utf-8", "replace")


def parse(language: str, text: str) -> Tree:
    """The syntax tree of a text. Its offsets count bytes of `encode(text)`."""
    return parser(language).parse(encode(text))
