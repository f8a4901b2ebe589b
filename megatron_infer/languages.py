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
    """The language of a file by its path; None where that does not tell."""
    match = _EXTENSION.search(path)
    return load_languages().get(match[0]) if match else None


@functools.cache
def load_languages() -> Mapping[str, Language]:
    """File extension (with its dot, case-sensitive) -> language. Where an extension is missing there is no header."""
    table = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    return {
        extension: Language(entry["name"], entry["open"], entry["close"])
        for entry in table.values()
        for extension in entry["extensions"].split()
    }
