"""The first program of a test process: puts itself under limits, then runs the test program that it was given.

Owns what a process can do to itself: resource limits, a view of the file system, another user, the audit hook. Started
by execution.py as `python -c SOURCE`, so it imports the standard library alone and knows nothing of the package.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import random
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

READY = b"ready\n"
"""Sent once the limits are in force and the program is about to begin."""
GO = b"g"
"""The answer: whoever started this process is there to watch it."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
EMPTY = ("/proc", "/run")
"""Programs expect these; other processes and the sockets of services would be in them."""

_MS_NOSUID_NODEV, _MS_BIND_ALL = 2 | 4, 4096 | 16384
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture that Linux 5.12 and later run on
_MOUNT_ATTR_RDONLY_NOSUID_NODEV = 1 | 2 | 4
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION_3 = 0x20080522

_REFUSED_EVENTS = (
    "socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
    "os.startfile", "os.system",
)  # fmt: skip
_PATH_EVENTS = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Do the steps. They stand in a generator, so that no frame below the program's own leads to the proof."""
    for step in _steps():
        step()


def _steps() -> Iterator[Callable[[], object]]:
    """Run the program that stands in file descriptor `program_fd`; a nonce then goes back to who started this.

    The nonce is taken from the socket only after the program's last statement: until then it is not in this process's
    memory, so an early exit cannot show it by accident. A program that searches its own memory on purpose could.
    """
    proof, settings = _take_over_stdin()
    with open(settings["program_fd"], "rb") as file:
        program = file.read()
    directory = settings["directory"]
    if settings["visible"]:
        make_root(directory, settings)
    if settings["namespaces"]:
        drop_privileges(settings["uid"])
    os.chdir(directory)
    with open("program.py", "wb") as file:
        file.write(program)
    limit_resources(settings)
    if not settings["namespaces"]:
        install_guard(directory)
    own_pid = os.getpid()
    # Not before: the kernel forgets it when a process becomes another user. Who ended before that answers nothing.
    _check(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    proof.sendall(READY)
    if proof.recv(1) != GO:
        os._exit(1)
    yield partial(runpy.run_path, "program.py", run_name="__main__")
    if os.getpid() == own_pid:
        proof.sendall(proof.recv(64))
    os._exit(0)


def _take_over_stdin() -> tuple[socket.socket, dict[str, Any]]:
    """The socket that stdin is, moved to where no counting finds it, and the line of JSON that waits in it."""
    at_most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)
    proof = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, random.SystemRandom().randrange(99, at_most)))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := proof.recv(1)):
            os._exit(1)
        line += byte
    return proof, json.loads(line)


def limit_resources(settings: dict[str, Any]) -> None:
    """Hard limits of this process and its children. RLIMIT_AS is counted per process, as there is none for a group."""
    cpu_seconds = math.ceil(settings["timeout_seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"], resource.RLIMIT_NOFILE: settings["num_files"],
        resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    if settings["namespaces"]:
        # Counted per user: within a user namespace of its own, that is this program alone (Linux 5.14 and later).
        # Elsewhere the count would take in everything else this user runs, and the guard refuses new processes anyway.
        limits[resource.RLIMIT_NPROC] = settings["num_processes"]
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def make_root(directory: str, settings: dict[str, Any]) -> None:
    """In a mount namespace of our own: a file system with nothing in it but what is `visible`, read-only, the devices,
    and `directory`, a RAM disk. To leave it takes a privilege, which drop_privileges() gives up.

    Raises OSError where the kernel does not let us (mount_setattr came with Linux 5.12).
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: bytes | None, flags: int, options: str | None = None) -> None:
        data = options.encode() if options else None
        _check(libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, data), f"mount {target}")

    root = directory
    mount("tmpfs", root, b"tmpfs", _MS_NOSUID_NODEV, "size=1m,mode=755")
    for path in (*settings["visible"], *DEVICES):
        os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(root + path, os.O_CREAT))
        if path not in DEVICES:
            mount(path, root + path, None, _MS_BIND_ALL)
    for path in (*EMPTY, directory):
        os.makedirs(root + path, exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    size, where = ctypes.c_size_t(ctypes.sizeof(attributes)), os.fsencode(root)
    _check(libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, where, _AT_RECURSIVE, attributes, size), "mount_setattr")
    for path in DEVICES:
        mount(path, root + path, None, _MS_BIND_ALL)
    owner = settings["uid"] or 0
    options = f"size={settings['directory_bytes']},mode=700,uid={owner},gid={owner}"
    mount("tmpfs", root + directory, b"tmpfs", _MS_NOSUID_NODEV, options)
    os.chroot(root)


def drop_privileges(uid: int | None) -> None:
    """Become `uid`, where this is root, and give up the powers that could undo the mounts; exec cannot bring them
    back."""
    libc = ctypes.CDLL(None, use_errno=True)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _check(status: int, what: str) -> None:
    if status != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def install_guard(directory: str) -> None:
    """Refuse network, processes, signals, and writing outside `directory`, as far as Python's audit events reach.

    Native code can go around it: a guard against accidents. Source: PEP 578 and the library's table of audit events.
    """
    inside = os.path.realpath(directory) + os.sep

    def is_outside(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return not os.path.realpath(os.fsdecode(path)).startswith(inside)

    def guard(event: str, args: tuple[Any, ...]) -> None:
        refused = event in _REFUSED_EVENTS
        if event == "open":
            refused = bool(args[2] & _WRITING) and args[0] != os.devnull and is_outside(args[0])
        elif event in _PATH_EVENTS:
            refused = any(is_outside(arg) for arg in args)
        if refused:
            raise PermissionError(f"{event} is refused while tests run")

    sys.addaudithook(guard)


if __name__ == "__main__":
    main()
