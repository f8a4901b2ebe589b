"""The command `eval run`: complete every case of a benchmark, on any number of ranks, however often it is interrupted.

World rank 0 checks everything, plans the attempt and merges in the end; the leader of each replica computes. The
directory is records.py's, the sharing work_queue.py's, the work replica.py's.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from torch.distributed import DistError

from megatron_infer.commands.options import (
    Parser,
    add_model_options,
    add_option,
    add_options_of,
    build,
    log_to_stderr,
    model_dir_of,
    run_command,
    say,
)
from megatron_infer.config import EngineConfig
from megatron_infer.eval.cases import Case
from megatron_infer.eval.run.plan import Job, plan_attempt, prompts_sha256
from megatron_infer.eval.run.records import AttemptLog, Key, RunDirectory, run_on_warning
from megatron_infer.eval.run.replica import Progress, Replica, Settings
from megatron_infer.eval.run.work_queue import WorkQueue
from megatron_infer.eval.tasks import registry as tasks
from megatron_infer.llm import LLM, EngineDeadError
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions
from megatron_infer.world import World

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer eval run`. Returns the exit status."""
    command = sys.argv if argv is None else ["eval", "run", *argv]
    return run_command(lambda world: _run(_job(_parser(world).parse_args(argv), world), command))


def _job(args: argparse.Namespace, world: World) -> Job:
    if not args.out:
        raise ValueError("--out is empty; name a directory for the results")
    for name in ("limit", "sample"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if args.source_tree and args.task != "fim":
        raise ValueError(f"--source_tree goes with --task fim; {args.task!r} brings its own context, or has none")
    fields = {name: value for name in tasks.FIELDS if (value := getattr(args, name)) is not None}
    if fields and args.task != "fim":
        raise ValueError(f"--{next(iter(fields))} goes with --task fim; the fields of {args.task!r} are its own")
    task = tasks.generic_task(**fields) if fields else tasks.task(args.task)
    sampling = build(SamplingParams, args, task.sampling)
    is_likelihood = args.metric == "likelihood"
    if is_likelihood and sampling.n > 1:
        raise ValueError("--metric likelihood has one value per case; leave out --n")
    if is_likelihood:
        sampling = SamplingParams(max_new_tokens=0, prompt_logprobs=0, seed=sampling.seed)
    if task.name == "text" and not is_likelihood:
        raise ValueError("--task text has nothing to complete; give --metric likelihood")
    return Job(
        world=world, task=task, fields=fields, data=Path(args.data).resolve(),
        source_tree=Path(args.source_tree) if args.source_tree else None, out=RunDirectory(args.out),
        sample=args.sample, is_shuffled=args.shuffle, limit=args.limit, model_dir=model_dir_of(args),
        model_name=args.model_name, fim=args.fim, config=build(EngineConfig, args),
        settings=Settings(
            options=build(FimOptions, args, task.options),
            sampling=replace(sampling, seed=None),
            seed=sampling.seed or 0,
            is_likelihood=is_likelihood,
        ),
    )  # fmt: skip


def _run(job: Job, command: Sequence[str]) -> int:
    log_to_stderr(job.world, logging.WARNING)
    with ExitStack() as stack:
        stack.enter_context(_troubles_explained(job.out))
        queue = WorkQueue(job.world)
        if job.world.is_first:
            stack.enter_context(job.out.locked())
        plan = queue.tell(lambda: plan_attempt(job, command))
        if plan["success"] is None:
            _attempt(job, queue, plan)
        elif job.world.is_first:
            _show(job, plan["success"])
    return 0


# ---- every rank -----------------------------------------------------------------------------------------------------


def _attempt(job: Job, queue: WorkQueue, plan: Mapping[str, Any]) -> None:
    with LLM(job.model_dir, job.config, model_name=job.model_name, fim=job.fim, world=job.world) as llm:
        began = time.monotonic()
        size = llm.config.tensor_parallel_size or 1
        replica, num_replicas = job.world.rank // size, max(1, job.world.size // size)
        if llm.max_model_len != llm.config.max_model_len:
            # Of a ValueError rank 0 alone speaks, and its own cache may be large enough.
            refusal: type[Exception] = EngineDeadError if llm.is_leader and replica else ValueError
            raise refusal(
                f"the KV cache holds {llm.max_model_len} tokens, less than the context of {llm.config.max_model_len}: "
                "answers would depend on free memory. Lower --max_model_len or raise --kv_cache_memory_bytes"
            )
        if not llm.is_leader:
            llm.follow()
            return
        cases, progress = _lead(job, queue, plan, llm, replica)
    queue.announce(f"replica {replica} finished")
    if job.world.is_first:
        for other in range(num_replicas):
            queue.await_announced(f"replica {other} finished", progress.show)
        progress.close()
        _finish(job, cases, progress.counts(), time.monotonic() - began)


def _lead(job: Job, queue: WorkQueue, plan: Mapping[str, Any], llm: LLM, replica: int) -> tuple[list[Case], Progress]:
    """Do this replica's share."""
    try:
        cases = job.cases()
        if prompts_sha256(cases) != plan["prompts_sha256"]:
            raise ValueError(f"{job.data} is another file here")
    except ValueError as error:
        # Of a ValueError rank 0 alone would speak.
        raise EngineDeadError(
            f"rank {job.world.rank} reads other cases than the run began with ({error}); all hosts must see one file"
        ) from None
    work = job.work(cases)
    done = np.unpackbits(np.frombuffer(bytes.fromhex(plan["done"]), np.uint8), count=len(work)).astype(bool)
    part = job.out.open_part(plan["attempt"], replica)
    progress = Progress(queue, len(work), int(done.sum()), is_shown=job.world.is_first)
    leader = Replica(llm, part, queue, progress, job.settings, {"attempt": plan["attempt"], "replica": replica})
    with _ended_in_good_order(part):
        if replica == 0:
            leader.give_up([work[i] for i in plan["poison"]])
            leader.run_alone([work[i] for i in plan["suspects"]])
        done[[*plan["poison"], *plan["suspects"]]] = True
        leader.run([work[i] for i in np.flatnonzero(~done)])
    return cases, progress


def _finish(job: Job, cases: Sequence[Case], counts: Mapping[str, int], seconds: float) -> None:
    """Merge, and say how it went."""
    by_id = {case.task_id: case for case in cases}

    def predict(key: Key, row: dict[str, Any]) -> dict[str, Any]:
        case = by_id[key[0]]
        if job.settings.is_likelihood:
            return {"task_id": case.task_id, "log_probability": sum(row.get("log_probabilities", ()))}
        return job.task.predict(case, job.task.finish(case, row["text"]))

    keys = [(case.task_id, sample_idx) for case, sample_idx in job.work(cases)]
    success = job.out.finish(keys, predict, seconds)
    cached = counts["cached_tokens"] / max(1, counts["prompt_tokens"])
    say(
        f"{counts['completions']} completions in {seconds:.1f} s: {counts['completions'] / seconds:.2f} cases/s, "
        f"{counts['new_tokens'] / seconds:.0f} tokens/s, {cached:.0%} of prompt tokens from the prefix cache; "
        f"{success['num_errors']} errors, {success['num_quarantined']} of them given up; ended by "
        + ", ".join(f"{reason}: {count}" for reason, count in success["num_by_finish_reason"].items())
    )
    if warning := run_on_warning(success["num_by_finish_reason"]):
        say(warning)
    _show(job, success)


def _show(job: Job, success: Mapping[str, Any]) -> None:
    print(json.dumps({"out": str(job.out.path), **success}), flush=True)


# ---- how it may end -------------------------------------------------------------------------------------------------


@contextmanager
def _ended_in_good_order(part: AttemptLog) -> Iterator[None]:
    """Close the part; where the prompts in hand are not to blame for the end, it says so."""
    try:
        yield
    except (KeyboardInterrupt, DistError, OSError) as error:
        with suppress(OSError):
            part.end(type(error).__name__)
        raise
    finally:
        with suppress(OSError):
            part.close()


@contextmanager
def _troubles_explained(out: RunDirectory) -> Iterator[None]:
    """SIGTERM, with which launchers end a job, acts as Ctrl-C does; what the user can mend is said in one line."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    # Shells have their background jobs ignore Ctrl-C, and with it SIGTERM would be ignored.
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, interrupt))
    ]
    remedy = f"what is done is in {out.path}; the same command goes on from there"
    try:
        yield
    except DistError as error:
        raise EngineDeadError(f"the launcher or another host is gone ({error}); {remedy}") from error
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        # Of a ValueError rank 0 alone would speak.
        raise EngineDeadError(
            f"the disk of {out.path} is full ({error.strerror}); free some space: {remedy}"
        ) from error
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# ---- options --------------------------------------------------------------------------------------------------------


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer eval run",
        "Complete every case of a benchmark. Also under torchrun: torchrun --nproc_per_node N -m megatron_infer eval "
        "run; N divided by --tensor_parallel_size replicas share the work. Interrupted, the same command goes on, with "
        "any number of ranks. Every option may be spelled with - or _.",
    )
    what = parser.add_argument_group("what to run")
    add_option(what, "task", required=True, help=f"one of {', '.join(tasks.TASKS)}; eval tasks tells of each")
    add_option(what, "data", required=True, help="the benchmark's .jsonl, .jsonl.gz or .parquet file")
    add_option(what, "out", required=True, help="directory for the results; on a disk that all hosts share")
    add_option(
        what,
        "source_tree",
        help="with --task fim: tree of the cases' files; the three most relevant pieces of other files (BM25) "
        "stand before each prefix, as in CrossCodeEval",
    )
    add_option(
        what, "metric", choices=("completions", "likelihood"), default="completions",
        help="what is computed: answers, or the log probability of each reference, one prefill a case (default: "
        "completions)",
    )  # fmt: skip
    add_option(what, "sample", type=int, help="only so many cases, drawn at random by --seed")
    add_option(what, "shuffle", action="store_true", help="the cases in a random order, by --seed")
    add_option(what, "limit", type=int, help="only the first so many cases, of what is left")
    names = parser.add_argument_group("names of the data's fields, for --task fim")
    for name, text in tasks.FIELDS.items():
        add_option(names, name, help=text)
    model = add_model_options(parser)
    add_option(model, "fim", help="FIM prompt family (default: from config.json or the tokenizer)")
    add_options_of(FimOptions, parser, "prompt layout (defaults: the task's)")
    add_options_of(SamplingParams, parser, "sampling (defaults: the task's; seed 0)")
    add_options_of(EngineConfig, parser, "engine")
    return parser
