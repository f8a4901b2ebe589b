"""What the ranks of a group can do together, whichever way they talk. Knows no such way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_infer.tensor_parallel.rendezvous import RankFailure

Ints = npt.NDArray[np.int64]


class Backend(ABC):
    """The collectives of one rank; TPGroup says what each does. All but close() raise RankFailure in a failed group."""

    name: str
    is_recordable = False
    """Whether the collectives on tensors may be part of a CUDA graph: not where they go through the host."""
    adds_all_reduce = False
    """Whether add_all_reduce() is worth calling."""

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor: ...
    @abstractmethod
    def all_gather(self, x_SN: Tensor) -> Tensor: ...
    @abstractmethod
    def broadcast_ints(self, ints: Ints | None) -> Ints: ...

    def add_all_reduce(self, x_TN: Tensor, residual_TN: Tensor) -> bool:
        """False: there is no such launch."""
        return False

    def check(self) -> None:  # noqa: B027
        """Nothing to raise where every collective waits for its peers on the host."""

    def waiting(self) -> AbstractContextManager[None]:
        """Around a wait for the device: it ends, and raises, where a rank fails or hangs. Nothing to do on the host."""
        return nullcontext()

    @abstractmethod
    def poll(self) -> None:
        """Raise RankFailure if a peer failed, died or left. Never waits; any thread may call it."""

    @abstractmethod
    def abort(self, message: str) -> RankFailure:
        """Fail the group; the failure that stands."""

    @abstractmethod
    def close(self) -> None: ...
