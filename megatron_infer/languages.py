"""Languages by their files' names, and how each writes a comment line. The table is data (languages.json)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_EXTENSION = re.compile(r"\.\w+$")


@dataclass(frozen=True)
class Language:
    """A language as the header lines name it: `open` and `close` enclose a comment line."""

    name: str
    open: str
    close: str


def language_at(path: str) -> Language | None:
    """The language of a file by its extension, as upstream's header lines go by it; None where that does not tell."""
    match = _EXTENSION.search(path)
    return load_languages().get(match[0]) if match else None


def name_of_language(path: str) -> str:
    """The name of a file's language, or ""; beyond `language_at`, in any case of letters, and by names as Makefile."""
    language = language_at(path)
    file = re.split(r"[/\\]", path.lower())[-1]
    others = _other_names()
    return language.name if language else others.get(file) or others.get(Path(file).suffix, "")


@functools.cache
def _other_names() -> Mapping[str, str]:
    """Extension or file name in small letters -> the language's name, for what no header line goes by."""
    small = {extension.lower(): language.name for extension, language in sorted(load_languages().items())}
    return small | {name: entry["name"] for entry in _table().values() for name in entry.get("also", "").split()}


@functools.cache
def load_languages() -> Mapping[str, Language]:
    """File extension (with its dot, case-sensitive) -> language. Where an extension is missing there is no header."""
    return {
        extension: Language(entry["name"], entry["open"], entry["close"])
        for entry in _table().values()
        for extension in entry["extensions"].split()
    }


def _table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("languages.json").read_text("utf-8"))
    return table
