"""One replica's share of a run: claimed units become prompts, completions become lines of its part.

Owns the order of work, seeds and what a line says. Which keys are left, and who else works, it is told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_infer.completion import Completion, Timings
from megatron_infer.eval.cases import Case
from megatron_infer.eval.run.records import GIVEN_UP, AttemptLog, Key
from megatron_infer.eval.run.work_queue import WorkQueue
from megatron_infer.llm import LLM
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt

_UNIT_KEYS = 8
"""Keys claimed at a time: enough that neighbours share a cached prefix, few enough that no replica ends much later."""

SUSPECTS_DONE = "suspects done"
Work = tuple[Case, int]
"""A case and a sample index: a key with what is needed to compute it."""


@dataclass(frozen=True)
class Settings:
    """What decides the answers, beside model and engine. `sampling.n` samples of every case are made."""

    options: FimOptions
    sampling: SamplingParams
    seed: int


def seed_of(seed: int, key: Key) -> int:
    """The sampling seed of one key, from 0 to 2^63 - 1: a function of the run's seed and the key alone."""
    digest = hashlib.sha256(f"{seed}\0{key[1]}\0{key[0]}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def in_prefix_order(work: Sequence[Work], order: str) -> list[Work]:
    """Sorted so that prompts with a common beginning, as those of one file often have, are neighbours."""

    def beginning(item: Work) -> tuple[Any, ...]:
        prompt = item[0].prompt
        text = (prompt.suffix, prompt.path, prompt.prefix) if order == "spm" else (prompt.path, prompt.prefix)
        return (prompt.repository, prompt.extra_files, *text, item[0].task_id, item[1])

    return sorted(work, key=beginning)


class Progress:
    """Counts that all replicas share, and where `is_shown` a bar that shows them."""

    NAMES = ("completions", "new_tokens", "prompt_tokens", "cached_tokens")
    _REFRESH_SECONDS = 0.5

    def __init__(self, queue: WorkQueue, total: int, already_done: int, *, is_shown: bool) -> None:
        self._queue = queue
        self._began = self._shown = time.monotonic()
        self._already_done = already_done
        self._bar = None
        if is_shown:
            # disable=None: a bar on a terminal only.
            self._bar = tqdm(total=total, initial=already_done, unit="case", desc="eval", disable=None, smoothing=0.05)

    def add(self, completion: Completion) -> None:
        """Count a finished completion."""
        timings = completion.timings
        amounts = (1, timings.num_new_tokens, timings.num_prompt_tokens, completion.num_cached_tokens)
        for name, amount in zip(self.NAMES, amounts, strict=True):
            self._queue.count(name, amount)
        self.show()

    def show(self) -> None:
        """Redraw the bar, if it is time."""
        now = time.monotonic()
        if self._bar is None or self._bar.disable or now - self._shown < self._REFRESH_SECONDS:
            return
        self._shown = now
        counts = self.counts()
        cached = counts["cached_tokens"] / max(1, counts["prompt_tokens"])
        rate = counts["new_tokens"] / (now - self._began)
        self._bar.n = self._already_done + counts["completions"]
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {cached:.0%} of prompts cached")

    def counts(self) -> dict[str, int]:
        """What all replicas of this attempt did so far."""
        return self._queue.counts(self.NAMES)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Replica:
    """The leader of one replica at work; the other ranks of its tensor-parallel group follow."""

    def __init__(
        self,
        llm: LLM,
        part: AttemptLog,
        queue: WorkQueue,
        progress: Progress,
        settings: Settings,
        names: dict[str, int],
    ) -> None:
        """`names`: what a timing line says about who computed it ("attempt", "replica")."""
        self._llm, self._part, self._queue, self._progress = llm, part, queue, progress
        self._settings, self._names = settings, names

    def give_up(self, work: Sequence[Work]) -> None:
        """Record keys that are not tried again."""
        for case, sample_idx in work:
            self._refuse(case, sample_idx, GIVEN_UP)

    def run_alone(self, work: Sequence[Work]) -> None:
        """Compute keys one at a time; then let the other replicas begin."""
        for item in work:
            self._complete(self._begun([item], alone=True))
        self._queue.announce(SUSPECTS_DONE)

    def run(self, work: Sequence[Work]) -> None:
        """Compute all of `work` that no other replica claims."""
        ordered = in_prefix_order(work, self._settings.options.order or self._default_order())
        self._complete(self._claimed(ordered))

    def _default_order(self) -> str:
        return next(iter(self._llm.fim.orders), "psm")

    def _claimed(self, work: Sequence[Work]) -> Iterator[Work]:
        self._queue.await_announced(SUSPECTS_DONE)
        while (start := _UNIT_KEYS * self._queue.claim()) < len(work):
            yield from self._begun(work[start : start + _UNIT_KEYS], alone=False)

    def _begun(self, work: Sequence[Work], *, alone: bool) -> Sequence[Work]:
        self._part.begin([(case.task_id, sample_idx) for case, sample_idx in work], alone=alone)
        return work

    def _complete(self, work: Iterable[Work]) -> None:
        in_hand: dict[int, Work] = {}

        def prompts() -> Iterator[tuple[FimPrompt, SamplingParams]]:
            for index, (case, sample_idx) in enumerate(work):
                in_hand[index] = (case, sample_idx)
                seed = seed_of(self._settings.seed, (case.task_id, sample_idx))
                prompt = replace(case.prompt, language=case.language)
                yield prompt, replace(self._settings.sampling, n=1, seed=seed)

        for completion in self._llm.complete_batch(prompts(), options=self._settings.options, ordered=False):
            self._record(*in_hand.pop(completion.prompt_index), completion)

    def _refuse(self, case: Case, sample_idx: int, why: str) -> None:
        self._record(case, sample_idx, Completion("", (), "error", Timings(0.0, 0.0, 0, 0), error=why))

    def _record(self, case: Case, sample_idx: int, completion: Completion) -> None:
        name = {"task_id": case.task_id, "sample_idx": sample_idx}
        prompt_ids = completion.prompt_token_ids
        self._part.done(
            {
                **name,
                "text": completion.text,
                **({} if completion.raw_text is None else {"raw_text": completion.raw_text}),
                **({} if completion.trimmed_by is None else {"trimmed_by": completion.trimmed_by}),
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": len(prompt_ids),
                "num_dropped_tokens": completion.num_dropped_tokens,
                "prompt_sha256": hashlib.sha256(np.asarray(prompt_ids, "<i4").tobytes()).hexdigest(),
                "error": completion.error,
            },
            {
                **name,
                "first_token_seconds": completion.timings.first_token_seconds,
                "total_seconds": completion.timings.total_seconds,
                "num_new_tokens": completion.timings.num_new_tokens,
                "num_cached_tokens": completion.num_cached_tokens,
                "num_prompt_tokens": len(prompt_ids),
                **self._names,
            },
        )
        self._progress.add(completion)
