"""The directory of one run: what was asked, what is done, what was in hand when a process died, and the final files.

A run's identity is its fingerprint, not its processes: attempts may have any number of ranks. Knows no engine.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_infer.eval.files import LineFile, drop_unfinished, replacing, to_line, write_json
from megatron_infer.files import flush, sha256_of

FORMAT, FORMAT_VERSION = "megatron_infer-eval", 1
COMPLETIONS, TIMINGS, PREDICTIONS = "completions.jsonl", "timings.jsonl", "predictions.jsonl"
MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
_PARTS = "parts"
_LOCK = ".lock"
_LOCK_SECONDS = 15.0
_MAX_OPEN_PARTS = 256
"""Of the 1,024 files that a process may often have: many ranks over many attempts leave more parts than that."""

SHARED_CRASHES = 2
"""A key that was in hand, among others, when processes died so often is suspected and from then on computed alone."""
LONE_CRASHES = 3
"""A key that was alone in hand when processes died so often is given up."""

GIVEN_UP = f"given up: {LONE_CRASHES} times the process died while it computed this prompt and no other"
"""The error of such a key."""

RUN_ON_SHARE = 0.2
"""So many completions that were cut at max_new_tokens say more about the cut than about the model."""

Key = tuple[str, int]
"""task_id and sample_idx: what is done once, whichever process does it."""


@dataclass(frozen=True)
class Place:
    """Where the line of a finished key stands."""

    part: Path
    offset: int


@dataclass
class State:
    """What the parts of all attempts say.

    done: finished keys; where two attempts finished one, the first counts. shared, alone: how often a key was in
    hand, with others or by itself, when its process died.
    """

    done: dict[Key, Place] = field(default_factory=dict)
    shared: Counter[Key] = field(default_factory=Counter)
    alone: Counter[Key] = field(default_factory=Counter)

    def suspects(self) -> list[Key]:
        """Keys to compute one at a time, those that died alone least often first."""
        found = [
            key for key in self.shared.keys() | self.alone.keys() if key not in self.done and self._is_suspect(key)
        ]
        return sorted(found, key=lambda key: (self.alone[key], key))

    def poison(self) -> list[Key]:
        """Keys to give up."""
        return sorted(key for key, crashes in self.alone.items() if crashes >= LONE_CRASHES and key not in self.done)

    def _is_suspect(self, key: Key) -> bool:
        return self.alone[key] < LONE_CRASHES and (self.alone[key] > 0 or self.shared[key] >= SHARED_CRASHES)


class RunDirectory:
    """One run's files. The process that holds the lock (world rank 0) alone changes what is not a part."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and keep other runs out of it.

        Raises ValueError: it cannot be written to or locked, or another run is at work there and does not end within 15
        s, as the orphans of a killed launcher do.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A file, not the directory itself: NFS, on which several hosts share a disk, locks only what is open for
            # writing.
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            if not _lock(descriptor):
                raise ValueError(f"another run is writing to {self.path}; wait for it or choose another --out")
            yield
        finally:
            os.close(descriptor)

    def manifest(self) -> dict[str, Any] | None:
        """What manifest.json says; None where there is none. ValueError for a directory that is not a run."""
        path = self.path / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            foreign = sorted(p.name for p in self.path.iterdir() if p.name != _PARTS and not p.name.startswith("."))
            if foreign:
                raise ValueError(
                    f"{self.path} is not empty and not a run ({foreign[0]}); choose another directory"
                ) from None
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another directory") from None
        if not isinstance(raw, dict) or (raw.get("format"), raw.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path} was not written by this version of eval run; choose another directory")
        return raw

    def check(self, known: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        """Refuse to go on with other parameters (ValueError that lists the differences)."""
        found = differences(known["fingerprint"], fingerprint)
        if changes := "; ".join(f"{name}: was {was!r}, now {now!r}" for name, was, now in found):
            raise ValueError(
                f"{self.path} holds a run with other parameters, and a run is never continued with others. {changes}. "
                "Repeat the old parameters or choose another --out"
            )

    def begin(self, manifest: Mapping[str, Any], attempt: Mapping[str, Any]) -> int:
        """Record that an attempt begins; its number, from 1."""
        (self.path / _PARTS).mkdir(exist_ok=True)
        drop_unfinished(self.path)
        attempts = manifest.get("attempts", [])
        number = len(attempts) + 1
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
        write_json(self.path / MANIFEST, {**value, "attempts": [*attempts, {"attempt": number, **attempt}]})
        return number

    @property
    def success(self) -> dict[str, Any] | None:
        """What _SUCCESS says, or None while the run is not finished."""
        path = self.path / SUCCESS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def open_part(self, attempt: int, replica: int) -> AttemptLog:
        """The file that one replica of an attempt writes."""
        return AttemptLog(self.path / _PARTS / f"{attempt:04d}-{replica:04d}.jsonl")

    def state(self) -> State:
        """Read all parts; of a torn line nothing counts."""
        state = State()
        for part in sorted((self.path / _PARTS).glob("*.jsonl")):
            _read_part(part, state)
        return state

    def finish(
        self, keys: Sequence[Key], predict: Callable[[Key, dict[str, Any]], dict[str, Any]], seconds: float
    ) -> dict[str, Any]:
        """Merge the parts into the final files, in the order of `keys`; then write _SUCCESS, then drop the parts.

        Args:
            predict: the official output row of a key, given its completion. seconds: the last attempt took, once the
                model was loaded.
        Raises ValueError: a key is missing: the parts of some replica are not in this directory.
        """
        state = self.state()
        missing = [key for key in keys if key not in state.done]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(keys)} completions are not in {self.path} (first: {missing[0]}); all replicas "
                "must write to one directory, on a disk that all hosts share"
            )
        num_given_up, reasons = 0, Counter[str]()
        with ExitStack() as stack:
            outputs = [stack.enter_context(replacing(self.path / name)) for name in (COMPLETIONS, TIMINGS, PREDICTIONS)]
            for key, row in zip(keys, _rows(state, keys), strict=True):
                reasons[row["done"]["finish_reason"]] += 1
                num_given_up += row["done"]["error"] == GIVEN_UP
                for output, value in zip(outputs, (row["done"], row["timing"], predict(key, row["done"])), strict=True):
                    output.write(to_line(value))
        success = {
            "num_cases": len({task_id for task_id, _ in keys}), "num_completions": len(keys),
            "num_errors": reasons["error"], "num_by_finish_reason": dict(sorted(reasons.items())),
            "num_quarantined": num_given_up, "seconds": seconds,
            "sha256": {name: sha256_of(self.path / name) for name in (COMPLETIONS, TIMINGS, PREDICTIONS)},
        }  # fmt: skip
        write_json(self.path / SUCCESS, success)
        self.drop_parts()
        return success

    def drop_parts(self) -> None:
        """Remove what the final files hold as well."""
        for part in (self.path / _PARTS).glob("*.jsonl"):
            part.unlink()
        if (self.path / _PARTS).is_dir():
            (self.path / _PARTS).rmdir()
            flush(self.path)


class AttemptLog:
    """What one replica did in one attempt: keys as they are begun, their results, and how it ended."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def begin(self, keys: Iterable[Key], *, alone: bool) -> None:
        """These keys are about to be computed, with others or alone."""
        self._file.append({"begun": [list(key) for key in keys], "alone": alone})

    def done(self, completion: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """A key is finished; both mappings name it."""
        self._file.append({"done": completion, "timing": timing})

    def end(self, reason: str) -> None:
        """The attempt ends in good order: what is still in hand was not the cause."""
        self._file.append({"ended": reason})

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def key_of(row: Mapping[str, Any]) -> Key:
    """The key that a row of any of the final files names."""
    return row["task_id"], row["sample_idx"]


def run_on_warning(num_by_finish_reason: Mapping[str, int]) -> str | None:
    """What to tell the user where too many completions ended at max_new_tokens; None where they did not."""
    count, total = num_by_finish_reason.get("length", 0), sum(num_by_finish_reason.values())
    if count <= RUN_ON_SHARE * total:
        return None
    return (
        f"warning: {count} of {total} completions ended at max_new_tokens: the model ran on past the hole, or had too "
        "little room. eval score --truncate raw,line,suffix,ending,official compares where to cut; eval run --ending "
        "auto ends answers while they are written"
    )


def _lock(descriptor: int) -> bool:
    """Whether we got the lock within _LOCK_SECONDS; the system takes it from a process that dies."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError as error:
            raise ValueError(f"--out lies on a disk without file locks ({error.strerror}); choose another") from None
        else:
            return True


def _read_part(part: Path, state: State) -> None:
    in_hand: dict[Key, bool] = {}
    with part.open("rb") as file:
        offset = 0
        for line in file:
            place, offset = Place(part, offset), offset + len(line)
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "begun" in row:
                in_hand.update(((task_id, sample_idx), row["alone"]) for task_id, sample_idx in row["begun"])
            elif "done" in row:
                key = key_of(row["done"])
                in_hand.pop(key, None)
                state.done.setdefault(key, place)
            else:
                in_hand.clear()
    for key, alone in in_hand.items():
        (state.alone if alone else state.shared)[key] += 1


def _rows(state: State, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
    """The lines of finished keys, in the order asked for; only their places are held in memory."""
    files: dict[Path, IO[bytes]] = {}
    with ExitStack() as stack:
        for key in keys:
            place = state.done[key]
            if place.part not in files:
                if len(files) == _MAX_OPEN_PARTS:
                    stack.close()
                    files.clear()
                files[place.part] = stack.enter_context(place.part.open("rb"))
            files[place.part].seek(place.offset)
            yield json.loads(files[place.part].readline())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two fingerprints differ: a setting's path, its old and its new value, None where there is none."""
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{path}{name}.")
        elif was != now:
            yield f"{path}{name}", was, now
