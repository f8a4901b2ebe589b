"""A row's fields as typed values: text, ids, names of languages. No benchmark.

What reads a field raises KeyError for a missing field and ValueError for one of the wrong kind, naming it.
"""

from __future__ import annotations

import hashlib
import json

from megatron_infer.eval.cases import Row
from megatron_infer.text.fim import FimPrompt

_LANGUAGES = {
    "py": "python", "js": "javascript", "ts": "typescript", "tsx": "typescript", "c++": "cpp", "cplus": "cpp",
    "c#": "csharp", "c_sharp": "csharp", "cs": "csharp", "golang": "go", "rs": "rust",
}  # fmt: skip
"""Other names of languages, as data sets write them."""


def text_of(row: Row, field: str) -> str:
    """The text of a field."""
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, not {type(value).__name__}")
    return value


def optional_text_of(row: Row, field: str | None, default: str) -> str | None:
    """The text of `field`, which must be there; if that is None, of the field `default` where it is there, not null."""
    if field is not None:
        return text_of(row, field)
    return None if row.get(default) is None else text_of(row, default)


def id_of(row: Row, field: str) -> str:
    """A task id: text that is not empty, or a whole number."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"field {field!r} must be text or a whole number, not {value!r}")
    return str(value)


def content_id(prompt: FimPrompt) -> str:
    """A task id for a row that has none, from path, prefix and suffix; it does not depend on the row's place."""
    content = json.dumps([prompt.path, prompt.prefix, prompt.suffix])
    return f"sha256-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def language_named(name: str) -> str:
    """Our name of a language, from any other; a name that is not known stays, in small letters."""
    name = name.strip().lower()
    return _LANGUAGES.get(name, name)
