"""Syntax trees: a tree-sitter parser per language, languages by file extension.

Owns the names of the languages that the rest of eval speaks of. Knows no benchmark and no scenario.
"""

from __future__ import annotations

import functools
from pathlib import PurePath

import tree_sitter_c_sharp
import tree_sitter_cpp
import tree_sitter_go
import tree_sitter_java
import tree_sitter_javascript
import tree_sitter_python
import tree_sitter_rust
import tree_sitter_typescript
from tree_sitter import Language, Parser, Tree

_GRAMMARS = {
    "python": (tree_sitter_python.language, ".py .pyw"),
    "java": (tree_sitter_java.language, ".java"),
    "cpp": (tree_sitter_cpp.language, ".cc .cpp .cxx .c++ .h .hh .hpp .hxx .inl .ipp .tpp"),
    "javascript": (tree_sitter_javascript.language, ".js .jsx .mjs .cjs"),
    "typescript": (tree_sitter_typescript.language_typescript, ".ts .mts .cts"),
    "tsx": (tree_sitter_typescript.language_tsx, ".tsx"),
    "csharp": (tree_sitter_c_sharp.language, ".cs"),
    "go": (tree_sitter_go.language, ".go"),
    "rust": (tree_sitter_rust.language, ".rs"),
}

LANGUAGES = tuple(_GRAMMARS)
"""Every name that `parser` takes. "tsx" is TypeScript with JSX, a grammar of its own."""

_EXTENSIONS = {extension: name for name, (_, extensions) in _GRAMMARS.items() for extension in extensions.split()}


def language_of(path: str | PurePath) -> str:
    """The language of a file by its extension, or "" where no grammar is known. A `.h` counts as C++."""
    return _EXTENSIONS.get(PurePath(path).suffix.lower(), "")


@functools.cache
def parser(language: str) -> Parser:
    """The parser of a language, one per process. Raises ValueError for a name that is not in LANGUAGES."""
    if language not in _GRAMMARS:
        raise ValueError(f"there is no grammar for {language!r}; known are {', '.join(LANGUAGES)}")
    grammar, _ = _GRAMMARS[language]
    return Parser(Language(grammar()))


def encode(text: str) -> bytes:
    """UTF-8, as the parsers take it. A lone surrogate becomes "?": characters keep their number."""
    return text.encode("utf-8", "replace")


def parse(language: str, text: str) -> Tree:
    """The syntax tree of a text. Its offsets count bytes of `encode(text)`."""
    return parser(language).parse(encode(text))
