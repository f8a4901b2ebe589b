"""Small dealings with files that several rooms need: hashes, JSON objects, and what has reached the disk."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

_HASH_CHUNK_BYTES = 8 << 20
_MAX_JSON_BYTES = 64 << 20
"""Twice the largest tokenizer.json in use. Parsing takes a second and ten times the memory."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the disk hold a file's contents, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object, with or without a byte order mark.

    Raises:
        ValueError: naming the file, whatever is wrong with it: its kind, its size, its text, its nesting.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is not a file of at most {_MAX_JSON_BYTES >> 20} MiB")
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check the path, and who may read it") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise broken_file(path, f"is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise broken_file(path, "must hold a JSON object")
    return raw


def broken_file(path: Path, why: str) -> ValueError:
    """The error for a model's file that is not what it should be, with the remedy."""
    remedy = "it may be truncated, copy it again from the model's original files"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                why, remedy = "cannot be read (it is a Git LFS pointer)", "fetch the real file with `git lfs pull`"
    return ValueError(f"{path} {' '.join(why.split())[:300]}; {remedy}")
