"""Checks of single values, with errors that say what is allowed; fields of options. Knows no names and no files."""

from __future__ import annotations

import math
import numbers
import re
import sys
from collections.abc import Callable
from dataclasses import field
from typing import Any

ENDINGS = ("raw", "line", "block", "auto")
"""Where an answer may end; see ending.ending."""


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse anything but one of `allowed` (ValueError)."""
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {_shown(value)}")


def positive_int(name: str, value: Any) -> None:
    """Refuse anything but an integer from 1 on (ValueError)."""
    int_in(name, value, 1, 2**63 - 1)


def int_in(name: str, value: Any, low: int, high: int) -> None:
    """Refuse anything but an integer from `low` to `high` (ValueError)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {_shown(value)}")


def finite(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Refuse anything but a finite number from `low` to `high` (ValueError)."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not low <= value <= min(high, sys.float_info.max):
        bounds = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {_shown(value)}")


def boolean(name: str, value: Any) -> None:
    """Refuse anything but True or False, "false" above all, which is true (ValueError)."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for a message; files may hold megabytes of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_text(text: str, name: str = "text") -> None:
    """Raise ValueError where `text` cannot be written as UTF-8, i.e. holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; read the file "
            'with errors="replace", or cut text only between whole characters'
        ) from None


def option(default: Any, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field whose help text the command lines show; `parse` reads it, or an item of it, from there."""
    return field(default=default, metadata={"help": text, "parse": parse})


def unescaped(text: str) -> str:
    r"""Text typed into a shell, in which \n, \r, \t, \\ and \xNN stand for characters."""
    known = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\]|x[0-9a-fA-F]{2})", lambda m: known.get(m[1]) or chr(int(m[1][1:], 16)), text)
