"""Checks of single values, with errors that say what is allowed; fields of options. Knows no names and no files."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

ENDINGS = ("raw", "line", "block", "auto")
"""Where an answer may end; see ending.ending."""


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse anything but one of `allowed` (ValueError)."""
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def positive_int(name: str, value: Any) -> None:
    """Refuse anything but an integer from 1 on (ValueError)."""
    int_in(name, value, 1, 2**63 - 1)


def int_in(name: str, value: Any, low: int, high: int) -> None:
    """Refuse anything but an integer from `low` to `high` (ValueError)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def finite(name: str, value: Any, *, low: float, high: float = math.inf) -> None:
    """Refuse anything but a finite number from `low` to `high` (ValueError)."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        bounds = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def option(default: Any, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field whose help text the command lines show; `parse` reads it, or an item of it, from there."""
    return field(default=default, metadata={"help": text, "parse": parse})


def unescaped(text: str) -> str:
    r"""Text typed into a shell, in which \n, \r, \t, \\ and \xNN stand for characters."""
    known = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\]|x[0-9a-fA-F]{2})", lambda m: known.get(m[1]) or chr(int(m[1][1:], 16)), text)
