"""All-reduce of a few tokens in one launch: every rank reads every rank's x and adds it up, into its residual stream.

Each program copies a slice of x into this rank's buffer, signals the same program of every rank, waits for theirs, and
adds the slices of all buffers. Reads SIZE x numel elements, all but its own over the links; bound by their latency. The
residual is then complete, and the GEMV that reads it norms it along the way: hence no RMSNorm here. Knows addresses
only; tensor_parallel/symmetric_memory.py maps the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

MAX_RANKS = 8
MAX_PROGRAMS = 64
"""They wait for programs of other GPUs, so all must be resident: fewer than any GPU in mind has multiprocessors."""

_SLICE_BYTES = 8192
MAX_BYTES = MAX_PROGRAMS * _SLICE_BYTES
"""Of x: 16 tokens of hidden size 8192 in fp32."""

BUFFER_BYTES = 2 * MAX_BYTES + MAX_PROGRAMS * MAX_RANKS * 4
"""Of a rank: slices of even epochs, slices of odd epochs, and per program the epoch each rank has signalled (int32)."""

_POLLS = 256
"""The abort word lies in host memory, farther away than the signals: it is read once in so many polls."""


@triton.jit
def _all_have_signalled(signal_ptrs, epoch, abort_ptr, seen_ptr, POLLS: tl.constexpr):
    """Waits until every rank has reached the epoch. False: the group was aborted."""
    polls = 0
    missing = 1
    aborted = 0
    while (missing > 0) & (aborted == 0):
        signalled = tl.atomic_add(signal_ptrs, 0, sem="acquire", scope="sys")
        # A fast rank may be one epoch ahead. The difference stays right when the counters wrap around.
        missing = tl.max((signalled - epoch < 0).to(tl.int32), axis=0)
        polls += 1
        if polls % POLLS == 0:
            # Threads may read different words while the host writes it; all go by what one of them had read before.
            aborted = tl.atomic_xchg(seen_ptr, tl.load(abort_ptr, volatile=True), sem="relaxed")
    return missing == 0


@triton.jit
def _sum_of_ranks(x_ptr, buffers_ptr, place, inside, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """In fp32, one half of the ranks plus the other half, and so on down: ((r0+r1)+(r2+r3))+..."""
    if COUNT == 1:
        buffer_ptr = tl.multiple_of(tl.load(buffers_ptr + FIRST).to(x_ptr.dtype), 16)
        total = tl.load(buffer_ptr + place, mask=inside, other=0.0).to(tl.float32)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _sum_of_ranks(x_ptr, buffers_ptr, place, inside, FIRST, HALF)
        total = low + _sum_of_ranks(x_ptr, buffers_ptr, place, inside, FIRST + HALF, HALF)
    return total


@triton.jit(do_not_specialize=["rank"])
def add_all_reduce_kernel(
    x_ptr,
    y_ptr,
    buffers_ptr,
    counters_ptr,
    abort_ptr,
    numel,
    rank,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    MAX_RANKS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    SLICE_BYTES: tl.constexpr,
    POLLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = sum of every rank's x, or y += with ADD; untouched when the group is aborted.

    A program counts its launches in counters_ptr, because a CUDA graph repeats the arguments it was captured with, and
    has a place of its own in each of two buffers, taken in turn. No place is overwritten too soon: a rank writes it
    again two epochs later, after it has seen every rank's signal of the epoch between. A rank sends that one in a later
    launch than the one in which it read the place, and launches of a rank follow one another.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    n = program * BLOCK + columns
    inside = n < numel
    epoch = tl.load(counters_ptr + program) + 1
    SLICE: tl.constexpr = SLICE_BYTES * 8 // x_ptr.dtype.element_ty.primitive_bitwidth
    place = ((epoch & 1) * MAX_PROGRAMS + program) * SLICE + columns
    own_ptr = tl.multiple_of(tl.load(buffers_ptr + rank).to(x_ptr.dtype), 16)
    tl.store(own_ptr + place, tl.load(x_ptr + n, mask=inside), mask=inside)
    # A signal is sent by one thread, on behalf of all: they must have stored.
    tl.debug_barrier()
    ranks = tl.arange(0, SIZE)
    signals = 2 * MAX_PROGRAMS * SLICE_BYTES + program * MAX_RANKS * 4
    sent_ptrs = (tl.load(buffers_ptr + ranks) + (signals + rank * 4)).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(sent_ptrs, epoch, sem="release", scope="sys")
    received_ptrs = (tl.load(buffers_ptr + rank) + signals + ranks * 4).to(tl.pointer_type(tl.int32))
    if _all_have_signalled(received_ptrs, epoch, abort_ptr, counters_ptr + (MAX_PROGRAMS + program), POLLS):
        # Seen by one thread each, and valid for those behind a barrier.
        tl.debug_barrier()
        total = _sum_of_ranks(x_ptr, buffers_ptr, place, inside, 0, SIZE)
        if ADD:
            total = tl.load(y_ptr + n, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(y_ptr + n, total.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(counters_ptr + program, epoch)


@dataclass(frozen=True)
class Peers:
    """What a launch needs to reach the other ranks; made once, so that a CUDA graph can hold on to it."""

    buffers_R: Tensor
    """int64: where each rank's buffer of BUFFER_BYTES is mapped in this process; signals zero at first"""
    counters_2P: Tensor
    """int32 [2, MAX_PROGRAMS], zero at first: launches of each program so far, and the abort word it has seen last"""
    abort_1: Tensor
    """int32 in host memory that the GPU can read: not zero ends every wait"""
    rank: int


def all_reduce(x_TD: Tensor, y_TD: Tensor, peers: Peers, *, add: bool) -> None:
    """y = the sum of every rank's x, or y += it; the same bits on every rank. y may be x.

    Every rank must launch the same shapes in the same order, one launch after the other on one stream. Sums are fp32
    and are rounded once, to y's dtype. At most MAX_BYTES of x; 2, 4 or 8 ranks; all contiguous; bf16, fp16 or fp32.
    """
    assert x_TD.is_contiguous() and y_TD.is_contiguous() and x_TD.shape == y_TD.shape
    numel = x_TD.numel()
    assert numel * x_TD.element_size() <= MAX_BYTES
    block = 1024
    while numel > MAX_PROGRAMS * block:
        block *= 2
    add_all_reduce_kernel[(triton.cdiv(numel, block),)](
        x_TD, y_TD, peers.buffers_R, peers.counters_2P, peers.abort_1, numel, peers.rank,
        ADD=add, SIZE=peers.buffers_R.shape[0], MAX_RANKS=MAX_RANKS, MAX_PROGRAMS=MAX_PROGRAMS,
        SLICE_BYTES=_SLICE_BYTES, POLLS=_POLLS, BLOCK=block, num_warps=block // 256,
    )  # fmt: skip
