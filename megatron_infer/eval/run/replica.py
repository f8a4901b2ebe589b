"""One replica's share of a run: claimed units become prompts, completions become lines of its part.

Owns the order of work, seeds and what a line says. Which keys are left, and who else works, it is told.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

from megatron_infer.commands.options import say
from megatron_infer.completion import Completion, Timings
from megatron_infer.eval.cases import Case
from megatron_infer.eval.run.records import GIVEN_UP, AttemptLog, Key
from megatron_infer.eval.run.work_queue import WorkQueue
from megatron_infer.llm import LLM, Handle, Prompt
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt

_UNIT_KEYS = 8
"""Keys claimed at a time: enough that neighbours share a cached prefix, few enough that no replica ends much later."""

_RAMP_STEPS = 64
"""Steps after which as many sequences are in hand as the engine takes."""
LINE_SECONDS = 30.0
_REFRESH_SECONDS = 0.5

SUSPECTS_DONE = "suspects done"
Work = tuple[Case, int]
"""A case and a sample index: a key with what is needed to compute it."""


@dataclass(frozen=True)
class Settings:
    """What decides the answers, beside model and engine. `sampling.n` samples of every case are made.

    is_likelihood: nothing is written; the log probabilities of the reference's tokens are the result.
    """

    options: FimOptions
    sampling: SamplingParams
    seed: int
    is_likelihood: bool = False


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
    """Counts that all replicas share; where `is_shown`, a line about them: rewritten on a terminal, else every 30 s."""

    NAMES = ("begun", "completions", "new_tokens", "prompt_tokens", "cached_tokens")

    def __init__(self, queue: WorkQueue, total: int, already_done: int, *, is_shown: bool) -> None:
        self._queue, self._total, self._already_done, self._is_shown = queue, total, already_done, is_shown
        self._on_terminal = is_shown and sys.stderr is not None and sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def begin(self) -> None:
        """Count a prompt that is handed to the engine."""
        self._queue.count("begun", 1)

    def add(self, completion: Completion) -> None:
        """Count a finished completion."""
        timings = completion.timings
        amounts = (1, timings.num_new_tokens, timings.num_prompt_tokens, completion.num_cached_tokens)
        for name, amount in zip(self.NAMES[1:], amounts, strict=True):
            self._queue.count(name, amount)

    def show(self) -> None:
        """Say where the run stands, if it is time."""
        now = time.monotonic()
        if self._is_shown and now - self._shown >= (_REFRESH_SECONDS if self._on_terminal else LINE_SECONDS):
            self._shown = now
            line = self.line(self.counts(), now - self._began)
            if self._on_terminal:
                print(f"\r{line:<110}", end="", file=sys.stderr, flush=True)
            else:
                say(line)

    def line(self, counts: Mapping[str, int], seconds: float) -> str:
        """Where the run stands, after so many seconds of this attempt."""
        done = counts["completions"]
        left = (
            timedelta(seconds=round((self._total - self._already_done - done) * seconds / done)) if done else "unknown"
        )
        cached = counts["cached_tokens"] / max(1, counts["prompt_tokens"])
        return (
            f"eval: {self._already_done + done} of {self._total} done, {counts['begun'] - done} in hand, "
            f"{counts['new_tokens'] / seconds:.0f} tokens/s, {cached:.0%} of prompts cached, time left {left}"
        )

    def counts(self) -> dict[str, int]:
        """What all replicas of this attempt did so far."""
        return self._queue.counts(self.NAMES)

    def close(self) -> None:
        """Leave the last line as it is."""
        if self._on_terminal:
            print(file=sys.stderr)


def reference_ids(llm: LLM, case: Case, options: FimOptions) -> tuple[list[int], int]:
    """A prompt with its reference behind it, as ids, and how many of them, at the end, are the reference.

    A case of no prompt is plain text: all of it counts but its first token, before which there is nothing.

    Raises ValueError: there is no reference, or no room for it in the context.
    """
    if case.reference is None:
        raise ValueError("the case has no reference, of which a likelihood could be told")
    own, context = llm.tokenizer.encode(case.reference, dummy_prefix=False), llm.max_model_len
    if not 0 < len(own) < context:
        raise ValueError(f"the reference has {len(own)} tokens, which must be at least 1 and less than {context}")
    if not (case.prompt.prefix or case.prompt.suffix or options.frame_empty_suffix):
        plain = llm.fim.encode(FimPrompt(case.reference), options=options)
        return plain.ids, len(plain.ids) - max(1, plain.prefix.start)
    ids = llm.fim.encode(case.prompt, budget_tokens=context - len(own), options=options).ids
    return ids + own, len(own)


class Replica:
    """The leader of one replica at work; the other ranks of its tensor-parallel group follow."""

    def __init__(
        self, llm: LLM, part: AttemptLog, queue: WorkQueue, progress: Progress, settings: Settings,
        names: dict[str, int],
    ) -> None:  # fmt: skip
        """`names`: what a timing line says about who computed it ("attempt", "replica")."""
        self._llm, self._part, self._queue, self._progress = llm, part, queue, progress
        self._settings, self._names = settings, names
        self._num_steps = 0

    def give_up(self, work: Sequence[Work]) -> None:
        """Record keys that are not tried again."""
        for case, sample_idx in work:
            self._progress.begin()
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
        """Compute work, drawn as room appears; what ends is recorded at once."""
        source = iter(work)
        in_hand: list[tuple[Work, Handle, int]] = []
        is_exhausted = False
        while in_hand or not is_exhausted:
            while not is_exhausted and len(in_hand) < self._room():
                if (item := next(source, None)) is None:
                    is_exhausted = True
                elif (submitted := self._submit(*item)) is not None:
                    in_hand.append((item, *submitted))
            if in_hand:
                self._llm.session.step()
                self._num_steps += 1
            for item, handle, num_scored in [entry for entry in in_hand if entry[1].is_finished]:
                (completion,) = handle.results()
                self._record(*item, completion, num_scored)
            in_hand = [entry for entry in in_hand if not entry[1].is_finished]
            self._progress.show()

    def _room(self) -> int:
        """How many sequences may be in hand: few at first, so that they do not all end, and are saved, together."""
        most = self._llm.session.max_num_seqs
        return min(most, _UNIT_KEYS + most * self._num_steps // _RAMP_STEPS)

    def _submit(self, case: Case, sample_idx: int) -> tuple[Handle, int] | None:
        """Hand a key to the engine; what it refuses is recorded as an error. Also: how many ids are to be scored."""
        settings, num_scored = self._settings, 0
        prompt: Prompt = replace(case.prompt, language=case.language)
        sampling = replace(settings.sampling, n=1, seed=seed_of(settings.seed, (case.task_id, sample_idx)))
        self._progress.begin()
        try:
            if settings.is_likelihood:
                prompt, num_scored = reference_ids(self._llm, case, settings.options)
            return self._llm.session.submit(prompt, sampling, settings.options), num_scored
        except ValueError as error:
            self._refuse(case, sample_idx, str(error))
            return None

    def _scored(self, case: Case, completion: Completion, num_scored: int) -> dict[str, Any]:
        """What a line of a likelihood run has instead of an answer."""
        if not self._settings.is_likelihood or completion.prompt_logprobs is None:
            return {}
        scored = [pair for pair in completion.prompt_logprobs[-num_scored:] if pair is not None]
        ids, log_probabilities = [pair.token_id for pair in scored], [pair.logprob for pair in scored]
        scored_as = {"text": case.reference, "token_ids": ids, "finish_reason": "scored"}
        return {**scored_as, "log_probabilities": log_probabilities}

    def _refuse(self, case: Case, sample_idx: int, why: str) -> None:
        self._record(case, sample_idx, Completion("", (), "error", Timings(0.0, 0.0, 0, 0), error=why))

    def _record(self, case: Case, sample_idx: int, completion: Completion, num_scored: int = 0) -> None:
        name, timings = {"task_id": case.task_id, "sample_idx": sample_idx}, completion.timings
        ids = completion.prompt_token_ids
        by_an_ending = {"raw_text": completion.raw_text, "trimmed_by": completion.trimmed_by}
        line = {
            **name, "text": completion.text, **(by_an_ending if completion.raw_text is not None else {}),
            "token_ids": completion.token_ids, "finish_reason": completion.finish_reason,
            "num_prompt_tokens": len(ids), "num_dropped_tokens": completion.num_dropped_tokens,
            "prompt_sha256": hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest(), "error": completion.error,
            **self._scored(case, completion, num_scored),
        }  # fmt: skip
        timing = {
            **name, "first_token_seconds": timings.first_token_seconds, "total_seconds": timings.total_seconds,
            "num_new_tokens": timings.num_new_tokens, "num_cached_tokens": completion.num_cached_tokens,
            "num_prompt_tokens": len(ids), **self._names,
        }  # fmt: skip
        self._part.done(line, timing)
        self._progress.add(completion)
