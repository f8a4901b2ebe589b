"""A run's directory: what counts as done, who is suspected, and that nothing half-written is ever taken for whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
from pathlib import Path

import pytest

from megatron_infer.eval import files
from megatron_infer.eval.files import LineFile, replacing, write_json
from megatron_infer.eval.run import records
from megatron_infer.eval.run.records import LONE_CRASHES, SHARED_CRASHES, RunDirectory


def done(task_id: str, sample_idx: int = 0, text: str = "", reason: str = "stop") -> tuple[dict, dict]:
    name = {"task_id": task_id, "sample_idx": sample_idx}
    return {**name, "text": text, "finish_reason": reason, "error": None}, {**name, "total_seconds": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "out")
    with directory.locked():
        directory.begin({"fingerprint": {"seed": 0}}, {})
    return directory


def crash(run: RunDirectory, attempt: int, *task_ids: str, alone: bool = False) -> None:
    part = run.open_part(attempt, 0)
    part.begin([(task_id, 0) for task_id in task_ids], alone=alone)
    part.close()


def test_the_first_result_of_a_key_counts_and_the_final_files_are_in_the_order_asked_for(run: RunDirectory) -> None:
    for attempt, text in ((1, "first"), (2, "second")):
        part = run.open_part(attempt, 0)
        part.begin([("b", 0), ("a", 0), ("a", 1)], alone=False)
        for key in (("b", 0), ("a", 1), ("a", 0)):
            part.done(*done(*key, text=text))
        part.close()
    keys = [("a", 0), ("a", 1), ("b", 0)]
    success = run.finish(keys, lambda key, row: {"id": key[0], "said": row["text"]}, 2.0)
    rows = [json.loads(line) for line in (run.path / "completions.jsonl").read_text().splitlines()]
    assert [(row["task_id"], row["sample_idx"]) for row in rows] == keys
    assert {row["text"] for row in rows} == {"first"}
    assert (run.path / "predictions.jsonl").read_text().splitlines()[2] == '{"id":"b","said":"first"}'
    assert success == run.success
    assert (success["num_cases"], success["num_completions"]) == (2, 3)
    assert not (run.path / "parts").exists()


def test_a_torn_line_counts_as_not_written(run: RunDirectory) -> None:
    part = run.open_part(1, 0)
    part.begin([("a", 0), ("b", 0)], alone=False)
    part.done(*done("a"))
    part.done(*done("b"))
    part.close()
    path = next((run.path / "parts").iterdir())
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        expected = {("a", 0)} if size >= ends[1] else set()
        assert set(run.state().done) == (expected | {("b", 0)} if size >= ends[2] else expected)


def test_merging_refuses_to_leave_a_key_out(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="disk that all hosts share"):
        run.finish([("a", 0)], lambda key, row: {}, 1.0)
    assert run.success is None


def test_keys_in_hand_at_a_crash_become_suspects_but_not_after_an_orderly_end(run: RunDirectory) -> None:
    for attempt in range(1, SHARED_CRASHES + 1):
        assert run.state().suspects() == []
        crash(run, attempt, "a", "b")
    assert run.state().suspects() == [("a", 0), ("b", 0)]
    for attempt in range(10, 20):
        part = run.open_part(attempt, 0)
        part.begin([("c", 0)], alone=False)
        part.end("KeyboardInterrupt")
        part.close()
    assert ("c", 0) not in run.state().suspects()


def test_only_a_key_that_dies_alone_is_given_up_and_those_that_did_come_last(run: RunDirectory) -> None:
    for attempt in range(1, SHARED_CRASHES + 1):
        crash(run, attempt, "a", "b")
    for attempt in range(10, 10 + LONE_CRASHES):
        assert run.state().poison() == []
        crash(run, attempt, "a", alone=True)
        assert run.state().suspects()[0] == ("b", 0)
    state = run.state()
    assert state.poison() == [("a", 0)]
    assert state.suspects() == [("b", 0)]
    part = run.open_part(30, 0)
    part.begin([("b", 0)], alone=True)
    part.done(*done("b"))
    part.close()
    assert run.state().suspects() == []


def test_more_parts_than_may_be_open_are_merged(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(records, "_MAX_OPEN_PARTS", 4)
    keys = [(str(i), 0) for i in range(40)]
    for attempt, key in enumerate(keys, start=1):
        part = run.open_part(attempt, 0)
        part.done(*done(key[0]))
        part.close()
    num_open = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 16, limits[1]))
        run.finish(keys, lambda key, row: {}, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [json.loads(line)["task_id"] for line in (run.path / "completions.jsonl").open()] == [k for k, _ in keys]


def test_a_lock_works_on_nfs_and_its_lack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS locks nothing that is not open for writing."""

    def on_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", on_nfs)
    with RunDirectory(tmp_path / "out").locked():
        assert RunDirectory(tmp_path / "out").manifest() is None
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(ValueError, match="without file locks"), RunDirectory(tmp_path / "out").locked():
        pass


def test_what_a_killed_process_was_replacing_is_swept_away(run: RunDirectory) -> None:
    left = run.path / ".completions.jsonl.part-x1y2"
    left.touch()
    run.begin({"fingerprint": {}}, {})
    assert not left.exists()


def test_other_parameters_are_refused_with_the_difference(run: RunDirectory) -> None:
    known = run.manifest()
    assert known is not None
    run.check(known, {"seed": 0})
    with pytest.raises(ValueError, match="seed: was 0, now 1"):
        run.check(known, {"seed": 1})
    with pytest.raises(ValueError, match=r"sampling: was None, now \{'top_k': 1\}"):
        run.check(known, {"seed": 0, "sampling": {"top_k": 1}})


def test_foreign_directories_and_runs_at_work_are_left_alone(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LOCK_SECONDS", 0.0)
    with run.locked(), pytest.raises(ValueError, match="another run is writing"), RunDirectory(run.path).locked():
        pass
    with run.locked():
        pass
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not a run \(thesis.tex\)"):
        RunDirectory(foreign).manifest()
    (foreign / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not written by this version"):
        RunDirectory(foreign).manifest()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"), RunDirectory(tmp_path / "file").locked():
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with replacing(path) as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_lone_surrogates_are_escaped_and_all_else_is_not(tmp_path: Path) -> None:
    value = {"é": ["\ud800", "名"]}
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == value
    assert json.loads(files.to_line(value).encode()) == value
    assert files.to_line("é名") == '"é名"\n'


def test_a_full_disk_tears_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LineFile(tmp_path / "part.jsonl")
    lines.append({"a": 1})
    real = os.write
    room = iter((5,))

    def write(descriptor: int, data: bytes) -> int:
        left = next(room, None)
        if left is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:left])

    monkeypatch.setattr(files.os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        lines.append({"b": "x" * 100})
    monkeypatch.undo()
    lines.append({"c": 3})
    lines.close()
    assert (tmp_path / "part.jsonl").read_text() == '{"a":1}\n{"c":3}\n'
