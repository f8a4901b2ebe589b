"""Runs the test program around a completion, for pass@k: in a process of its own, under limits, never in this one.

Owns the processes, their deadline, and the proof that a program reached its end. Which isolation this machine can give
is found out once and said in the results; none of them is a full sandbox, so a container or virtual machine around it
stays good practice for models that are not trusted. Knows no benchmark and no metric.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_infer.eval.score import confinement

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "refused"]

_START_SECONDS = 30.0
"""What a process may take before its program begins; this is not counted as the program's time."""

_TAIL_BYTES = 64 << 10
_ERROR_CHARACTERS = 300
_LEAST_MEMORY_BYTES = 64 << 20
_FIRST_UID = 0x60000000
_DIRECTORY, _DIRECTORY_BYTES = "{directory}", "{directory_bytes}"
_POLL_SECONDS = 0.2

_PROBE = """\
import threading
thread = threading.Thread(target=int)
thread.start()
thread.join()
open("file", "w").close()
"""


@dataclass(frozen=True)
class Limits:
    """What one test program may use. Processor time (timeout + 1 s, rounded up) is per process.

    memory_bytes: address space of each process, and resident memory of all together. timeout_seconds: of wall time; 3
    is HumanEval's own. file_bytes: of one file. directory_bytes: of all files together, where namespaces are in force.
    num_processes: threads included, likewise.
    """

    timeout_seconds: float = 3.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20
    directory_bytes: int = 64 << 20
    num_processes: int = 64
    num_files: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= 3600:
            raise ValueError(f"--timeout_seconds must be above 0 and at most 3600, not {self.timeout_seconds}")
        if self.memory_bytes < _LEAST_MEMORY_BYTES:
            raise ValueError(
                f"--memory_bytes must be at least {_LEAST_MEMORY_BYTES}, which Python needs to start, "
                f"not {self.memory_bytes}"
            )


@dataclass(frozen=True)
class Isolation:
    """One way to keep a test program apart. about: what it does and does not do. command: what starts the process."""

    name: str
    about: str
    command: tuple[str, ...] = ()

    @property
    def has_namespaces(self) -> bool:
        return bool(self.command)

    def command_for(self, directory: str, limits: Limits) -> list[str]:
        values = {_DIRECTORY: directory, _DIRECTORY_BYTES: str(limits.directory_bytes)}
        return [values.get(part, part) for part in self.command]


@dataclass(frozen=True)
class Outcome:
    """What became of a program. error: the last line that it wrote to stderr, or why it was ended; "" if passed."""

    status: Status
    error: str = ""


GUARD = Isolation(
    "guard",
    "a process of this very user with resource limits; Python's audit hook refuses network, new processes, signals and "
    "writing outside a temporary directory. Native code can go around the hook, and files of this user can be read.",
)


_APART = (
    "a process in Linux network, process, mount and IPC namespaces{how}, with resource limits and as a user without "
    "privileges: no network, no sight of other processes, and of files only system programs and Python, read-only, a "
    "temporary RAM disk, and /dev/null, zero and urandom. All its children end with it."
)


def bubblewrap() -> Isolation:
    """Namespaces through bwrap(1), a kept tool; not for root, whom it leaves root, or cannot end as another user."""
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--unshare-net", "--unshare-pid"]
    command += ["--unshare-ipc", "--as-pid-1"]
    for path in _visible():
        command += ["--ro-bind", path, path]
    for path in confinement.DEVICES:
        command += ["--dev-bind", path, path]
    for path in confinement.EMPTY:
        command += ["--dir", path]
    command += ["--perms", "0700", "--size", _DIRECTORY_BYTES, "--tmpfs", _DIRECTORY, "--remount-ro", "/", "--"]
    return Isolation("bubblewrap", _APART.format(how=", made by bubblewrap"), tuple(command))


def namespaces() -> Isolation:
    """The same through util-linux's unshare(1); its file system, the process makes itself."""
    setpriv, unshare = (shutil.which(name) or name for name in ("setpriv", "unshare"))
    command = [setpriv, "--pdeathsig", "KILL", unshare, "--net", "--pid", "--mount", "--ipc", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    return Isolation("namespaces", _APART.format(how=""), tuple(command))


def _visible() -> list[str]:
    """What Python and what it may start need of the file system."""
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache"]
    python = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix]
    return [path for path in dict.fromkeys(system + python) if os.path.exists(path)]


def find_isolation() -> Isolation:
    """The strongest isolation that works here: a small program is run under each.

    Raises ValueError: not even a limited process can be started here; the message has the reason.
    """
    outcome = Outcome("refused")
    for candidate in (bubblewrap(), namespaces(), GUARD)[os.geteuid() == 0 :]:
        outcome = run_program(_PROBE, Limits(timeout_seconds=10.0), candidate)
        if outcome.status == "passed":
            return candidate
    raise ValueError(f"no test program can be run here ({outcome.error}); score without --allow_exec")


def run_programs(programs: Iterable[str], limits: Limits, isolation: Isolation, num_workers: int) -> Iterator[Outcome]:
    """Outcomes in the order of the programs, `num_workers` of them running at a time. Left early, it ends them."""
    is_over = threading.Event()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            yield from pool.map(lambda program: run_program(program, limits, isolation, is_over), programs)
        finally:
            is_over.set()
            pool.shutdown(cancel_futures=True)


def run_program(program: str, limits: Limits, isolation: Isolation, is_over: threading.Event | None = None) -> Outcome:
    """Run one Python program, at most until `is_over` is set.

    It has passed if it ran to its last line and its process ended well, in time. An early sys.exit(0) or os._exit(0) is
    no pass: a random nonce must come back after the last line.
    """
    nonce = secrets.token_bytes(16)
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="eval-") as directory:
        source.write(program.encode("utf-8", "surrogatepass"))
        source.flush()
        source.seek(0)
        settings = {
            **asdict(limits),
            "namespaces": isolation.has_namespaces,
            "visible": _visible() if isolation.name == "namespaces" else [],
            # Of its own, so that the kernel counts its processes alone.
            "uid": _FIRST_UID + secrets.randbelow(1 << 24) if os.geteuid() == 0 else None,
            "directory": directory,
            "program_fd": source.fileno(),
        }
        ours.sendall(json.dumps(settings).encode() + b"\n")
        confine = Path(confinement.__file__).read_text(encoding="utf-8")
        try:
            process = subprocess.Popen(
                [*isolation.command_for(directory, limits), sys.executable, "-s", "-B", "-c", confine],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=directory,
                env=_environment(directory), pass_fds=(source.fileno(),), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome("refused", f"{error.filename or isolation.name}: {error.strerror}")
        theirs.close()
        watch = _Watch(process, ours, nonce, limits, is_over or threading.Event())
        try:
            watch.until_end()
        finally:
            watch.kill()
        return _outcome(watch, nonce)


def _environment(directory: str) -> dict[str, str]:
    """All that a program sees of the environment. Hashes are fixed so that scoring twice gives the same results."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": directory, "TMPDIR": directory,
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


class _Watch:
    """Follows one process to its end or its deadline, keeping the tail of its stderr and what it sent as proof."""

    def __init__(
        self, process: subprocess.Popen[bytes], proof_socket: socket.socket, nonce: bytes, limits: Limits,
        is_over: threading.Event,
    ) -> None:  # fmt: skip
        assert process.stderr is not None
        self.process = process
        self.stderr = process.stderr
        self.tail = b""
        self.proof = b""
        self.ended_for: Outcome | None = None
        self._proof_socket, self._nonce = proof_socket, nonce
        self._limits, self._is_over = limits, is_over

    @property
    def has_begun(self) -> bool:
        return self.proof.startswith(confinement.READY)

    def until_end(self) -> None:
        """Return when the process has ended, or has to."""
        deadline = time.monotonic() + _START_SECONDS
        os.set_blocking(self.stderr.fileno(), False)
        self._proof_socket.setblocking(False)
        process_fd = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for fd in (process_fd, self.stderr.fileno(), self._proof_socket.fileno()):
                    selector.register(fd, selectors.EVENT_READ)
                while (remaining := deadline - time.monotonic()) > 0:
                    had_begun = self.has_begun
                    ready = {key.fd for key, _ in selector.select(min(remaining, _POLL_SECONDS))}
                    for fd in ready - {process_fd}:
                        if not self._read(fd):
                            selector.unregister(fd)
                    if process_fd in ready:
                        return
                    if self._is_over.is_set():
                        self.ended_for = Outcome("refused", "scoring was interrupted")
                        return
                    if self.has_begun and _resident_bytes(self.process.pid) > self._limits.memory_bytes:
                        self.ended_for = Outcome("out_of_memory", "its processes together reached the limit of memory")
                        return
                    if self.has_begun and not had_begun:
                        deadline = time.monotonic() + self._limits.timeout_seconds
                        with contextlib.suppress(OSError):  # it may be gone again
                            self._proof_socket.sendall(confinement.GO + self._nonce)
        finally:
            os.close(process_fd)
        self.ended_for = Outcome("timed_out", "the time limit was reached")

    def kill(self) -> None:
        """End whatever is left: the process group, and with it the namespaces and all that lives in them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for fd in (self.stderr.fileno(), self._proof_socket.fileno()):
            # Bounded: what was still in the pipe, not what a survivor may go on writing.
            self._read(fd)
        self.stderr.close()

    def _read(self, fd: int) -> bool:
        """Take in what has come; False at the end of the stream."""
        try:
            received = os.read(fd, _TAIL_BYTES)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if fd == self.stderr.fileno():
            self.tail = (self.tail + received)[-_TAIL_BYTES:]
        else:
            self.proof = (self.proof + received)[:_TAIL_BYTES]
        return bool(received)


def _resident_bytes(pid: int) -> int:
    """Of a process and all its descendants, found from parent to child: a host may have thousands of others."""
    total = 0
    with contextlib.suppress(OSError):  # it has ended
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_resident_bytes(int(child)) for child in (task / "children").read_text().split())
    return total


def _outcome(watch: _Watch, nonce: bytes) -> Outcome:
    lines = [line for line in watch.tail.decode("utf-8", "replace").splitlines() if line.strip()]
    last = lines[-1].strip()[:_ERROR_CHARACTERS] if lines else ""
    status = watch.process.returncode
    if not watch.has_begun:
        return Outcome("refused", last or f"the process ended with status {status} before the program began")
    if watch.ended_for is not None:
        return watch.ended_for
    if status == 0 and watch.proof == confinement.READY + nonce:
        return Outcome("passed")
    if last.partition(":")[0].endswith("MemoryError"):
        return Outcome("out_of_memory", last)
    if status == -signal.SIGXCPU:
        return Outcome("timed_out", "the limit of processor time was reached")
    if status == 0 or not last:
        reason = "exited before its last line" if status == 0 else f"ended with status {status}"
        return Outcome("failed", f"the program {reason}")
    return Outcome("failed", last)
