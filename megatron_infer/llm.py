"""LLM: FIM prompts in, completions out, over one engine.

Brings all ranks up: those torchrun started, or followers of its own. Under torchrun every public call is collective:
rank 0's arguments count and every rank gets the same results. What a call does is session.py's business.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_infer import calls
from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.calls import Entry
from megatron_infer.collective import Follower, Leader
from megatron_infer.completion import Completion, CompletionStream, Items, Timings, TokenLogprob
from megatron_infer.config import EngineConfig
from megatron_infer.engine.bring_up import bring_up
from megatron_infer.engine.drafter import LookupDrafter
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.follower import Followers
from megatron_infer.engine.memory import check_memory
from megatron_infer.engine.resolve import resolve
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.engine.worker import EngineDeadError
from megatron_infer.hub import local_path
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model.manifest import Manifest
from megatron_infer.model_config import DEFAULT_MODEL_NAME
from megatron_infer.profile import Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.session import Handle, Prompt, Session
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.text.fim import FimFormat, FimOptions, load_fim
from megatron_infer.text.tokenizer import Tokenizer, load_tokenizer
from megatron_infer.world import World, end_with_launcher

__all__ = ["LLM", "Completion", "CompletionStream", "EngineDeadError", "Handle", "Prompt", "Timings", "TokenLogprob"]

log = logging.getLogger("megatron_infer")


@dataclass(frozen=True)
class Preview:
    """What an LLM will have, as far as no weight need be read: `config` is resolved."""

    tokenizer: Tokenizer
    fim: FimFormat
    config: EngineConfig


def preview(model_dir: Path, config: EngineConfig, *, model_name: str, fim: str | None, world: World) -> Preview:
    """What `LLM` with these arguments will have. Raises ValueError as it does, but for memory."""
    with open_checkpoint(model_dir, model_name) as checkpoint:
        return _preview(checkpoint, config, fim, world)


def listed_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of the files that the checkpoint's own manifest lists; none without a manifest."""
    manifest = Manifest.load(model_dir)
    return {name: entry.sha256 for name, entry in manifest.files.items()} if manifest else {}


def _preview(checkpoint: Checkpoint, config: EngineConfig, fim: str | None, world: World) -> Preview:
    model = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.model_dir, model.vocab_size)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {checkpoint.model_dir} has {tokenizer.vocab_size} pieces, the model only "
            f"{model.vocab_size}; they do not belong together"
        )
    return Preview(tokenizer, load_fim(fim or model.fim, tokenizer), resolve(config, model, world))


def _release(group: TPGroup, followers: Followers | None) -> None:
    """What a runner that nobody closed holds outside of Python."""
    if followers is not None:
        followers.close(patience_seconds=0)
    group.close()


class LLM:
    """A loaded model that completes FIM prompts.

    Outside torchrun, and on rank 0 where the others follow(), any number of threads may call it at the same time:
    whoever waits advances all requests.

    Args:
        model_dir: a checkpoint of any supported kind (README, "Checkpoints"), or its name on the hub (hub.py).
        config: the engine's knobs; keyword arguments override single fields of it.
        model_name: file stem of `.pt` checkpoints.
        fim: FIM family (see fim_templates.json); by default config.json's "fim" or what the tokenizer's pieces tell.
        profile: where rank 0 times its ops and collectives into; None times nothing and costs nothing.
        world: where this process stands; None reads the launcher's environment.
    Raises:
        ValueError: anything wrong with the directory, the configuration or the memory, before weights are read.
        EngineDeadError: another rank failed while starting.
    """

    def __init__(
        self, model_dir: str | Path, config: EngineConfig | None = None, *, model_name: str = DEFAULT_MODEL_NAME,
        fim: str | None = None, profile: Profile | None = None, world: World | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if not str(model_dir):
            raise ValueError("model_dir is empty; give a checkpoint directory")
        self.model_dir = local_path(model_dir)
        asked = replace(config or EngineConfig(), **options)
        world = World.from_env() if world is None else world
        end_with_launcher(world)
        verify = asked.verify_on_load and world.is_first
        with open_checkpoint(self.model_dir, model_name, verify=verify) as checkpoint:
            for note in checkpoint.notes:
                log.info("checkpoint: %s", note)
            known = _preview(checkpoint, asked, fim, world)
            self.model_config, self.tokenizer = checkpoint.config, known.tokenizer
            self.fim, self.config = known.fim, known.config
            self._runner = self._bring_up(checkpoint, model_name, world, profile)
        kv_tokens = self._runner.kv.num_blocks * self._runner.kv.block_size
        self.kv_cache_tokens = kv_tokens
        """Tokens that the KV cache holds, of all sequences together."""
        self.max_model_len = min(self.config.max_model_len or kv_tokens, kv_tokens)
        """The longest prompt and completion together, in tokens."""
        self._member: Leader | Follower
        if self.is_leader:
            self._member = self._make_leader(profile, shares_results=world.is_launched and self._runner.tp.size > 1)
            self._log_config(asked)
        else:
            self._member = Follower(self._runner)

    def _bring_up(self, checkpoint: Checkpoint, model_name: str, world: World, profile: Profile | None) -> ModelRunner:
        """Meet the other ranks, those that torchrun started or our own followers, and load this rank's share."""
        config, size = self.config, self.config.tensor_parallel_size or 1
        if not world.is_launched:
            world = World(0, size, 0, size)
        check_memory(config, checkpoint.config, world)
        gaps = self.tokenizer.gaps(checkpoint.config.vocab_size)
        self._followers: Followers | None = None
        if not world.is_launched and size > 1:
            self._followers = Followers(checkpoint.model_dir, model_name, config, gaps)
        in_world = partial(
            TPGroup.in_world, world, size=size, name="llm", deterministic=config.deterministic,
            timeout_seconds=config.start_timeout_seconds,
        )  # fmt: skip
        join = in_world if self._followers is None else self._followers.join
        try:
            runner = bring_up(checkpoint, config, world, join, profile, gaps=gaps)
            # As long as the runner: a stream, or the session alone, needs the ranks as much as this object.
            weakref.finalize(runner, _release, runner.tp, self._followers)
            return runner
        except BaseException as error:
            if self._followers is not None:
                self._followers.close()
            if isinstance(error, RankFailure):
                raise EngineDeadError(f"the engine did not start: {error}") from error
            raise

    def _make_leader(self, profile: Profile | None, *, shares_results: bool) -> Leader:
        kv, config = self._runner.kv, self.config
        if self.max_model_len != config.max_model_len:
            log.warning(
                "contexts are limited to %d tokens by the memory for the KV cache (asked for: %d)",
                self.max_model_len, config.max_model_len,
            )  # fmt: skip
        scheduler = Scheduler(
            BlockPool(kv.num_blocks, kv.block_size, config.enable_prefix_caching), max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens, max_model_len=self.max_model_len,
            drafter=LookupDrafter(config.num_draft_tokens) if config.num_draft_tokens else None,
        )  # fmt: skip
        session = Session(
            Engine(self._runner, scheduler, profile), self.tokenizer, self.fim, self.model_config,
            max_model_len=self.max_model_len, max_num_seqs=config.max_num_seqs, profile=profile,
        )  # fmt: skip
        return Leader(session, self._runner.tp, shares_results=shares_results)

    def _log_config(self, asked: EngineConfig) -> None:
        for name, value in asdict(self.config).items():
            given = getattr(asked, name)
            is_default = given == getattr(EngineConfig(), name)
            source = ("default" if is_default else "given") if given == value else f"resolved from {given or 'nothing'}"
            log.info("config: %s = %s (%s)", name, value, source)
        model, fim = self.model_config.eos_token_ids, sorted(self.fim.stop_token_ids)
        log.info("end tokens: %s of the checkpoint's settings, %s of its tokenizer and FIM family", list(model), fim)
        group = self._runner.tp
        log.info("tensor parallel: %d rank(s) over %s (%s)", group.size, group.backend, group.why)

    @property
    def is_leader(self) -> bool:
        """True on the rank whose arguments count, and in every process outside torchrun."""
        return self._runner.tp.rank == 0

    @property
    def session(self) -> Session:
        """Rank 0's submit(), step() and cancel(), for a program with a loop of its own; its other ranks follow()."""
        if not isinstance(self._member, Leader):
            raise ValueError("rank 0 alone has a session; the other ranks call follow()")
        return self._member.session

    # ---- public calls -------------------------------------------------------------------------------------------

    def complete(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: FimOptions | None = None
    ) -> Completion:
        """Complete one prompt, laid out as `options` say; None: as its family is.

        Raises:
            ValueError: bad prompt or parameters; nothing ran, and the next call works.
            EngineDeadError: a rank failed.
        """
        return self.complete_from(lambda: (prompt, SamplingParams() if sampling is None else sampling), options)

    def complete_from(
        self, make: Callable[[], tuple[Prompt, SamplingParams]], options: FimOptions | None = None
    ) -> Completion:
        """As `complete`, with prompt and parameters made on rank 0 alone: what `make` raises, every rank raises."""
        (completion,) = self._completions(lambda session: calls.complete(session, make, options, single=True))
        return completion

    def complete_n(
        self, prompt: Prompt, sampling: SamplingParams, options: FimOptions | None = None
    ) -> list[Completion]:
        """`sampling.n` completions of one prompt, whose prefix is computed once. Raises as `complete` does."""
        return list(
            self._completions(
                lambda session: calls.complete(session, lambda: (prompt, sampling), options, single=False)
            )
        )

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: FimOptions | None = None
    ) -> CompletionStream:
        """Text pieces as they are generated; their concatenation is `complete(...).text`, to the character."""
        sampling = SamplingParams() if sampling is None else sampling
        return CompletionStream(self._member.run(lambda session: calls.stream(session, prompt, sampling, options)))

    def complete_batch(
        self, prompts: Iterable[Entry], sampling: SamplingParams | None = None, options: FimOptions | None = None, *,
        ordered: bool = True,
    ) -> Iterator[Completion]:  # fmt: skip
        """Complete many prompts; yields `n` completions for each, in order or (ordered=False) as they finish.

        Prompts are drawn from the iterable as room appears, so it may be endless. A prompt that is refused gives a
        Completion with finish_reason "error"; the others go on.
        """
        sampling = SamplingParams() if sampling is None else sampling
        yield from self._completions(lambda session: calls.batch(session, prompts, sampling, options, ordered))

    def follow(self) -> None:
        """On ranks > 0 under torchrun: serve every call that rank 0 makes. Both close together.

        Raises:
            ValueError: this is rank 0. EngineDeadError: a rank failed.
        """
        if not isinstance(self._member, Follower):
            raise ValueError("rank 0 leads; follow() is for the other ranks")
        self._member.serve()

    def _completions(self, call: Callable[[Session], Items]) -> Iterator[Completion]:
        for item in self._member.run(call):
            assert isinstance(item, Completion)
            yield item

    def close(self) -> None:
        """Stop the followers and free the group. Idempotent; every later call raises EngineDeadError."""
        self._member.close()
        if self._followers is not None:
            self._followers.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
