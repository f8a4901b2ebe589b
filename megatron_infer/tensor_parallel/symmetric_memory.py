"""Buffers that every GPU of a group reads directly, and the all-reduce of one launch over them.

Owns how ranks map each other's memory, and the trial that shows that it works. The arithmetic and the protocol are
kernels/triton/all_reduce.py. Not torch's symmetric memory: its rendezvous counts exchanges per process and so never
ends between an old process and a new one, such as a notebook with a second LLM and its fresh followers.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_infer.tensor_parallel.rendezvous import ProcessIdentity, Rendezvous, first, first_line

_TRIAL_SECONDS = 60.0
"""Of which most is for the slowest rank to compile the kernel."""

_IPC_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_NATIVE_ATOMIC_SUPPORTED = 3
_GRANULE_BYTES = 2 << 20


class Memory(Protocol):
    """Memory that one process allocates and others map. Addresses are for kernels; OSError where it cannot be done."""

    def allocate(self, num_bytes: int) -> int: ...
    def export(self, address: int) -> str: ...
    def map(self, exported: str) -> int: ...
    def unmap(self, address: int) -> None: ...


class CudaMemory:
    """Memory of one GPU, through the inter-process calls of the CUDA driver (CUDA Driver API, memory management).

    Raises:
        OSError: a call failed, or the GPUs have no link that carries atomic operations (NVLink has, PCIe has not).
    """

    class _Handle(ctypes.Structure):
        _fields_ = (("reserved", ctypes.c_char * _IPC_HANDLE_BYTES),)

    def __init__(self, device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise OSError(f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device = device
        self._uuid = gpu_uuid(device)

    def allocate(self, num_bytes: int) -> int:
        """Zeroed. Freed with the process and not before: a slower rank may be reading it, and nobody waits for it."""
        address = ctypes.c_uint64()
        # The driver shares whole granules; a smaller allocation would hand out its neighbours.
        size = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        return address.value

    def export(self, address: int) -> str:
        handle = self._Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return f"{self._uuid} {bytes(handle).hex()}"

    def map(self, exported: str) -> int:
        uuid, handle = exported.split()
        self._check_link(uuid)
        address, theirs = ctypes.c_uint64(), self._Handle.from_buffer_copy(bytes.fromhex(handle))
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, flags)
        return address.value

    def unmap(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _check_link(self, uuid: str) -> None:
        if uuid == self._uuid:
            return
        visible = {gpu_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
        if uuid not in visible:
            raise OSError(f"GPU {uuid} is not visible to this process")
        own, peer, has_atomics = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(own), ctypes.c_int(visible[self._uuid]))
        self._call("cuDeviceGet", ctypes.byref(peer), ctypes.c_int(visible[uuid]))
        self._call("cuDeviceGetP2PAttribute", ctypes.byref(has_atomics), _NATIVE_ATOMIC_SUPPORTED, own, peer)
        if not has_atomics.value:
            raise OSError(f"no NVLink between GPUs {visible[self._uuid]} and {visible[uuid]}")

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._device):
            # Makes the device's context the one of this thread, which is where the driver works.
            torch.cuda.synchronize()
            status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'CUDA error').decode()} ({status})")


def gpu_uuid(device: torch.device) -> str:
    """Which GPU it is, whatever number a process knows it by."""
    return str(torch.cuda.get_device_properties(device).uuid)


class SymmetricMemory:
    """All-reduce in one launch, in place and in tree order: the same bits on every rank.

    Every rank must make the same calls with the same shapes in the same order, on one stream. The calls may be captured
    in a CUDA graph. bf16, fp16 and fp32; contiguous. No call waits on the host.
    """

    def __init__(self, memory: Memory, rank: int, device: torch.device, addresses: list[int]) -> None:
        """For connect()."""
        # Here alone, so that a machine without a GPU never loads triton.
        from megatron_infer.kernels.triton import all_reduce

        self._memory, self._rank, self._addresses = memory, rank, addresses
        self._launch: Callable[..., None] = all_reduce.all_reduce
        self._max_bytes: int = all_reduce.MAX_BYTES
        # Pinned, so that a thread can set it, and a kernel see it, whatever the GPU is doing.
        abort_1 = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._abort_word: npt.NDArray[np.int32] = abort_1.numpy()
        self._peers = all_reduce.Peers(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(2, all_reduce.MAX_PROGRAMS, dtype=torch.int32, device=device),
            abort_1,
            rank,
        )

    @classmethod
    def connect(
        cls, meeting: Rendezvous, device: torch.device, make_memory: Callable[[torch.device], Memory] = CudaMemory
    ) -> SymmetricMemory | str:
        """The memory, tried out, or why it cannot be used: the same outcome on every rank.

        Raises:
            RankFailure: a rank did not come.
        """
        memory, address, text = _allocate(meeting.size, device, make_memory)
        host = ProcessIdentity.own().host
        told = [line.split("\n") for line in meeting.exchange("symmetric-memory", f"{host}\n{text}")]
        if reason := first(f"rank {q}: {why}" for q, (_, _, why) in enumerate(told) if why):
            return reason
        if len({host for host, _, _ in told}) > 1:
            return "the ranks run on several hosts (or in several PID or network namespaces)"
        assert memory is not None
        addresses, error = _map(memory, meeting.rank, address, [exported for _, exported, _ in told])
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(_unmap, memory, meeting.rank, addresses)
            if reason := first(meeting.exchange("symmetric-mapped", error)):
                return reason
            symmetric = cls(memory, meeting.rank, device, addresses)
            if reason := first(meeting.exchange("symmetric-tried", symmetric._try(device))):
                return reason
            on_failure.pop_all()
        return symmetric

    def add_all_reduce(self, x_TD: Tensor, residual_TD: Tensor) -> bool:
        """Adds the fp32 sum of every rank's x to the residual. False: too large, and nothing has happened."""
        return self._run(x_TD, residual_TD, add=True)

    def all_reduce(self, x_TD: Tensor) -> bool:
        """Makes x the sum of every rank's x. False: too large, and nothing has happened."""
        return self._run(x_TD, x_TD, add=False)

    def abort(self) -> None:
        """End every wait, now and later; what the kernels leave is of no use. Any thread may call it."""
        self._abort_word[0] = 1

    def close(self) -> None:
        """Let go of the other ranks' memory. No kernel of this rank may be running."""
        _unmap(self._memory, self._rank, self._addresses)

    def _run(self, x_TD: Tensor, y_TD: Tensor, *, add: bool) -> bool:
        if x_TD.numel() * x_TD.element_size() > self._max_bytes:
            return False
        # Triton launches on the current device, which need not be this one yet while ranks meet.
        with torch.cuda.device(x_TD.device) if x_TD.is_cuda else contextlib.nullcontext():
            self._launch(x_TD, y_TD, self._peers, add=add)
        return True

    def _try(self, device: torch.device) -> str:
        """Add up numbers known beforehand, in both buffers. Why it failed, or nothing."""
        size = len(self._addresses)
        numbers = torch.arange(1024, dtype=torch.float32, device=device)
        sums, num_launches = torch.zeros_like(numbers), 3
        watchdog = threading.Timer(_TRIAL_SECONDS, self.abort)
        watchdog.start()
        try:
            for _ in range(num_launches):
                self.add_all_reduce(numbers * (self._rank + 1), sums)
            is_right = bool((sums == numbers * (num_launches * size * (size + 1) // 2)).all())
        except RuntimeError as error:
            return f"rank {self._rank}: {error}"
        finally:
            watchdog.cancel()
        if self._abort_word[0]:
            return f"rank {self._rank}: a signal did not arrive within {_TRIAL_SECONDS:g} s"
        return "" if is_right else f"rank {self._rank}: what it reads of the others' memory is wrong"


def _allocate(
    size: int, device: torch.device, make_memory: Callable[[torch.device], Memory]
) -> tuple[Memory | None, int, str]:
    """This rank's buffer: the memory, its address, and "exported\\nreason" of which one part is empty."""
    if size not in (2, 4, 8):
        return None, 0, f"\nserves 2, 4 or 8 ranks, not {size}"
    if find_spec("triton") is None:
        return None, 0, "\ntriton is not installed"
    from megatron_infer.kernels.triton.all_reduce import BUFFER_BYTES

    try:
        memory = make_memory(device)
        address = memory.allocate(BUFFER_BYTES)
        return memory, address, f"{memory.export(address)}\n"
    except (OSError, RuntimeError) as error:
        return None, 0, f"\n{first_line(error)}"


def _map(memory: Memory, rank: int, address: int, exported: list[str]) -> tuple[list[int], str]:
    """The addresses of all ranks' buffers, as far as they could be mapped, and why not all could."""
    addresses: list[int] = []
    try:
        for q, text in enumerate(exported):
            addresses.append(address if q == rank else memory.map(text))
    except (OSError, RuntimeError, ValueError) as error:
        return addresses, f"rank {rank}: {first_line(error)}"
    return addresses, ""


def _unmap(memory: Memory, rank: int, addresses: list[int]) -> None:
    for q, address in enumerate(addresses):
        if q != rank:
            with contextlib.suppress(OSError):  # of a process that is gone
                memory.unmap(address)
