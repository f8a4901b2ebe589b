"""What the engine set out to reach on one GPU, and how far a run of the suite got. Knows figures only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.weights import kv_bytes_per_token
from benchmarks.gpu.workload import COMPLETION_TOKENS, Workload

_CACHE_TOKENS = 4096
"""KV cache that counts as memory beside the weights."""

Sections = Mapping[str, Any]
PEERS_COMPILED = ("transformers compiled", "gpt-fast")


@dataclass(frozen=True)
class Target:
    """A figure and its goal. value is None where the run did not measure it; at_most: the goal is an upper bound."""

    text: str
    goal: float
    value: float | None
    unit: str
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """reached, missed or not measured."""
        if self.value is None:
            return "not measured"
        return "reached" if (self.value <= self.goal if self.at_most else self.value >= self.goal) else "missed"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values."""
        return {"target": self.text, "goal": self.goal, "value": self.value, "unit": self.unit, "verdict": self.verdict}


def targets(sections: Sections, work: Workload) -> list[Target]:
    """Every target, from the sections of a run as far as there are any."""
    return [*_speed(sections, work), *_throughput(sections, work), *_latency(sections, work), *_memory(sections, work)]


def _measured(figure: Callable[..., float], *arguments: Any) -> float | None:
    """The figure, or None where a part of it is missing from the run."""
    try:
        return figure(*arguments)
    except (KeyError, StopIteration, ValueError):
        return None


def row(sections: Sections, section: str, table: str, key: str, value: int) -> Mapping[str, Any]:
    """The row of a section's table in which `key` has `value`; KeyError or StopIteration if there is none."""
    found: Mapping[str, Any] = next(row for row in sections[section][table] if row[key] == value)
    return found


def milliseconds(sections: Sections, section: str, context: int) -> float:
    """Per token of one sequence."""
    return float(row(sections, section, "decode", "context", context)["ms_per_step"])


def _speed(sections: Sections, work: Workload) -> list[Target]:
    def share(context: int) -> float:
        decoded = row(sections, "bf16", "decode", "context", context)
        return 100 * float(decoded["gb_per_second"]) / float(sections["ceilings"]["read_gb_per_second"])

    def faster(than: str, section: str = "bf16") -> float:
        return milliseconds(sections, than, context) / milliseconds(sections, section, context)

    context = work.peer_contexts[0]
    compiled = [name for name in PEERS_COMPILED if name in sections]

    def faster_than_all() -> float:
        return min(faster(name) for name in compiled)

    where = f"batch 1, context {context}"
    return [
        *(
            Target(
                f"bf16 decode of the measured read bandwidth, batch 1, context {length}",
                85,
                _measured(share, length),
                "%",
            )
            for length in work.contexts
        ),
        Target(f"bf16 decode against transformers eager, {where}", 2, _measured(faster, "transformers eager"), "x"),
        Target(
            f"bf16 decode against the best compiled peer ({', '.join(compiled) or 'none'}), {where}",
            1.15,
            _measured(faster_than_all),
            "x",
        ),
        Target(f"int8 decode against bf16, {where}", 1.6, _measured(faster, "bf16", "int8"), "x"),
        Target(f"int4 decode against bf16, {where}", 2.3, _measured(faster, "bf16", "int4"), "x"),
    ]


def _throughput(sections: Sections, work: Workload) -> list[Target]:
    length, batch = max(work.prefills), max(work.batches)

    def share() -> float:
        reached = row(sections, "bf16", "prefill", "tokens", length)["tflop_per_second"]
        return 100 * float(reached) / float(sections["ceilings"]["matmul_tflop_per_second"])

    def decoded() -> float:
        return float(row(sections, "bf16 batches", "batches", "batch", batch)["tokens_per_second"])

    return [
        Target(f"bf16 prefill of {length} tokens, of the measured bf16 matmul rate", 70, _measured(share), "%"),
        Target(f"bf16 decode, batch {batch}, context {work.batch_context}", 8000, _measured(decoded), "tokens/s"),
    ]


def _latency(sections: Sections, work: Workload) -> list[Target]:
    def key(name: str) -> float:
        return float(sections["bf16"]["keystroke"][name])

    where = f"after a keystroke in {work.keystroke_context} warm tokens, bf16, p50"
    return [
        Target(f"first token {where}", 10, _measured(key, "time_to_first_token_ms"), "ms", at_most=True),
        Target(f"{COMPLETION_TOKENS} tokens {where}", 200, _measured(key, "completion_ms"), "ms", at_most=True),
    ]


def _memory(sections: Sections, work: Workload) -> list[Target]:
    cache = _CACHE_TOKENS * kv_bytes_per_token(work.model)

    def mebibytes(name: str) -> float:
        memory = sections[name]["memory"]
        if memory is None:
            raise KeyError("memory")
        return float(memory["without_cache_bytes"] + cache) / 2**20

    counted = (
        f"device memory after loading: weights, tables, CUDA graphs and torch's reserve as measured, "
        f"and a KV cache of {_CACHE_TOKENS} tokens ({cache / 2**20:.0f} MiB); not the CUDA context"
    )
    return [
        Target(f"{name}, {counted}", most, _measured(mebibytes, name), "MiB", at_most=True)
        for name, most in (("int8", 9009), ("int4", 5657))
    ]
