"""Which tokens of which requests the next step computes, and in which cache blocks.

Owns the queues, the token budget, admission, preemption and drafts' limits. There are no phases: a request has
`num_computed < len(ids)`, whether it is prefilling, decoding or coming back from preemption. Knows nothing of tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.engine.block_table import Copy, allocate, grow, seal_full_blocks, shrink, vacate
from megatron_infer.engine.plan import Plan, Row
from megatron_infer.engine.request import Draft, Event, Request, Sampled
from megatron_infer.engine.shared_prefill import Chunk, SharedPrefill


class Drafter(Protocol):
    """Guesses how requests go on. No guess changes an answer: right ones save steps, wrong ones cost time."""

    def propose(self, request: Request) -> Draft:
        """Ids of the vocabulary that may follow `request.ids`.

        Called when a step computes all of `request.ids`. The step takes as many of the ids as fit. What came of
        earlier ones is in `request.ids`.
        """
        ...

    def observe(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """Called after a step of decoding sequences, with what it computed, drafts included, and how long it took."""
        ...


class Scheduler:
    """Continuous batching under a token budget, first come first served.

    Both queues are ordered by arrival and every running request arrived before every waiting one. Preemption takes the
    latest, admission the earliest, and `add` refuses what the whole pool cannot hold; so the oldest request always
    progresses and nothing can starve.
    """

    def __init__(
        self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
        drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.pool, self._drafter = pool, drafter
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._requests: dict[int, Request] = {}
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._plans: deque[Plan] = deque()
        """Of the steps in flight: at most two, in order."""
        self._refused: tuple[Request | None, int] = (None, 0)
        """The request that last found too few blocks, and how many were to be had."""

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        return len(self._running), len(self._waiting)

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
        if request.num_prompt + min(request.sampling.max_new_tokens, 1) > request.max_len:
            raise ValueError(
                f"the prompt's {request.num_prompt} tokens leave no room for a completion in a context of "
                f"{request.max_len}; shorten it or raise max_model_len"
            )
        # The last token of a completion is never computed.
        needed = self.pool.blocks_for(max(request.longest_len - 1, request.num_prompt))
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

    def schedule(self) -> Plan | None:
        """Plan the next step, or None when there is nothing to do. Every step before must be committed."""
        assert not self._plans, "the last step is not committed"
        self._make_room_for_decoding()
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        copies: list[Copy] = []
        # Admission ends when the budget does. So only the last one admitted can be short of its prompt's end: a long
        # prefill takes what the decoding ones leave, never the reverse; and there is a token for each of them.
        for request in self._running:
            chunk = min(budget, request.num_remaining)
            chunks.append((request, chunk))
            budget -= chunk
        budget = self._admit(chunks, copies, budget)
        if not chunks:
            assert not self.has_work, "requests wait, and nothing runs that could make room for them"
            return None
        rows = []
        for request, chunk in chunks:
            start, end = request.num_computed, request.num_computed + chunk
            draft = Draft()
            num_scores = max(0, min(request.num_unscored, end - len(request.prompt_scores)))
            # With a draft, numbers that are not finite could be the draft's.
            if self._drafter is not None and request.takes_drafts and end == len(request.ids) and not num_scores:
                draft = self._draft(self._drafter, request, budget)
                budget -= len(draft.token_ids)
            rows.append(Row(request, request.ids[start:end], end, *draft, num_scores))
        plan = Plan.of(rows, copies, self.pool)
        self._plans.append(plan)
        return plan

    def schedule_ahead(self) -> Plan | None:
        """Plan the step after the one in flight, whose samples are not known yet; None where they must be.

        That is so for a drafter and for what edits logits by history, which go on from them, and unless all rows are
        sampled and nobody could be admitted.
        The new step computes the samples themselves, of those requests that need not end with them: id -1 - j is the
        j-th sample of the step in flight. A request that turns out to have ended has its row computed for nothing.
        """
        assert len(self._plans) == 1, "one step must be in flight"
        (plan,) = self._plans
        has_others = self._drafter is not None or any(row.num_scores for row in plan.rows)
        if has_others or self._may_admit() or not plan.step.num_samples_S.all():
            return None
        rows = []
        for j, row in enumerate(plan.rows):
            request, end = row.request, len(row.request.ids) + 1
            if request.finish_reason is not None or end >= request.longest_len:
                continue
            if request.needs_history or not grow(self.pool, request, end):
                return None
            rows.append(Row(request, [-1 - j], end))
        if not rows:
            return None
        self._plans.append(Plan.of(rows, [], self.pool))
        return self._plans[-1]

    def commit(
        self, plan: Plan, sampled: Sequence[Sequence[Sampled]], seconds: float | None = None
    ) -> list[Event]:  # fmt: skip
        """Take in an executed step.

        Only now do its full blocks become matchable. What was computed for nothing, for a rejected draft or behind the
        end of a request, is not among the ids: its slots are written again.

        Args:
            sampled: for each row as many as `num_samples_S` says.
            seconds: how long the step took, where that was measured.
        Returns:
            an Event per new token, and one for each request that failed; none for those that have ended by now.
        """
        assert self._plans, "no step is in flight"
        assert self._plans[0] is plan, "steps are committed in the order in which they were planned"
        numbers, wanted = list(map(len, sampled)), plan.step.num_samples_S.tolist()
        assert numbers == wanted, f"{numbers} samples for rows that yield {wanted}"
        self._plans.popleft()
        if plan.copies:
            self.pool.release([source for source, _, _ in plan.copies])
        if self._drafter is not None and seconds is not None and plan.is_decoding:
            self._drafter.observe(len(plan.rows), len(plan.step.token_ids_T), seconds)
        events: list[Event] = []
        for row, given in zip(plan.rows, sampled, strict=True):
            request = row.request
            scores, samples = given[: row.num_scores], given[row.num_scores :]
            if request.finish_reason is None:
                events += request.accept_scores(scores)
            if not samples or request.finish_reason is not None:
                request.num_computed = min(row.end, len(request.ids))
            elif new := request.accept(samples, row.draft, row.source):  # else the row is computed again
                events += new
                request.num_computed = max(row.end, len(request.ids) - 1)
            if request.finish_reason is not None and any(s.error is not None for s in (*scores, *samples[:1])):
                # Nobody may inherit what gave no finite logits, be it a fault of the hardware or of the prompt.
                self.pool.forget(request.block_table[0])
                request.cacheable = False
            seal_full_blocks(self.pool, request)
            if row.draft:
                shrink(self.pool, request)
            if request.finish_reason is not None:
                if request in self._running:
                    self._running.remove(request)
                if not self._is_in_flight(request):
                    self._retire(request)
        return events

    def _is_in_flight(self, request: Request) -> bool:
        return any(plan.has(request) for plan in self._plans)

    def _retire(self, request: Request) -> None:
        vacate(self.pool, request)
        del self._requests[request.request_id]
        if self._refused[0] is request:
            self._refused = (None, 0)

    # ---- planning ---------------------------------------------------------------------------------------------------

    def _make_room_for_decoding(self) -> None:
        """Give each running request the block for its next token, preempting the latest where blocks run out.

        Admission has reserved the whole prompt, so only decoding grows. What is preempted needs more blocks than that
        set free, so the same step does not admit it again.
        """
        index = 0
        while index < len(self._running):
            request = self._running[index]
            if grow(self.pool, request, len(request.ids)):
                index += 1
            else:
                latest = self._running.pop()  # perhaps `request` itself
                vacate(self.pool, latest)
                self._waiting.appendleft(latest)
                self.num_preemptions += 1

    def _draft(self, drafter: Drafter, request: Request, budget: int) -> Draft:
        """A draft of what nobody else wants: tokens that are left of the budget, and blocks that are free.

        One block per running request stays free, as at admission. The last sample must not exceed the longest length.
        """
        pool = self.pool
        num_spare = max(pool.num_free - len(self._running), 0)
        num_slots = (len(request.block_table) + num_spare) * pool.block_size
        most = min(budget, min(num_slots, request.longest_len - 1) - len(request.ids))
        ids, source = drafter.propose(request) if most > 0 else Draft()
        has_grown = grow(pool, request, len(request.ids) + len(ids[:most]))
        assert has_grown
        return Draft(ids[:most], source)

    def _may_admit(self) -> bool:
        """Whether it is worth matching, a hash per block of a prompt: the first that waits has not found too few blocks
        since more became free."""
        if not self._waiting or len(self._running) >= self.max_num_seqs:
            return False
        refused, headroom = self._refused
        return refused is not self._waiting[0] or self.pool.num_free - len(self._running) > headroom

    def _admit(self, chunks: list[Chunk], copies: list[Copy], budget: int) -> int:
        """Move waiting requests into the step, in order, while budget, sequences and blocks last; the budget left."""
        if not self._may_admit():
            return budget
        shared = SharedPrefill(self.pool, chunks)
        while budget and self._may_admit():
            request = self._waiting[0]
            headroom = self.pool.num_free - len(self._running)
            # Rows that a log probability is still to be taken of are computed anew. No match reaches the last id.
            num_matchable = len(request.prompt_scores) + 1 if request.num_unscored else len(request.ids)
            match = self.pool.match(request.ids[:num_matchable])
            if not request.num_unscored and shared.is_worth_waiting_for(request, match, budget):
                self.pool.release(match.held)
                break
            # One block per running request stays free, or their next tokens would evict the newcomer at once.
            to_copy = allocate(self.pool, request, match, num_reserved=len(self._running))
            if to_copy is None:
                self._refused = (request, headroom)
                break
            copies += to_copy
            self._running.append(self._waiting.popleft())
            chunk = (request, min(budget, request.num_remaining))
            chunks.append(chunk)
            shared.add(chunk)
            budget -= chunk[1]
        return budget
