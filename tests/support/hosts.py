"""Several hosts on one machine, as network namespaces on a switch: addresses, names and processes of their own.

They share the disk, the kernel and the clock. Needs root, `ip` (iproute2) and `unshare` (util-linux).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Host:
    """One of them. `interface` leads to the others; `stray` has an address and leads nowhere."""

    name: str
    namespace: str
    address: str
    interface: str = "eth0"
    stray: str = "stray0"

    def start(
        self, command: Sequence[str], *, hosts_file: Path | None = None, shares_pids: bool = False, **options: object
    ) -> psutil.Popen:
        """Start a command here; once its process is killed, all that it has started is killed too.

        Args:
            hosts_file: to stand in for /etc/hosts.
            shares_pids: as in containers that see the processes of their machine.
        """
        setup = f"hostname {self.name}"
        if hosts_file is not None:
            setup += f" && mount --bind {hosts_file} /etc/hosts"
        pids = [] if shares_pids else ["--pid", "--fork", "--kill-child", "--mount-proc"]
        return psutil.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--ipc", *pids,
             "sh", "-c", f'{setup} && exec "$@"', "sh", *command],
            **options,
        )  # fmt: skip

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Without its network, as where its power or its cable went: nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")
        try:
            yield
        finally:
            _ip("-n", self.namespace, "link", "set", self.interface, "up")


@contextmanager
def simulated_hosts(count: int) -> Iterator[list[Host]]:
    """host1, host2, ... at 10.77.0.1, ...; the namespaces are gone afterwards."""
    mark = f"mi-{secrets.token_hex(4)}"
    switch = f"{mark}-switch"
    hosts = [Host(f"host{i}", f"{mark}-host{i}", f"10.77.0.{i}") for i in range(1, count + 1)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for number, host in enumerate(hosts, 1):
            _ip("netns", "add", host.namespace)
            peer = ("peer", "name", f"port{number}", "netns", switch)
            _ip("link", "add", host.interface, "netns", host.namespace, "type", "veth", *peer)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", host.namespace, "link", "add", host.stray, "type", "bridge")
            for interface, address in ((host.interface, host.address), (host.stray, f"10.78.{number}.1")):
                _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", interface)
                _ip("-n", host.namespace, "link", "set", interface, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for namespace in (switch, *(host.namespace for host in hosts)):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


@cache
def why_not() -> str:
    """Why hosts cannot be simulated here, or nothing."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return "needs root, ip and unshare"
    try:
        with simulated_hosts(1) as (host,):
            process = host.start(["true"], stderr=subprocess.PIPE, text=True)
            _, errors = process.communicate(timeout=60)
            return f"cannot unshare: {errors}" if process.returncode else ""
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces: {error.stderr}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
