"""What world rank 0 decides before an attempt: whether it may begin, what is left, and what the run's identity is.

Reads headers, hashes and the run's own directory, never a weight. Knows nothing of processes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import megatron_infer
from megatron_infer.commands.options import say
from megatron_infer.config import EngineConfig
from megatron_infer.eval.cases import Case, Task, read_cases
from megatron_infer.eval.run.records import RunDirectory
from megatron_infer.eval.run.replica import Settings, Work
from megatron_infer.eval.tasks.retrieval import read_source_tree, with_context
from megatron_infer.files import sha256_of
from megatron_infer.llm import listed_hashes, preview
from megatron_infer.world import World

_MODEL_SUFFIXES = (".json", ".model", ".safetensors", ".bin", ".gguf", ".pt", ".txt")
_DECISIVE = ("device", "dtype", "quantization", "kv_cache_dtype", "max_model_len", "deterministic")
"""Fields of EngineConfig that may change an answer; the others change speed and memory alone."""


@dataclass(frozen=True)
class Job:
    """What was asked for.

    world: the processes that share the work.
    fields: names of the data's fields that were given; `task` reads them already.
    sample, is_shuffled, limit: so many cases drawn at random, in a random order, the first so many of these; None: all.
    source_tree: where to retrieve pieces of other files from, which then stand before the prefix.
    """

    world: World
    task: Task
    fields: Mapping[str, str]
    data: Path
    source_tree: Path | None
    out: RunDirectory
    sample: int | None
    is_shuffled: bool
    limit: int | None
    model_dir: Path
    model_name: str
    fim: str | None
    config: EngineConfig
    settings: Settings

    def cases(self) -> list[Case]:
        """The cases to complete. Raises ValueError as read_cases, read_source_tree and with_context do."""
        found = read_cases(self.data, self.task)
        indices, seed = list(range(len(found))), self.settings.seed
        if self.sample is not None:
            indices = sorted(random.Random(seed).sample(indices, min(self.sample, len(found))))
        if self.is_shuffled:
            random.Random(seed).shuffle(indices)
        cases = [found[i] for i in indices[: self.limit]]
        if self.source_tree is None:
            return cases
        trees = {language: read_source_tree(self.source_tree, language) for language in {c.language for c in cases}}
        return [with_context(case, trees[case.language]) for case in cases]

    def work(self, cases: Sequence[Case]) -> list[Work]:
        """Every key with its case, in the dataset's order."""
        return [(case, sample_idx) for case in cases for sample_idx in range(self.settings.sampling.n)]


def plan_attempt(job: Job, command: Sequence[str]) -> dict[str, Any]:
    """Check everything that can be checked without the weights, and find what is left to do. Raises ValueError."""
    cases = job.cases()
    known_model = preview(job.model_dir, job.config, model_name=job.model_name, fim=job.fim, world=job.world)
    config, fim = known_model.config, known_model.fim
    order = job.settings.options.order
    if order is not None and order not in fim.orders:
        raise ValueError(
            f"task {job.task.name!r} asks for the order {order!r}, which the FIM family {fim.name!r} does not have; "
            f"give --order ({', '.join(fim.orders) or 'it has none'})"
        )
    assert config.max_model_len is not None
    if job.settings.sampling.max_new_tokens >= config.max_model_len:
        raise ValueError(
            f"max_new_tokens {job.settings.sampling.max_new_tokens} leaves no room for a prompt in a context of "
            f"{config.max_model_len} tokens; lower it"
        )
    known = job.out.manifest()
    files = model_files(job.model_dir, known["model_files"] if known else {}, listed_hashes(job.model_dir))
    fingerprint = _fingerprint(job, config, files, cases)
    if known is not None:
        job.out.check(known, fingerprint)
    if (success := job.out.success) is not None:
        say(f"{job.out.path} is finished: {success['num_completions']} completions; nothing to do")
        job.out.drop_parts()
        return {"success": success}
    manifest = known or {
        "fingerprint": fingerprint, "data": str(job.data), "model_dir": str(job.model_dir.resolve()),
        "model_files": files, "versions": _versions(), "command": list(command), "created": _now(),
    }  # fmt: skip
    attempt = job.out.begin(manifest, {"started": _now(), "world_size": job.world.size, "engine": asdict(config)})
    return {"success": None, "attempt": attempt, "prompts_sha256": fingerprint["prompts_sha256"], **_left(job, cases)}


def _left(job: Job, cases: Sequence[Case]) -> dict[str, Any]:
    """Which keys earlier attempts finished, and which they died of, as indices into the job's work."""
    state = job.out.state()
    work = job.work(cases)
    places = {(case.task_id, sample_idx): i for i, (case, sample_idx) in enumerate(work)}
    done = np.zeros(len(work), bool)
    done[[places[key] for key in state.done]] = True
    suspects = state.suspects()
    if state.done:
        say(f"going on: {len(state.done)} of {len(work)} completions are there already")
    if suspects:
        say(f"{len(suspects)} prompts were in hand when processes died: they come first, one at a time")
    return {
        "done": np.packbits(done).tobytes().hex(),
        "suspects": [places[key] for key in suspects],
        "poison": [places[key] for key in state.poison()],
    }


def _fingerprint(job: Job, config: EngineConfig, files: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """What decides the answers. World size, tensor-parallel size, threads and batch sizes do not."""
    settings = job.settings
    model = hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode())
    fingerprint = {
        "task": job.task.name, "fields": job.fields, "data_sha256": sha256_of(job.data),
        "prompts_sha256": prompts_sha256(cases), "num_cases": len(cases), "num_samples": settings.sampling.n,
        "model_sha256": model.hexdigest(), "fim": job.fim, "prompt": asdict(settings.options),
        "sampling": {name: value for name, value in asdict(settings.sampling).items() if name not in ("n", "seed")},
        "seed": settings.seed, "config": {name: getattr(config, name) for name in _DECISIVE},
        "engine_version": megatron_infer.__version__, **({"metric": "likelihood"} if settings.is_likelihood else {}),
    }  # fmt: skip
    return cast("dict[str, Any]", json.loads(json.dumps(fingerprint)))


def prompts_sha256(cases: Iterable[Case]) -> str:
    """One hash for everything that the model is to see, retrieved context included."""
    digest = hashlib.sha256()
    for case in cases:
        p = case.prompt
        seen = (p.prefix, p.suffix, p.path, p.extra_files, p.repository)
        digest.update(json.dumps([case.task_id, seen]).encode() + b"\n")
    return digest.hexdigest()


def model_files(model_dir: Path, known: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """Name -> size, modification time and SHA-256 of every file that may decide what a checkpoint computes.

    Hashing reads the whole checkpoint, except for what `known`, an earlier result, has with the same size and time.
    ValueError where `own`, its own manifest, says otherwise: a byte has changed since it was written.
    """
    found = {}
    for path in sorted(model_dir.iterdir()) if model_dir.is_dir() else [model_dir]:
        if path.suffix not in _MODEL_SUFFIXES or not path.is_file():
            continue
        stat = path.stat()
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = known.get(path.name, {})
        if {name: before.get(name) for name in entry} == entry:
            sha256 = before["sha256"]
        else:
            sha256 = sha256_of(path)
            if sha256 != own.get(path.name, sha256):
                raise ValueError(f"{path} does not match the SHA-256 in the checkpoint's manifest; copy it again")
        found[path.name] = {**entry, "sha256": sha256}
    return found


def _versions() -> dict[str, str]:
    return {
        "megatron_infer": megatron_infer.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
