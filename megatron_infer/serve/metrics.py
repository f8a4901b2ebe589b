"""What the server counts, for `/metrics`, and the one line it logs per request. Neither ever holds code."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_infer.completion import Completion
from megatron_infer.llm import LLM

log = logging.getLogger("megatron_infer.serve")

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Outcome:
    """How a request ended. outcome: ok, cancelled, superseded, refused or error."""

    dialect: str
    outcome: str
    seconds: float
    completions: Sequence[Completion] = ()
    num_dropped_snippets: int = 0


class Metrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self, llm: LLM, num_queued: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests", "dialect", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens", "dialect")
        self._cached_tokens = self._counter("cached_tokens", "prompt tokens found in the KV cache", "dialect")
        self._new_tokens = self._counter("generation_tokens", "tokens generated", "dialect")
        self._trims = self._counter("trims", "answers that a rule ended", "rule")
        self._dropped_tokens = self._counter("dropped_tokens", "prompt tokens cut off", "dialect")
        self._dropped_snippets = self._counter("dropped_snippets", "context snippets left out", "dialect")
        self._first = self._histogram("ttft_seconds", "submission to first token", _FIRST)
        self._per_token = self._histogram("tpot_seconds", "per token after the first", _PER_TOKEN)
        self._total = self._histogram("request_seconds", "arrival to the end of the answer", _FIRST)
        self._gauge("requests_running", "requests in a step", lambda: llm.session.load.num_running)
        self._gauge("requests_waiting", "requests that wait for room in a step", lambda: llm.session.load.num_waiting)
        self._gauge("queue", "completions beyond those that run together", num_queued)
        self._gauge("kv_usage_ratio", "KV-cache blocks in use", lambda: _ratio(llm))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def record(self, done: Outcome) -> None:
        """Count and log a request that is over."""
        self._requests.labels(done.dialect, done.outcome).inc()
        self._total.labels(done.dialect).observe(done.seconds)
        self._dropped_snippets.labels(done.dialect).inc(done.num_dropped_snippets)
        for completion in done.completions:
            timings = completion.timings
            if completion.sample_index == 0:
                self._prompt_tokens.labels(done.dialect).inc(timings.num_prompt_tokens)
                self._cached_tokens.labels(done.dialect).inc(completion.num_cached_tokens)
                self._dropped_tokens.labels(done.dialect).inc(completion.num_dropped_tokens)
            self._new_tokens.labels(done.dialect).inc(timings.num_new_tokens)
            if timings.num_new_tokens:
                self._first.labels(done.dialect).observe(timings.first_token_seconds)
            if timings.num_new_tokens > 1:
                seconds = timings.total_seconds - timings.first_token_seconds
                self._per_token.labels(done.dialect).observe(seconds / (timings.num_new_tokens - 1))
            if completion.trimmed_by:
                self._trims.labels(completion.trimmed_by).inc()
        log.info("request", extra={"fields": _fields(done)})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"megatron_infer_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"megatron_infer_{name}", text, ("dialect",), registry=self._registry, buckets=buckets)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"megatron_infer_{name}", text, registry=self._registry).set_function(value)


def _ratio(llm: LLM) -> float:
    load = llm.session.load
    return load.num_used_blocks / load.num_blocks


def _fields(done: Outcome) -> dict[str, object]:
    """What a log line says of a request: numbers and names of rules."""
    first = done.completions[0] if done.completions else None
    fields: dict[str, object] = {
        "dialect": done.dialect, "outcome": done.outcome, "total_ms": round(1000 * done.seconds, 1)
    }  # fmt: skip
    if first is not None:
        fields |= {
            "prompt_tokens": first.timings.num_prompt_tokens,
            "cached_tokens": first.num_cached_tokens,
            "new_tokens": sum(c.timings.num_new_tokens for c in done.completions),
            "ttft_ms": round(1000 * first.timings.first_token_seconds, 1),
            "finish_reason": first.finish_reason,
            "trimmed_by": first.trimmed_by,
            "dropped_tokens": first.num_dropped_tokens,
            "dropped_snippets": done.num_dropped_snippets,
        }
    return fields


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Of an exception only its kind and where it was raised: its text may hold code."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **vars(record).get("fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            trace, where = record.exc_info[2], []
            while trace is not None:
                where.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
                trace = trace.tb_next
            line["where"] = where
        return json.dumps(line, ensure_ascii=False)
