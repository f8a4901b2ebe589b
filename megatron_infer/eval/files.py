"""Files that survive a crash: replaced whole and flushed, or appended to line by line and flushed now and then.

Knows nothing of what is in them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_infer.files import flush

_UNFINISHED = ".part-"
_SURROGATE = re.compile("[\ud800-\udfff]")
_FLUSH_SECONDS = 2.0
"""What a power failure may cost. A killed process loses nothing: its lines are in the system's hands."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that appears as `path` complete and flushed when the block succeeds; until then `path` is untouched.

    Raises OSError: as the system does (a full disk, say); nothing half-written is kept.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{_UNFINISHED}", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the file from everyone but its writer
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    flush(path.parent)


def drop_unfinished(folder: Path) -> None:
    """Remove what killed processes left of files that they were replacing; nobody else may be writing there."""
    for path in folder.glob(f".*{_UNFINISHED}*"):
        path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a JSON value, indented."""
    with replacing(path) as file:
        file.write(_to_json(value, indent=1) + "\n")


def to_line(value: Any) -> str:
    """A JSON value on a line of its own."""
    return _to_json(value, separators=(",", ":")) + "\n"


def _to_json(value: Any, **layout: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, **layout)
    # UTF-8 has no lone surrogates, which JSON may escape, and which stand for odd bytes in names of files.
    return json.dumps(value, **layout) if _SURROGATE.search(text) else text


class LineFile:
    """A new file that lines are appended to, each with one write: a crash can tear the last line only."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        flush(path.parent)
        self._flushed = time.monotonic()

    def append(self, value: Any) -> None:
        """Write a JSON value as a line.

        Raises OSError: the disk is full or broken; what was torn is cut off again, so that the file stays whole.
        """
        data = to_line(value).encode()
        end = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Have the disk hold everything appended so far."""
        os.fsync(self._descriptor)
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)
