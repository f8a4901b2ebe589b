"""How the replicas of one run share it: through the launcher's store and nothing else.

Owns who computes what (units of work are claimed one by one, so that a slow replica holds up nobody), what rank 0 tells
the others, and the common counts. Knows no cases and no engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from megatron_infer.world import World, launcher_store

_STORE_TIMEOUT_SECONDS = 30.0
"""So long, and then once more, a starting rank looks for its launcher, which may have been killed meanwhile."""
_POLL_SECONDS = 0.2


class WorkQueue:
    """One process's view of the run. A plain process is alone in its world."""

    def __init__(self, world: World) -> None:
        self._world = world
        store = launcher_store(world, _STORE_TIMEOUT_SECONDS) if world.is_launched else HashStore()
        self._store: Store = PrefixStore("eval", store)

    def tell(self, make: Callable[[], Any]) -> Any:
        """Rank 0 makes a JSON value and every rank returns it; what `make` refuses (ValueError), every rank raises."""
        if not self._world.is_first:
            self._await("told")
            answer = json.loads(self._store.get("told"))
            if "refused" in answer:
                raise ValueError(answer["refused"])
            return answer["value"]
        try:
            value = make()
        except ValueError as error:
            self._store.set("told", json.dumps({"refused": str(error)}))
            raise
        self._store.set("told", json.dumps({"value": value}))
        return value

    def claim(self) -> int:
        """The number of the next unit of work, from 0; every number is given to one caller only."""
        return int(self._store.add("claimed", 1)) - 1

    def count(self, name: str, amount: int) -> None:
        """Add to a count that all replicas share."""
        self._store.add(f"count/{name}", amount)

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """The shared counts as they stand."""
        return {name: int(self._store.add(f"count/{name}", 0)) for name in names}

    def announce(self, event: str) -> None:
        """Let await_announced() of other processes return."""
        self._store.set(f"announced/{event}", "")

    def await_announced(self, event: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for announce(); `meanwhile` is called a few times a second."""
        self._await(f"announced/{event}", meanwhile)

    def _await(self, key: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        # Polling instead of Store.wait: that has a timeout, and cannot be interrupted with Ctrl-C.
        while not self._store.check([key]):
            meanwhile()
            time.sleep(_POLL_SECONDS)
