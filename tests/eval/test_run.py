"""`eval run`: the same files for any number of ranks and interruptions, and clear refusals before work starts."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infer.eval import command
from megatron_infer.eval.cases import read_cases
from megatron_infer.eval.run import command as run_command
from megatron_infer.eval.run import replica
from megatron_infer.eval.run.records import GIVEN_UP, LONE_CRASHES, SHARED_CRASHES
from megatron_infer.eval.run.replica import Progress, in_prefix_order, seed_of
from megatron_infer.eval.run.work_queue import WorkQueue
from megatron_infer.eval.tasks.registry import TASKS, task
from megatron_infer.world import World
from tests.eval.killed_runs import PYTHON, command_of, shapes, write_cases
from tests.session.test_torchrun import ROOT, run, torchrun

POISON = "\x07"
"""Stands in one prompt only; the tiny tokenizer makes its byte piece of it."""
DEADLY = f"""
import os, signal, sys
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.eval import command
from megatron_infer.eval.cases import read_cases

start = ModelRunner.start

def deadly(self, step, draws=()):
    if {3 + ord(POISON)} in step.token_ids_T:
        os.kill(os.getpid(), signal.SIGKILL)
    return start(self, step, draws)

ModelRunner.start = deadly
sys.exit(command.main(sys.argv[1:]))
"""

DYING = """
import os, signal, sys
from megatron_infer.eval import command
from megatron_infer.eval.cases import read_cases
from megatron_infer.eval.files import LineFile

append, appended = LineFile.append, []
victim = os.getpid() if sys.argv.pop() == "--victim=rank" else os.getppid()

def dying(self, value):
    append(self, value)
    appended.append(value)
    if len(appended) == 3:
        os.kill(victim, signal.SIGKILL)

LineFile.append = dying
sys.exit(command.main(sys.argv[2:]))
"""
"""Ends with the third line that any replica writes: a beginning and one or two results."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("eval") / "cases.jsonl", 36)


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path, data: Path) -> list[str]:
    return ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def calm(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with one rank."""
    out = tmp_path_factory.mktemp("calm") / "out"
    done = run(command_of(PYTHON, *arguments, "--out", str(out)))
    assert done.returncode == 0, done.stderr
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `eval run` in this process."""
    status = command.main(command_of(PYTHON, *arguments)[len(PYTHON) + 1 :])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_finished_run_says_what_it_was_and_holds_every_key_once(calm: Path, data: Path) -> None:
    completions = rows(calm / "completions.jsonl")
    assert [row["task_id"] for row in completions] == [row["task_id"] for row in rows(data)]
    assert all(row["sample_idx"] == 0 and row["error"] is None and row["token_ids"] for row in completions)
    assert [row["task_id"] for row in rows(calm / "timings.jsonl")] == [row["task_id"] for row in completions]
    assert rows(calm / "predictions.jsonl")[3] == {"task_id": "case/3", "completion": completions[3]["text"]}
    manifest = json.loads((calm / "manifest.json").read_text())
    assert manifest["fingerprint"]["config"]["dtype"] == "bfloat16"
    assert manifest["attempts"][0]["world_size"] == 1
    success = json.loads((calm / "_SUCCESS").read_text())
    assert (success["num_completions"], success["num_errors"]) == (36, 0)


@pytest.mark.parametrize("shape", shapes("-m", "megatron_infer")[1:], ids=("tp 2", "dp 2", "dp 2 x tp 2"))
def test_the_number_of_ranks_changes_nothing(
    arguments: list[str], calm: Path, tmp_path: Path, shape: list[str]
) -> None:
    done = run(command_of(shape, *arguments, "--out", str(tmp_path / "out")))
    assert done.returncode == 0, done.stderr
    for name in ("completions.jsonl", "predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (calm / name).read_bytes()


@pytest.mark.slow
def test_killed_ranks_and_launchers_change_nothing(arguments: list[str], calm: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "dying.py", tmp_path / "out"
    script.write_text(DYING)
    one, split, replicas, both = shapes(str(script))
    deaths = ((both, "rank"), (split, "launcher"), (replicas, "launcher"), (replicas, "rank"), (one, "rank"))
    for shape, victim in deaths:
        done = run([*command_of(shape, *arguments, "--out", str(out)), f"--victim={victim}"])
        assert done.returncode != 0
        assert not (out / "_SUCCESS").exists()
    done = run(command_of(PYTHON, *arguments, "--out", str(out)))
    assert done.returncode == 0, done.stderr
    assert "going on: " in done.stderr
    for name in ("completions.jsonl", "predictions.jsonl"):
        assert (out / name).read_bytes() == (calm / name).read_bytes()
    assert len(json.loads((out / "manifest.json").read_text())["attempts"]) == len(deaths) + 1


def test_torchrun_restarts_go_on_and_a_deadly_prompt_is_given_up(
    arguments: list[str], data: Path, calm: Path, tmp_path: Path
) -> None:
    """Every attempt but the last dies of it: first among others, then alone."""
    poisoned = rows(data)
    poisoned[7]["prefix"] += POISON
    path = tmp_path / "poisoned.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in poisoned))
    script = tmp_path / "deadly.py"
    script.write_text(DEADLY)
    restarts = SHARED_CRASHES + LONE_CRASHES
    launcher = torchrun(1, script)
    launcher.insert(-1, f"--max-restarts={restarts}")
    given = ["--data" if a == "--data" else str(path) if a == str(data) else a for a in arguments]
    done = run([*launcher, *command_of([], *given, "--out", str(tmp_path / "out"))[1:]])
    assert done.returncode == 0, done.stderr
    assert "one at a time" in done.stderr
    found, expected = rows(tmp_path / "out" / "completions.jsonl"), rows(calm / "completions.jsonl")
    assert (found[7]["finish_reason"], found[7]["error"]) == ("error", GIVEN_UP)
    assert found[:7] + found[8:] == expected[:7] + expected[8:]
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (success["num_errors"], success["num_quarantined"]) == (1, 1)
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["attempts"]) == restarts + 1


def test_samples_have_seeds_of_their_own(arguments: list[str], tmp_path: Path, capsys) -> None:
    outs = []
    for name, extra in (("a", []), ("b", ["--max_num_batched_tokens", "64"]), ("c", ["--seed", "1"])):
        sampling = ["--n", "3", "--temperature", "1", "--limit", "5", "--out", str(tmp_path / name)]
        status, _, err = evaluate(capsys, *arguments, *sampling, *extra)
        assert status == 0, err
        outs.append([row["text"] for row in rows(tmp_path / name / "completions.jsonl")])
    assert outs[0] == outs[1] != outs[2]
    assert len(outs[0]) == 15
    assert len(set(outs[0][:3])) > 1
    assert seed_of(0, ("a", 1)) != seed_of(0, ("a", 2)) != seed_of(1, ("a", 2))


def test_a_finished_run_is_not_repeated_nor_changed(arguments: list[str], calm: Path, capsys) -> None:
    before = (calm / "_SUCCESS").read_bytes()
    status, out, err = evaluate(capsys, *arguments, "--out", str(calm))
    assert status == 0
    assert json.loads(out)["num_completions"] == 36
    assert "finished: 36 completions; nothing to do" in err
    status, _, err = evaluate(capsys, *arguments, "--out", str(calm), "--temperature", "0.5", "--dtype", "float32")
    assert status == 2
    assert "sampling.temperature: was 0.0, now 0.5" in err
    assert "config.dtype: was 'bfloat16', now 'float32'" in err
    assert (calm / "_SUCCESS").read_bytes() == before


def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(
    arguments: list[str], calm: Path, tmp_path: Path, capsys
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        status, _, err = evaluate(capsys, *arguments, "--out", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert "is full (File too large); free some space: what is done is in" in err
    status, _, err = evaluate(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert status == 0
    assert "going on: " in err
    assert "one at a time" not in err
    assert (tmp_path / "out" / "completions.jsonl").read_bytes() == (calm / "completions.jsonl").read_bytes()


def test_sigterm_ends_an_attempt_in_good_order(arguments: list[str], tmp_path: Path) -> None:
    """Prompts in hand when a launcher ends the job are not held to be deadly."""
    script = tmp_path / "terminated.py"
    script.write_text(DEADLY.replace("SIGKILL", "SIGTERM").replace("if ", "if len(step.query_lens_S) > 3 or "))
    for _ in range(SHARED_CRASHES + 1):
        done = run([sys.executable, str(script), *command_of([], *arguments, "--out", str(tmp_path / "out"))[1:]])
        assert done.returncode == 130, done.stderr
        assert "one at a time" not in done.stderr


def test_sigterm_ends_a_background_job_too(arguments: list[str], tmp_path: Path) -> None:
    """Shells have those ignore Ctrl-C."""
    script = tmp_path / "background.py"
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    script.write_text(
        ignoring + DEADLY.replace("SIGKILL", "SIGTERM").replace("if ", "if len(step.query_lens_S) > 3 or ")
    )
    done = run([sys.executable, str(script), *command_of([], *arguments, "--out", str(tmp_path / "out"))[1:]])
    assert done.returncode == 130, done.stderr


def test_every_rank_may_say_that_its_host_has_other_cases(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(run_command, "prompts_sha256", lambda cases: "others")
    status, _, err = evaluate(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert status == 1
    assert "rank 0 reads other cases than the run began with" in err


def test_lone_surrogates_in_data_are_no_obstacle(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    """JSON can escape them, UTF-8 cannot hold them; a file's name has them for bytes that are not UTF-8."""
    path = tmp_path / "\udcff.jsonl"
    path.write_text(
        '{"task_id": "\\ud800", "prefix": "a", "suffix": ""}\n{"task_id": "b", "prefix": "\\ud800", "suffix": ""}'
    )
    options = ["--model_dir", str(tiny_checkpoint), "--max_new_tokens", "4", "--out", str(tmp_path / "out")]
    status, stdout, err = evaluate(capsys, "--task", "fim", "--data", str(path), *options)
    assert status == 0, err
    assert json.loads(stdout)["num_errors"] == 1
    assert [row["task_id"] for row in rows(tmp_path / "out" / "completions.jsonl")] == ["\ud800", "b"]


def test_prompts_that_cannot_be_laid_out_are_errors_in_the_result(
    tiny_checkpoint: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "cases.jsonl"
    long_path = "x" * 4000 + ".py"
    path.write_text(
        json.dumps({"task_id": 1, "prefix": "a", "suffix": "b", "path": long_path})
        + "\n"
        + json.dumps({"task_id": 2, "prefix": "a", "suffix": "b"})
    )
    out = tmp_path / "out"
    options = ["--model_dir", str(tiny_checkpoint), "--max_new_tokens", "4", "--out", str(out)]
    status, stdout, err = evaluate(capsys, "--task", "fim", "--data", str(path), *options)
    assert status == 0, err
    assert json.loads(stdout)["num_errors"] == 1
    first, second = rows(out / "completions.jsonl")
    assert "exceeds its budget" in first["error"]
    assert second["error"] is None


def test_context_from_a_source_tree_stands_before_the_prefix_and_is_part_of_the_run(
    arguments: list[str], data: Path, tmp_path: Path, capsys
) -> None:
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    for row in rows(data):
        (tree / row["path"]).write_text(row["prefix"] + row["reference"] + row["suffix"])
    out = tmp_path / "out"
    status, _, err = evaluate(capsys, *arguments, "--out", str(out), "--source_tree", str(tree))
    assert status == 0, err
    lengths = [row["num_prompt_tokens"] for row in rows(out / "completions.jsonl")]
    evaluate(capsys, *arguments, "--out", str(tmp_path / "bare"))
    bare = [row["num_prompt_tokens"] for row in rows(tmp_path / "bare" / "completions.jsonl")]
    assert all(a > b for a, b in zip(lengths, bare, strict=True))
    for path in (tree / "src").iterdir():
        path.write_text(path.read_text() + "left = values\n")
    status, _, err = evaluate(capsys, *arguments, "--out", str(out), "--source_tree", str(tree))
    assert status == 2
    assert "prompts_sha256: was" in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "humaneval-xxl"], "there is no task 'humaneval-xxl'; known are"),
        (["--data", "missing.jsonl"], "cannot read"),
        (["--out", ""], "--out is empty"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max_new_tokens", "512"], "leaves no room for a prompt"),
        (["--prefix_field", "before"], "line 1: no field 'before', which task 'fim' reads; the line has task_id"),
        (["--task", "santacoder-fim", "--prefix-field", "x"], "--prefix_field goes with --task fim"),
        (["--source_tree", "missing"], "no python file below missing"),
        (["--source_tree", "{tree}"], "which is not in the source tree"),
        (["--fim", "none", "--order", "psm"], "does not have; give --order (it has none)"),
        (["--kv_cache_memory_bytes", "100000"], "answers would depend on free memory"),
        (["--tensor_parallel_size", "3"], "tensor_parallel_size"),
        (["--temperature", "-1"], "temperature"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_get_one_clear_line(arguments: list[str], tmp_path: Path, capsys, extra, message) -> None:
    (tmp_path / "other.py").write_text("x = 1\n")
    given = [argument.format(tree=tmp_path) for argument in extra]
    status = command.main(["run", "--out", str(tmp_path / "out"), "--device", "cpu", *arguments, *given])
    assert status == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no case"),
        ('{"prefix": "a", "suffix": "b"}\n{"prefix": "a", "suffix": "b"}', "line 2: task_id"),
        ('{"task_id": "x", "prefix": 1, "suffix": ""}', "line 1: field 'prefix' must be text"),
        ('{"task_id": "x", "prefix": "", "suffix": ""}\n[1]', "line 2: a JSON object is needed, not list"),
        ('{"task_id": "x", "prefix": "", "suffix": ""}\n{"pre', "line 2:"),
        ('{"prefix": ' + 100_000 * "[", "line 1: maximum recursion depth"),
    ],
)
def test_bad_data_is_refused_by_line(tmp_path: Path, capsys, text: str, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    assert command.main(["run", "--task", "fim", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_archive_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "cases.jsonl.gz"
    whole = gzip.compress(b'{"prefix": "a", "suffix": "b"}')
    path.write_bytes(whole[:10] + bytes(byte ^ 255 for byte in whole[10:]))
    assert command.main(["run", "--task", "fim", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path}, line 1: " in capsys.readouterr().err


def test_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert command.main(["--help"]) == 0
    assert "{run,tasks,build,score,report}" in capsys.readouterr().err
    for name in ("run", "tasks", "build", "score", "report"):
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help"])
        assert ended.value.code == 0
    help_text = subprocess.run([*PYTHON, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert "eval" in help_text


def test_a_sample_is_drawn_by_the_seed_and_stays_in_the_datas_order(
    arguments: list[str], calm: Path, tmp_path: Path, capsys
) -> None:
    everything = {row["task_id"]: row for row in rows(calm / "completions.jsonl")}
    order = list(everything)
    chosen = {}
    for name, extra in {
        "a": ["--sample", "5"], "again": ["--sample", "5"], "other": ["--sample", "5", "--seed", "1"],
        "shuffled": ["--shuffle", "--limit", "5"], "all": ["--sample", "99", "--limit", "3"],
    }.items():  # fmt: skip
        status, _, err = evaluate(capsys, *arguments, *extra, "--out", str(tmp_path / name))
        assert status == 0, err
        found = rows(tmp_path / name / "completions.jsonl")
        assert all(row == everything[row["task_id"]] for row in found), "greedy answers do not depend on the others"
        chosen[name] = [row["task_id"] for row in found]
    assert chosen["a"] == chosen["again"] == sorted(chosen["a"], key=order.index) != order[:5]
    assert len(chosen["a"]) == len(chosen["shuffled"]) == 5
    assert chosen["a"] != chosen["other"]
    assert chosen["shuffled"] != sorted(chosen["shuffled"], key=order.index)
    assert chosen["all"] == order[:3]


def test_a_line_tells_where_a_run_without_a_terminal_stands(
    arguments: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "LINE_SECONDS", 0.0)
    status, _, err = evaluate(capsys, *arguments, "--limit", "6", "--out", str(tmp_path / "out"))
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("eval: ")]
    assert "eval: 0 of 6 done, 4 in hand, 0 tokens/s, 0% of prompts cached, time left unknown" in lines
    assert any(line.startswith("eval: 6 of 6 done, 0 in hand") and line.endswith("time left 0:00:00") for line in lines)
    assert "ended by length: 6" in err and "warning: 6 of 6 completions ended at max_new_tokens" in err


def test_progress_is_what_was_counted() -> None:
    progress = Progress(WorkQueue(World()), total=100, already_done=20, is_shown=False)
    counts = {"begun": 30, "completions": 20, "new_tokens": 600, "prompt_tokens": 400, "cached_tokens": 100}
    assert progress.line(counts, 10.0) == (
        "eval: 40 of 100 done, 10 in hand, 60 tokens/s, 25% of prompts cached, time left 0:00:30"
    )


def test_what_an_ending_cut_off_is_saved(arguments: list[str], calm: Path, tmp_path: Path, capsys) -> None:
    status, _, err = evaluate(capsys, *arguments, "--ending", "line", "--limit", "8", "--out", str(tmp_path / "out"))
    assert status == 0, err
    whole = {row["task_id"]: row["text"] for row in rows(calm / "completions.jsonl")}
    found = rows(tmp_path / "out" / "completions.jsonl")
    assert all(whole[row["task_id"]].startswith(row["raw_text"]) for row in found)
    assert all(row["raw_text"].lstrip(" ").startswith(row["text"].lstrip(" ")) for row in found)


def test_parquet_is_read_as_jsonl_is(data: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "cases.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows(data)), path)
    assert read_cases(path, task("fim")) == read_cases(data, task("fim"))
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot read"):
        read_cases(path, task("fim"))


def test_parquet_without_its_package_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_infer\[parquet\]'"):
        read_cases(tmp_path / "cases.parquet", task("fim"))


def test_tasks_are_listed_with_settings_sources_and_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["tasks"]) == 0
    everything = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{everything}" for name in TASKS)
    assert command.main(["tasks", "humaneval-infilling-single-line", "santacoder-fim"]) == 0
    some = capsys.readouterr().out
    assert "licence: MIT" in some and "sha256 of HumanEval-SingleLineInfilling.jsonl.gz: 1277073e" in some
    assert "--max_new_tokens 512" in some and "--order psm" in some and "--truncate bigcode (official)" in some
    assert "mbpp" not in some
    assert command.main(["tasks", "nonsense"]) == 2


def test_neighbours_in_the_order_of_work_share_a_beginning(data: Path) -> None:
    read = task("fim").read
    cases = [(read(row), 0) for row in reversed(rows(data))]
    for order in ("psm", "spm"):
        paths = [case.prompt.path for case, _ in in_prefix_order(cases, order)]
        assert len(set(paths)) == sum(a != b for a, b in zip(paths, [*paths[1:], None], strict=True))


def test_units_are_claimed_once_and_rank_0_speaks_for_all() -> None:
    queue = WorkQueue(World())
    assert [queue.claim() for _ in range(3)] == [0, 1, 2]
    queue.count("tokens", 5)
    queue.count("tokens", 2)
    assert queue.counts(["tokens", "others"]) == {"tokens": 7, "others": 0}
    assert queue.tell(lambda: {"a": [1]}) == {"a": [1]}
    with pytest.raises(ValueError, match="no"):
        queue.tell(lambda: (_ for _ in ()).throw(ValueError("no")))
