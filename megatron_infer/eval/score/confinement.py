"""The first program of a test process: puts itself under limits, then runs the test program that it was given.

Owns what a process can do to itself: resource limits, a read-only view of the file system, the audit hook. Started by
execution.py as `python -c SOURCE SETTINGS`, so it imports the standard library alone and knows nothing of the package.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import runpy
import socket
import sys
from typing import Any

READY = b"ready\n"
"""Sent once the limits are in force and the program is about to begin."""

_HIDDEN = ("/proc", "/run")
"""What shows other processes, and the sockets of services that would do on a program's behalf what it may not do."""

_MS_RDONLY, _MS_NOSUID_NODEV = 1, 2 | 4
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture that Linux 5.12 and later run on
_MOUNT_ATTR_RDONLY = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_REFUSED_EVENTS = (
    "socket.bind",
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
)
_PATH_EVENTS = (
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(settings: dict[str, Any]) -> None:
    """Run the program that stands in file descriptor `program_fd`; a nonce then goes back through `proof_fd`.

    The nonce is taken from the socket only after the program's last statement: until then it is not in this process's
    memory, so an early exit cannot show it by accident. A program that hunts for the descriptor on purpose could.
    """
    with open(settings["program_fd"], "rb") as file:
        program = file.read()
    proof = socket.socket(fileno=settings["proof_fd"])
    directory = settings["directory"]
    if settings["namespaces"]:
        make_file_system_read_only(directory, settings["directory_bytes"])
        drop_privileges()
    os.chdir(directory)
    with open("program.py", "wb") as file:
        file.write(program)
    limit_resources(settings)
    if not settings["namespaces"]:
        install_guard(directory)
    own_pid = os.getpid()
    proof.sendall(READY)
    runpy.run_path("program.py", run_name="__main__")
    if os.getpid() == own_pid:
        proof.sendall(proof.recv(64))
    os._exit(0)


def limit_resources(settings: dict[str, Any]) -> None:
    """Hard limits of this process and its children. RLIMIT_AS is counted per process, as there is none for a group."""
    cpu_seconds = math.ceil(settings["timeout_seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: settings["num_files"],
        resource.RLIMIT_CORE: 0,
    }
    if settings["namespaces"]:
        # Counted per user: within a user namespace of its own, that is this program alone (Linux 5.14 and later).
        # Elsewhere the count would take in everything else this user runs, and the guard refuses new processes anyway.
        limits[resource.RLIMIT_NPROC] = settings["num_processes"]
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def make_file_system_read_only(directory: str, directory_bytes: int) -> None:
    """In a mount namespace of our own: every mount becomes read-only, _HIDDEN empty, and `directory` a new RAM disk.

    Raises OSError where the kernel does not let us (mount_setattr came with Linux 5.12).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, size), "mount_setattr")
    for hidden in _HIDDEN:
        if os.path.isdir(hidden) and not directory.startswith(f"{hidden}/"):
            _check(libc.mount(b"tmpfs", hidden.encode(), b"tmpfs", _MS_RDONLY | _MS_NOSUID_NODEV, None), "mount")
    options = f"size={directory_bytes},mode=700".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", _MS_NOSUID_NODEV, options), "mount")


def drop_privileges() -> None:
    """Give up the namespace's own root powers, which could undo the mounts; exec cannot bring them back."""
    libc = ctypes.CDLL(None, use_errno=True)
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
    main(json.loads(sys.argv[1]))
