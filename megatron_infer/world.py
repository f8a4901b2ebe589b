"""Which rank this process is, of how many, and on which host: the only reader of the launcher's environment.

A World is read once and passed down. How ranks then meet is tensor_parallel.rendezvous's business.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_REMEDY = "start with `torchrun --nproc_per_node N ...`, or unset RANK and WORLD_SIZE to run as a single process"


@dataclass(frozen=True)
class World:
    """The processes that were started together, and which of them this one is; by default one that is alone.

    Attributes:
        rank, size: among all processes. local_rank, local_size: among those of this host.
        address: "host:port" where a launcher has the ranks meet; empty where none started this process.
        attempt: how often the launcher has restarted its workers.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    attempt: int = 0

    @property
    def is_launched(self) -> bool:
        """Whether torchrun, or a compatible launcher, started this process."""
        return bool(self.address)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @classmethod
    def from_env(cls) -> World:
        """The world of this process.

        Raises:
            ValueError: the launcher's variables are incomplete or contradict each other.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(key)]
        if missing:
            raise ValueError(f"the environment of a distributed run lacks {', '.join(missing)}: {_REMEDY}")
        rank, size = _integer("RANK"), _integer("WORLD_SIZE")
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} is not below WORLD_SIZE={size}: {_REMEDY}")
        local_rank, local_size = _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", 1)
        if not 1 <= local_size <= size:
            raise ValueError(f"LOCAL_WORLD_SIZE={local_size} does not fit WORLD_SIZE={size}: {_REMEDY}")
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return cls(rank, size, local_rank, local_size, address, _integer("TORCHELASTIC_RESTART_COUNT", 0))


def _integer(key: str, default: int | None = None) -> int:
    text = os.environ.get(key, default)
    try:
        return int(text)  # type: ignore[arg-type]  # without a default the key is there
    except ValueError:
        raise ValueError(f"{key}={text!r} is not an integer: {_REMEDY}") from None
