"""Which tokens of which requests the next step computes, and in which cache blocks.

Owns the queues, the token budget, admission, preemption and the block tables. There are no phases: a request has
`num_computed < len(ids)`, whether it is prefilling, decoding or coming back from preemption. Knows nothing of tensors.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

from megatron_infer.cache.block_pool import ROOT, BlockPool, Match, common_head
from megatron_infer.engine.plan import Plan
from megatron_infer.engine.request import Event, Request, Sampled
from megatron_infer.engine.step import Step


class Scheduler:
    """Continuous batching under a token budget, first come first served.

    Both queues are ordered by arrival and every running request arrived before every waiting one. Preemption takes the
    latest, admission the earliest, and `add` refuses what the whole pool cannot hold; so the oldest request always
    progresses and nothing can starve.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.num_preemptions = 0
        self._requests: dict[int, Request] = {}
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._plans: deque[Plan] = deque()
        """Of the steps in flight: at most two, in order."""
        self._refused: tuple[Request | None, int] = (None, 0)
        """The request that last found too few blocks, and how many were to be had."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: empty or too long a prompt, an id in use, or a completion that the whole cache cannot hold.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id} is in use")
        if not request.ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        request.max_len = min(request.max_len, self.max_model_len)
        if request.num_prompt >= request.max_len:
            raise ValueError(
                f"the prompt's {request.num_prompt} tokens leave no room for a completion in a context of "
                f"{request.max_len}; shorten it or raise max_model_len"
            )
        # The last token of a completion is never computed.
        needed = self.pool.blocks_for(request.longest_len - 1)
        if needed > self.pool.num_blocks:
            raise ValueError(
                f"a prompt of {request.num_prompt} tokens with max_new_tokens {request.sampling.max_new_tokens} can "
                f"take {needed} KV-cache blocks of {self.pool.block_size} tokens, and there are "
                f"{self.pool.num_blocks}; raise kv_cache_memory_bytes, or lower max_new_tokens or the prompt's length"
            )
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: int) -> Event | None:
        """End a request in any state, its step in flight included; None when it is unknown or finished.

        What it had computed stays in the prefix cache: the next keystroke's prompt begins like the aborted one.
        """
        request = self._requests.get(request_id)
        if request is None or request.finish_reason is not None:
            return None
        event = request.finish("abort")
        queue = self._running if request in self._running else self._waiting
        queue.remove(request)
        if not self._is_in_flight(request):  # else commit frees its blocks: the step still writes them
            self._retire(request)
        return event

    def schedule(self) -> Step | None:
        """Plan the next step, or None when there is nothing to do. Every step before must be committed."""
        assert not self._plans, "the last step is not committed"
        plan = Plan()
        self._make_room_for_decoding()
        budget = self.max_num_batched_tokens
        # Admission ends when the budget does. So only the last one admitted can be short of its prompt's end: a long
        # prefill takes what the decoding ones leave, never the reverse; and there is a token for each of them.
        for request in self._running:
            chunk = min(budget, request.num_remaining)
            plan.rows.append((request, chunk))
            budget -= chunk
        self._admit(plan, budget)
        if not plan.rows:
            assert not self.has_work, "requests wait, and nothing runs that could make room for them"
            return None
        plan.step = plan.build(self.pool)
        self._plans.append(plan)
        return plan.step

    def schedule_ahead(self) -> Step | None:
        """Plan the step after the one in flight, whose samples are not known yet; None where they must be.

        That is so unless all of its rows are sampled and nobody could be admitted. The new step computes the samples
        themselves, of those requests that need not end with them: id -1 - j is the j-th sample of the step in flight.
        A request that turns out to have ended has its row computed for nothing.
        """
        assert len(self._plans) == 1, "one step must be in flight"
        (plan,) = self._plans
        assert plan.step is not None
        if self._may_admit() or not plan.step.sample_S.all():
            return None
        ahead, sample_indices = Plan(), []
        for j, (request, _) in enumerate(plan.rows):
            if request.finish_reason is not None or len(request.ids) + 1 >= request.longest_len:
                continue
            if len(request.block_table) < self.pool.blocks_for(len(request.ids) + 1):
                fresh = self.pool.take(1)
                if fresh is None:
                    return None
                request.block_table.append(fresh[0])
            ahead.rows.append((request, 1))
            sample_indices.append(j)
        if not ahead.rows:
            return None
        ahead.step = ahead.build_ahead(self.pool, sample_indices)
        self._plans.append(ahead)
        return ahead.step

    def commit(self, step: Step, sampled: Sequence[Sampled]) -> list[Event]:
        """Take in an executed step: one Sampled per row with `sample_S` 1, in order; returns an Event for each.

        Only now do its full blocks become matchable. Requests that have ended by now yield no event here.
        """
        assert self._plans, "no step is in flight"
        plan = self._plans[0]
        assert plan.step is step, "steps are committed in the order in which they were planned"
        assert len(sampled) == int(step.sample_S.sum()), f"{len(sampled)} samples for {int(step.sample_S.sum())} rows"
        self._plans.popleft()
        self.pool.release([source for source, _, _ in plan.copies])
        events: list[Event] = []
        samples = iter(sampled)
        for (request, chunk), is_sampled in zip(plan.rows, step.sample_S.tolist(), strict=True):
            # What was computed for nothing is not among the ids.
            request.num_computed = min(request.num_computed + chunk, len(request.ids))
            result = next(samples) if is_sampled else None
            if result is not None and request.finish_reason is None:
                events.append(request.accept(result))
            if result is not None and result.error is not None:
                # Nobody may inherit what gave no finite logits, be it a fault of the hardware or of the prompt.
                self.pool.forget(request.block_table[0])
                request.cacheable = False
            self._seal_full_blocks(request)
            if request.finish_reason is not None:
                if request in self._running:
                    self._running.remove(request)
                if not self._is_in_flight(request):
                    self._retire(request)
        return events

    def _is_in_flight(self, request: Request) -> bool:
        return any(plan.has(request) for plan in self._plans)

    # ---- planning ---------------------------------------------------------------------------------------------------

    def _make_room_for_decoding(self) -> None:
        """Give each running request the block for its next token, preempting the latest where blocks run out.

        Admission has reserved the whole prompt, so only decoding grows. What is preempted needs more blocks than that
        set free, so the same step does not admit it again.
        """
        pool, index = self.pool, 0
        while index < len(self._running):
            request = self._running[index]
            if len(request.block_table) >= pool.blocks_for(len(request.ids)):
                index += 1
            elif fresh := pool.take(1):
                request.block_table.append(fresh[0])
            else:
                latest = self._running.pop()  # perhaps `request` itself
                self._vacate(latest)
                self._waiting.appendleft(latest)
                self.num_preemptions += 1

    def _may_admit(self) -> bool:
        """Whether it is worth matching, a hash per block of a prompt: the first that waits has not found too few blocks
        since more became free."""
        if not self._waiting or len(self._running) >= self.max_num_seqs:
            return False
        refused, headroom = self._refused
        return refused is not self._waiting[0] or self.pool.num_free - len(self._running) > headroom

    def _admit(self, plan: Plan, budget: int) -> None:
        """Move waiting requests into the step, in order, while budget, sequences and blocks last."""
        if not self._may_admit():
            return
        being_written = {key: row for row in plan.rows if (key := self._first_block_written(*row)) is not None}
        while budget and self._may_admit():
            request = self._waiting[0]
            headroom = self.pool.num_free - len(self._running)
            match = self.pool.match(request.ids)
            if self._worth_waiting(request, match, being_written, budget):
                self.pool.release(match.held)
                return
            if not self._allocate(request, match, plan):
                self._refused = (request, headroom)
                return
            self._running.append(self._waiting.popleft())
            row = (request, min(budget, request.num_remaining))
            plan.rows.append(row)
            budget -= row[1]
            key = self._first_block_written(*row)
            if key is not None:
                being_written.setdefault(key, row)

    def _allocate(self, request: Request, match: Match, plan: Plan) -> bool:
        """Blocks for all of the request's tokens, or nothing: a prompt is never preempted between its own chunks.

        One block per running request stays free, or their next tokens would evict the newcomer at once.
        """
        pool = self.pool
        num_fresh = pool.blocks_for(len(request.ids)) - len(match.blocks)
        wanted = num_fresh + len(self._running)
        tail_block, tail_len = match.tail_block, match.tail_len
        if tail_block is not None and pool.num_free < wanted:
            pool.release([tail_block])
            tail_block, tail_len = None, 0
        fresh = pool.take(num_fresh) if pool.num_free >= wanted else None
        if fresh is None:
            pool.release(match.blocks)
            return False
        request.block_table = array("i", [*match.blocks, *fresh])
        request.num_sealed = len(match.blocks)
        request.num_computed = len(match.blocks) * pool.block_size + tail_len
        if tail_block is not None:
            plan.copies.append((tail_block, fresh[0], tail_len))
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed
        return True

    def _first_block_written(self, request: Request, chunk: int) -> tuple[int, tuple[int, ...]] | None:
        """(parent, ids) of the first block that this chunk completes and its commit will seal."""
        size = self.pool.block_size
        index = request.num_computed // size
        end = (index + 1) * size
        if not self.pool.enable_prefix_caching or request.num_computed + chunk < end:
            return None
        return request.block_table[index - 1] if index else ROOT, tuple(request.ids[end - size : end])

    def _worth_waiting(
        self,
        request: Request,
        match: Match,
        being_written: dict[tuple[int, tuple[int, ...]], tuple[Request, int]],
        budget: int,
    ) -> bool:
        """Whether this very step computes, for another request, at least half of what this one would compute in it.

        The samples of one prompt then prefill it once. The other request is in the step, so the wait is one step long.
        """
        size = self.pool.block_size
        start = len(match.blocks) * size
        parent = match.blocks[-1] if match.blocks else ROOT
        row = being_written.get((parent, tuple(request.ids[start : start + size])))
        if row is None:
            return False
        other, chunk = row
        limit = min(len(request.ids) - 1, other.num_computed + chunk)
        shared = common_head(request.ids[start:limit], other.ids[start:limit]) // size * size
        return 2 * (shared - match.tail_len) >= min(budget, len(request.ids) - start - match.tail_len)

    # ---- blocks -----------------------------------------------------------------------------------------------------

    def _seal_full_blocks(self, request: Request) -> None:
        size, table = self.pool.block_size, request.block_table
        while request.cacheable and (request.num_sealed + 1) * size <= request.num_computed:
            index = request.num_sealed
            parent = table[index - 1] if index else ROOT
            block = self.pool.seal(table[index], parent, request.ids[index * size : (index + 1) * size])
            if block is None:
                request.cacheable = False
            else:
                table[index] = block
                request.num_sealed += 1

    def _vacate(self, request: Request) -> None:
        """Give up the blocks; what is computed stays matchable, the head of the last block included."""
        table, index = request.block_table, request.num_sealed
        computed_tail = request.ids[index * self.pool.block_size : request.num_computed]
        if request.cacheable and computed_tail:
            self.pool.seal(table[index], table[index - 1] if index else ROOT, computed_tail)
        self.pool.release(table)
        request.block_table = array("i")
        request.num_computed = request.num_sealed = 0
        request.cacheable = True

    def _retire(self, request: Request) -> None:
        self._vacate(request)
        del self._requests[request.request_id]
        if self._refused[0] is request:
            self._refused = (None, 0)

    def check(self) -> None:
        """Assert every invariant of the queues and of the pool; for tests and post-mortems."""
        pool = self.pool
        pool.check()
        in_flight = [request for plan in self._plans for request, _ in plan.rows]
        ended = [request for request in in_flight if request.finish_reason is not None]
        order = list(self._requests.values())  # a dict keeps the order of arrival
        assert [r for r in order if r not in ended] == [*self._running, *self._waiting]
        refs = [0] * pool.num_blocks
        for block in [b for request in order for b in request.block_table]:
            refs[block] += 1
        for source in [source for plan in self._plans for source, _, _ in plan.copies]:
            refs[source] += 1
        assert refs == [pool.num_refs(block) for block in range(pool.num_blocks)], "a block leaked or is held too often"
        for request in self._waiting:
            assert request.num_computed == 0
            assert not request.block_table
        assert len(self._running) <= min(self.max_num_seqs, self.max_num_batched_tokens)
        if not self._plans:
            assert all(request.num_remaining == 1 for request in self._running[:-1])
        for request in self._running:
            assert 0 <= request.num_computed < len(request.ids)
            assert len(request.block_table) * pool.block_size >= request.num_computed
            writable = request.block_table[request.num_sealed :]
            assert all(pool.num_refs(block) == 1 for block in writable), "a block that is still written is shared"
