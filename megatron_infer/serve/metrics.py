"""What the server counts, for `/metrics`, and the one line it logs per request. Neither ever holds code."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from megatron_infer.completion import Completion
from megatron_infer.llm import LLM

log = logging.getLogger("megatron_infer.serve")

_COUNTERS = (
    ("requests", "requests", "dialect", "outcome"),
    ("prompt_tokens", "prompt tokens", "dialect"),
    ("cached_tokens", "prompt tokens found in the KV cache", "dialect"),
    ("generation_tokens", "tokens generated", "dialect"),
    ("draft_tokens", "tokens drafted", "dialect"),
    ("draft_accepted", "drafted tokens that were right", "dialect"),
    ("trims", "answers that a rule ended", "rule"),
    ("dropped_tokens", "prompt tokens cut off", "dialect"),
    ("dropped_snippets", "context snippets left out", "dialect"),
)
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_HISTOGRAMS = (
    ("ttft", "submission to first token", _LONG),
    ("tpot", "per token after the first", (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)),
    ("request", "arrival to the end of the answer", _LONG),
)


class Metrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self, llm: LLM) -> None:
        self.registry = registry = CollectorRegistry()
        self._count = {
            name: Counter(f"megatron_infer_{name}", text, labels, registry=registry)
            for name, text, *labels in _COUNTERS
        }
        self._seconds = {
            name: Histogram(f"megatron_infer_{name}_seconds", text, ["dialect"], registry=registry, buckets=buckets)
            for name, text, buckets in _HISTOGRAMS
        }
        for name, text, value in (
            ("requests_running", "requests in a step", lambda: llm.session.load[0]),
            ("requests_waiting", "requests that wait for room in a step", lambda: llm.session.load[1]),
            ("kv_usage_ratio", "KV-cache blocks in use", lambda: llm.session.load[2]),
        ):
            Gauge(f"megatron_infer_{name}", text, registry=registry).set_function(value)

    def record(
        self, dialect: str, outcome: str, seconds: float, done: Sequence[Completion], num_dropped_snippets: int
    ) -> None:
        """Count and log a request that is over. outcome: ok, cancelled, superseded, refused or error."""
        self._count["requests"].labels(dialect, outcome).inc()
        self._count["dropped_snippets"].labels(dialect).inc(num_dropped_snippets)
        self._seconds["request"].labels(dialect).observe(seconds)
        for completion in done:
            timings = completion.timings
            if completion.sample_index == 0:
                self._count["prompt_tokens"].labels(dialect).inc(timings.num_prompt_tokens)
                self._count["cached_tokens"].labels(dialect).inc(completion.num_cached_tokens)
                self._count["dropped_tokens"].labels(dialect).inc(completion.num_dropped_tokens)
            self._count["generation_tokens"].labels(dialect).inc(timings.num_new_tokens)
            self._count["draft_tokens"].labels(dialect).inc(completion.num_draft_tokens)
            self._count["draft_accepted"].labels(dialect).inc(completion.num_draft_accepted)
            if timings.num_new_tokens:
                self._seconds["ttft"].labels(dialect).observe(timings.first_token_seconds)
            if speed := timings.decode_tokens_per_second:
                self._seconds["tpot"].labels(dialect).observe(1 / speed)
            if completion.trimmed_by:
                self._count["trims"].labels(completion.trimmed_by).inc()
        fields = {"dialect": dialect, "outcome": outcome, "total_ms": round(1000 * seconds, 1)}
        for first in done[:1]:
            fields |= {
                "prompt_tokens": first.timings.num_prompt_tokens, "cached_tokens": first.num_cached_tokens,
                "new_tokens": sum(completion.timings.num_new_tokens for completion in done),
                "ttft_ms": round(1000 * first.timings.first_token_seconds, 1), "finish_reason": first.finish_reason,
                "trimmed_by": first.trimmed_by, "dropped_tokens": first.num_dropped_tokens,
                "dropped_snippets": num_dropped_snippets,
            }  # fmt: skip
        log.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Of an exception only its kind and where it was raised: its text may hold code."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {"time": f"{seconds}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage(), **vars(record).get("fields", {})}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["where"] = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(record.exc_info[2])]
        return json.dumps(line, ensure_ascii=False)
