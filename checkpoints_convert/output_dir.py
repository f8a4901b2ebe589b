"""An output directory that appears under its name complete and flushed to disk, or not at all.

Owns free space, what may be replaced, and what a killed run left behind. Knows file names, not their contents.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_infer.files import flush

_WEIGHTS = re.compile(r"(pytorch_)?model[\w.-]*\.(safetensors|bin)|[^/]+\.pt")
_COMPANIONS = re.compile(
    r"(config|generation_config|manifest|example|special_tokens_map|added_tokens|vocab|tokenizer|tokenizer_config)\.json"
    r"|(pytorch_)?model\.(safetensors|bin)\.index\.json|tokenizer\.model|merges\.txt|chat_template\.jinja"
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def appearing(out_dir: str | Path, num_bytes: int, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out_dir` that takes its place when the block succeeds, and vanishes when it fails.

    What an earlier, killed run for the same `out_dir` left behind is removed first.

    Args:
        num_bytes: how much will be written; refused at once where the disk has less.
        force: replace `out_dir` if it is a checkpoint directory, that is: weights, their companions, and nothing else.
    Raises:
        ValueError: `out_dir` is taken or being written, or the disk is full; nothing half-written is kept.
    """
    target = Path(out_dir).resolve()
    _clean_up_after_killed_runs(target)
    _check_taken(target, force)
    _check_space(target, num_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the checkpoint from everyone but its writer
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        _put_in_place(temporary, target)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ValueError(
            f"the disk of {target.parent} became full ({error.strerror}); {num_bytes} bytes are needed. Nothing of "
            f"{target.name} was kept; free some space or choose another output directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; a checkpoint that stands there is moved aside for the moment, as directories cannot be swapped."""
    old = _aside(target)
    is_taken = not _is_free(target)
    if is_taken:
        os.replace(target, old)
    os.replace(temporary, target)
    flush(target.parent)
    if is_taken:
        shutil.rmtree(old)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _clean_up_after_killed_runs(target: Path) -> None:
    old = _aside(target)
    if old.is_dir() and not _is_free(target):
        shutil.rmtree(old)
    elif old.is_dir():
        os.replace(old, target)  # killed between the two renames: what was there before is still whole
    for leftover in target.parent.glob(f"{glob.escape(f'.{target.name}.part-')}*"):
        lock = os.open(leftover, os.O_RDONLY)
        try:
            if not _try_lock(lock):
                raise ValueError(
                    f"another process is writing {target}; wait for it, or if there is none remove {leftover}"
                )
            shutil.rmtree(leftover)
        finally:
            os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Whether we got the lock, which the system lets go of when its holder dies. Some network disks have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _check_taken(target: Path, force: bool) -> None:
    if _is_free(target):
        return
    if not force:
        raise ValueError(
            f"{target} exists and is not an empty directory; choose another output directory, or replace it with force "
            "(--force) if it is a checkpoint"
        )
    foreign = (
        [path.name for path in sorted(target.iterdir()) if not _belongs(path)] if target.is_dir() else [target.name]
    )
    if foreign or not any(_WEIGHTS.fullmatch(path.name) for path in target.iterdir()):
        reason = f"there is {foreign[0]!r}" if foreign else "there are no weights"
        raise ValueError(f"{target} is not only a checkpoint ({reason}), so it is never replaced; remove it yourself")


def _belongs(path: Path) -> bool:
    is_known = _WEIGHTS.fullmatch(path.name) or _COMPANIONS.fullmatch(path.name)
    return bool(is_known) and path.is_file() and not path.is_symlink()


def _check_space(target: Path, num_bytes: int) -> None:
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ValueError(
            f"{num_bytes} bytes are needed for {target}, and its disk has {free} free; free some space or choose "
            "another output directory"
        )
