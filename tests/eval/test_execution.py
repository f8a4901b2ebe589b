"""Test programs run apart: passing takes a proof, and no program outlives, outgrows or outreaches its limits."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_infer.eval.score import confinement, execution
from megatron_infer.eval.score.execution import (
    GUARD,
    Isolation,
    Limits,
    Outcome,
    bubblewrap,
    find_isolation,
    namespaces,
    run_program,
    run_programs,
)

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(timeout_seconds=20.0, memory_bytes=512 << 20, file_bytes=1 << 20, num_processes=32)
HASTY = Limits(timeout_seconds=0.3)

_WORKS = {made.name: run_program("pass", LIMITS, made).status == "passed" for made in (bubblewrap(), namespaces())}
_WORKS["bubblewrap"] &= os.geteuid() != 0
STRONG = [
    pytest.param(made, id=made.name, marks=pytest.mark.skipif(not _WORKS[made.name], reason="cannot be had here"))
    for made in (bubblewrap(), namespaces())
]
both = pytest.mark.parametrize("isolation", [*STRONG, pytest.param(GUARD, id="guard")])
strong = pytest.mark.parametrize("isolation", STRONG)


def marked_processes(mark: str) -> list[str]:
    """Processes of this machine whose command line has `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in command:
                found.append(entry.name)
    return found


# ---- what passing takes ---------------------------------------------------------------------------------------------


@both
def test_a_program_that_runs_to_its_end_passes(isolation: Isolation) -> None:
    assert run_program("assert sum([1, 2]) == 3\nif True:\n    pass  # no new line at the end", LIMITS, isolation) == (
        Outcome("passed")
    )


@both
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("import sys; sys.exit(0)\nassert False", "exited before its last line"),
        ("import os; os._exit(0)\nassert False", "exited before its last line"),
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("raise SystemExit", "exited before its last line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(:", "SyntaxError"),
        ("x = '\0'", "null bytes"),
        ("x = '\ud800'", "Error"),
        ("import atexit, os; atexit.register(os._exit, 0); raise ValueError", "exited before its last line"),
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(isolation: Isolation, program: str, error: str) -> None:
    outcome = run_program(program, LIMITS, isolation)
    assert outcome.status == "failed" and error in outcome.error


@both
def test_a_guessed_proof_is_no_proof(isolation: Isolation) -> None:
    program = (
        "import os\n"
        "for fd in range(3, 30):\n"
        "    try:\n"
        f"        os.write(fd, {confinement.READY!r} + bytes(16))\n"
        "    except OSError:\n"
        "        pass\n"
        "os._exit(0)"
    )
    assert run_program(program, LIMITS, isolation).status == "failed"


@strong
def test_a_child_does_not_prove_for_its_parent(isolation: Isolation) -> None:
    program = "import os\nif os.fork():\n    os.wait()\n    os._exit(0)"
    assert run_program(program, LIMITS, isolation).status == "failed"


# ---- limits ---------------------------------------------------------------------------------------------------------


@both
def test_an_endless_loop_is_timed_out(isolation: Isolation) -> None:
    began = time.monotonic()
    assert run_program("while True: pass", HASTY, isolation).status == "timed_out"
    assert run_program("import time; time.sleep(60)", HASTY, isolation).status == "timed_out"
    assert time.monotonic() - began < 10


@both
def test_a_memory_hog_is_out_of_memory(isolation: Isolation) -> None:
    outcome = run_program("data = bytearray(4 << 30)", LIMITS, isolation)
    assert outcome == Outcome("out_of_memory", "MemoryError")


@both
def test_a_huge_file_is_cut_short_and_nothing_is_left(isolation: Isolation, tmp_path: Path) -> None:
    before = set(Path(execution.tempfile.gettempdir()).glob("eval-*"))
    outcome = run_program("open('big', 'wb').write(bytes(2 << 20))", LIMITS, isolation)
    assert outcome.status == "failed" and "File too large" in outcome.error
    assert run_program("open('small', 'w').write('x'); open('small').read()", LIMITS, isolation).status == "passed"
    assert set(Path(execution.tempfile.gettempdir()).glob("eval-*")) <= before


@strong
def test_many_files_together_are_limited_too(isolation: Isolation) -> None:
    limits = Limits(timeout_seconds=20.0, directory_bytes=2 << 20)
    program = "for i in range(8):\n    open(str(i), 'wb').write(bytes(1 << 19))"
    assert "No space left" in run_program(program, limits, isolation).error


@both
def test_huge_output_is_discarded_but_the_last_error_is_kept(isolation: Isolation) -> None:
    program = "import sys\nprint('x' * 10**7)\nsys.stderr.write('noise\\n' * 10**6)\nraise ValueError('the end')"
    assert run_program(program, LIMITS, isolation) == Outcome("failed", "ValueError: the end")
    long = run_program("raise ValueError('y' * 10**6)", LIMITS, isolation)
    assert long.status == "failed" and len(long.error) <= 300


@both
def test_standard_input_is_empty(isolation: Isolation) -> None:
    assert run_program("import sys\nassert sys.stdin.read() == ''", LIMITS, isolation).status == "passed"
    assert "EOFError" in run_program("input()", LIMITS, isolation).error


@both
def test_the_environment_is_bare(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_TEST_SECRET", "secret")
    assert run_program("import os\nassert 'EVAL_TEST_SECRET' not in os.environ", LIMITS, isolation).status == "passed"


@both
def test_hashes_are_the_same_in_every_run(isolation: Isolation) -> None:
    errors = {run_program("raise ValueError(hash('text'))", LIMITS, isolation).error for _ in range(3)}
    assert len(errors) == 1


# ---- reach ----------------------------------------------------------------------------------------------------------


@both
def test_the_network_is_out_of_reach(isolation: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        outcome = run_program(program, LIMITS, isolation)
        assert outcome.status == "failed" and "Error" in outcome.error
        with pytest.raises(TimeoutError):
            server.accept()


@both
def test_the_parent_cannot_be_killed(isolation: Isolation) -> None:
    for program in (
        "import os\nos.kill(os.getppid(), 9)\nassert False",
        f"import os\nos.kill({os.getpid()}, 9)\nassert False",
        "import os\nos.killpg(0, 9)\nassert False",
    ):
        assert run_program(program, LIMITS, isolation).status == "failed"


@both
def test_files_outside_are_not_written_renamed_or_removed(isolation: Isolation, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("old")
    for change in (f"open({str(kept)!r}, 'w')", f"os.remove({str(kept)!r})", f"os.rename({str(kept)!r}, 'x')"):
        assert run_program(f"import os\n{change}", LIMITS, isolation).status == "failed"
    assert kept.read_text() == "old"


@both
def test_limits_cannot_be_raised_again(isolation: Isolation) -> None:
    if isolation is GUARD and os.geteuid() == 0:
        pytest.skip("without namespaces, root may raise its own limits")
    program = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    assert "ValueError" in run_program(program, LIMITS, isolation).error


@strong
def test_the_mounts_cannot_be_undone(isolation: Isolation) -> None:
    program = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(None, b'/', None, 32 | 4096, None) == -1  # remount, bind: writable\n"
        "assert libc.umount2(b'.', 2) == -1"
    )
    assert run_program(program, LIMITS, isolation).status == "passed"


@strong
def test_other_processes_and_local_services_are_out_of_sight(isolation: Isolation) -> None:
    program = "import os\nassert os.listdir('/proc') == os.listdir('/run') == []"
    assert run_program(program, LIMITS, isolation).status == "passed"


# ---- children -------------------------------------------------------------------------------------------------------


@strong
def test_a_fork_bomb_hits_its_limit_and_is_gone(isolation: Isolation) -> None:
    mark = f"bomb-{os.getpid()}"
    program = (
        "import subprocess, sys\n"
        "for i in range(100):\n"
        f"    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}])\n"
    )
    outcome = run_program(program, LIMITS, isolation)
    assert outcome.status == "failed" and "Resource temporarily unavailable" in outcome.error
    assert not marked_processes(mark)


@strong
@pytest.mark.parametrize("ending", ["pass", "assert False", "import os; os._exit(0)", "while True: pass"])
def test_children_do_not_outlive_their_program(isolation: Isolation, ending: str) -> None:
    mark = f"orphan-{os.getpid()}"
    child = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    program = f"import subprocess, sys\nsubprocess.Popen({child}, start_new_session=True)\n{ending}"
    run_program(program, Limits(timeout_seconds=0.5), isolation)
    deadline = time.monotonic() + 5
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.01)  # after a timeout, the kernel takes a moment to end the namespace
    assert not marked_processes(mark)


def test_the_guard_starts_no_children() -> None:
    for start in (
        "os.fork()",
        "os.system('true')",
        "subprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['x'], {})",
    ):
        outcome = run_program(f"import os, subprocess\n{start}", LIMITS, GUARD)
        assert outcome.status == "failed" and "is refused while tests run" in outcome.error


@both
def test_nothing_is_left_of_a_scorer_that_was_killed(isolation: Isolation, tmp_path: Path) -> None:
    script = tmp_path / "scorer.py"
    script.write_text(
        "from megatron_infer.eval.score.execution import GUARD, Limits, bubblewrap, namespaces, run_programs\n"
        f"isolation = {{'guard': lambda: GUARD}}.get({isolation.name!r}) or {isolation.name}\n"
        "program = 'import time; time.sleep(500)'\n"
        "list(run_programs([program] * 2, Limits(timeout_seconds=600.0), isolation(), 2))\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    scorer = psutil.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 60
        while sum(map(has_begun, descendants := scorer.children(recursive=True))) < 2:
            assert scorer.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        scorer.kill()
        scorer.wait()
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive


def has_begun(process: psutil.Process) -> bool:
    """Whether it is Python, and has taken up its program: its limits are in force."""
    try:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        return bool(re.search(rf"Max open files +{LIMITS.num_files} ", limits)) and "python" in process.name()
    except (OSError, psutil.Error):
        return False


@both
def test_leaving_early_ends_what_runs(isolation: Isolation) -> None:
    others = psutil.Process().children(recursive=True)
    outcomes = run_programs(
        ["pass"] + ["import time; time.sleep(500)"] * 3, Limits(timeout_seconds=600.0), isolation, 2
    )
    assert next(outcomes).status == "passed"
    began = time.monotonic()
    outcomes.close()
    assert time.monotonic() - began < 30
    assert not set(psutil.Process().children(recursive=True)) - set(others)


# ---- privileges -----------------------------------------------------------------------------------------------------


@strong
def test_there_are_three_devices_and_no_others_can_be_made(isolation: Isolation) -> None:
    program = (
        "import os, stat\n"
        "assert sorted(os.listdir('/dev')) == ['null', 'urandom', 'zero']\n"
        "open('/dev/null', 'w').write('x')\n"
        "assert open('/dev/zero', 'rb').read(2) == bytes(2) and len(os.urandom(3)) == 3\n"
        "try:\n"
        "    os.mknod('kvm', 0o600 | stat.S_IFCHR, os.makedev(10, 232))\n"
        "except PermissionError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError('a device')"
    )
    assert run_program(program, LIMITS, isolation) == Outcome("passed")


@strong
def test_a_program_is_an_unprivileged_user_even_for_root(isolation: Isolation) -> None:
    privileged = "os.getuid() == 0 or os.geteuid() == 0 or os.getgroups() not in ([], [os.getgid()])"
    if os.geteuid() != 0:
        privileged = "False"  # it has the user's own id, which has no powers outside
    program = (
        "import os\n"
        f"assert not ({privileged}), (os.getresuid(), os.getgroups())\n"
        "for change in (lambda: os.setuid(0), lambda: os.chroot('/usr'), lambda: os.sethostname('x')):\n"
        "    try:\n"
        "        change()\n"
        "    except (PermissionError, AttributeError):\n"
        "        continue\n"
        "    raise AssertionError('a privilege')"
    )
    if os.geteuid() != 0:
        program = program.replace("lambda: os.setuid(0), ", "")
    assert run_program(program, LIMITS, isolation) == Outcome("passed")


@strong
def test_files_of_others_cannot_be_read(isolation: Isolation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (secret, Path("/etc/shadow"), Path("/etc/passwd"), ROOT / "README.md", Path.home() / ".profile"):
        outcome = run_program(f"open({str(path)!r})", LIMITS, isolation)
        assert outcome.status == "failed" and "Error" in outcome.error


@strong
def test_memory_is_limited_for_all_processes_together(isolation: Isolation) -> None:
    program = (
        "import os, time\n"
        "for i in range(4):\n"
        "    if os.fork() == 0:\n"
        "        break\n"
        "data = os.urandom(1 << 20) * 80\n"
        "time.sleep(60)"
    )
    limits = Limits(timeout_seconds=50.0, memory_bytes=256 << 20)
    outcome = run_program(program, limits, isolation)
    assert outcome == Outcome("out_of_memory", "its processes together reached the limit of memory")


CHEATS = {
    "arguments": "import sys, json; fd = json.loads(sys.argv[1])['proof_fd']",
    "frames": (
        "import sys\n"
        "frame = sys._getframe()\n"
        "while 'proof' not in frame.f_locals:\n"
        "    frame = frame.f_back\n"
        "fd = frame.f_locals['proof'].fileno()"
    ),
    "counting": (
        "import os, stat\n"
        "def is_socket(fd):\n"
        "    try:\n"
        "        return stat.S_ISSOCK(os.fstat(fd).st_mode)\n"
        "    except OSError:\n"
        "        return False\n"
        "fd = next(fd for fd in range(64) if is_socket(fd))"
    ),
}


@both
@pytest.mark.parametrize("cheat", list(CHEATS))
def test_the_proof_does_not_lie_around(isolation: Isolation, cheat: str) -> None:
    program = f"{CHEATS[cheat]}\nimport os\nos.write(fd, os.read(fd, 64))\nos._exit(0)\nassert False"
    assert run_program(program, LIMITS, isolation).status == "failed"


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_outcomes_come_in_the_order_of_the_programs() -> None:
    programs = [f"assert {i} % 3" for i in range(9)]
    statuses = [outcome.status for outcome in run_programs(programs, LIMITS, find_isolation(), 4)]
    assert statuses == ["passed" if i % 3 else "failed" for i in range(9)]


def test_several_run_at_once() -> None:
    programs = ["import time; time.sleep(0.5)"] * 4
    began = time.monotonic()
    assert all(outcome.status == "passed" for outcome in run_programs(programs, LIMITS, GUARD, 4))
    assert time.monotonic() - began < 1.9
    assert threading.active_count() < 10


def test_the_isolation_that_works_is_found_and_says_what_it_is() -> None:
    found = find_isolation()
    assert found.name == next((name for name, works in _WORKS.items() if works), "guard")
    assert "network" in found.about and ("can be read" in found.about) == (found is GUARD)


def test_where_namespaces_are_missing_the_guard_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bubblewrap", "namespaces"):
        missing = Isolation(name, "", ("/nowhere",))
        monkeypatch.setattr(execution, name, lambda missing=missing: missing)
    assert find_isolation() == GUARD


def test_what_cannot_be_started_is_refused_not_failed() -> None:
    missing = Isolation("namespaces", "", ("/nowhere/unshare",))
    assert run_program("pass", LIMITS, missing).status == "refused"
    # The programs of this isolation believe that they are in namespaces, and are not: nothing may run then.
    unable = Isolation("namespaces", "", ("/usr/bin/env", "--chdir=/", "false"))
    assert run_program("pass", LIMITS, unable).status == "refused"


@pytest.mark.parametrize("wrong", [{"timeout_seconds": 0.0}, {"timeout_seconds": 1e9}, {"memory_bytes": 1 << 20}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]
