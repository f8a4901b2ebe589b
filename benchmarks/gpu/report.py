"""The suite's results as a page of markdown: figures, each beside the share of the ceiling it reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def markdown(device: str, results: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = results["sections"]
    lines = [f"# GPU: {device}", ""]
    lines += [f"- {name}: {value}" for name, value in results["provenance"].items()]
    lines += [f"- FAILED: {name} ({error.strip().splitlines()[-1]})" for name, error in results["failed"].items()]
    if "tests" in sections:
        lines += ["", f"Tests: {sections['tests']['summary']}"]
    ceilings = sections.get("ceilings", {})
    if ceilings:
        lines += ["", "Ceilings: " + ", ".join(f"{name.replace('_', ' ')} {v:.1f}" for name, v in ceilings.items())]
    for name, figures in sections.items():
        if name.startswith("engine "):
            lines += [
                "",
                f"## Weights: {figures['quantization']}, ops: {figures['ops']}",
                "",
                *_engine(figures, ceilings),
            ]
    if "transformers" in sections:
        lines += ["", "## transformers", "", *_peers(sections["transformers"])]
    return "\n".join(lines) + "\n"


def _engine(figures: Mapping[str, Any], ceilings: Mapping[str, float]) -> Iterator[str]:
    read, matmul = ceilings.get("read_gb_per_second"), ceilings.get("matmul_tflop_per_second")
    yield "| decode: batch x context | ITL p50 / p95 / p99, ms | tokens/s | GB/s | of read |"
    yield "|---|---:|---:|---:|---:|"
    for row in (*figures["decode"], *figures["batches"]):
        latency = " / ".join(f"{row['inter_token_latency_ms'][p]:.2f}" for p in ("p50", "p95", "p99"))
        share = f"{row['gb_per_second'] / read:.0%}" if read else ""
        speed = f"{row['tokens_per_second']:.1f} | {row['gb_per_second']:.0f}"
        yield f"| {row['batch']} x {row['context']} | {latency} | {speed} | {share} |"
    yield ""
    yield "| prefill, tokens | first token, ms | tokens/s | TFLOP/s | of matmul |"
    yield "|---|---:|---:|---:|---:|"
    for row in figures["prefill"]:
        share = f"{row['tflop_per_second'] / matmul:.0%}" if matmul else ""
        speed = f"{row['tokens_per_second']:.0f} | {row['tflop_per_second']:.1f}"
        yield f"| {row['tokens']} | {row['time_to_first_token_ms']:.1f} | {speed} | {share} |"
    key = figures["keystroke"]
    yield ""
    yield (
        f"Three tokens typed behind {key['context']} warm ones: first token after "
        f"{key['time_to_first_token_ms']:.1f} ms; 32 tokens after {key['completion_of_32_ms']:.0f} ms."
    )
    if "peak_memory_bytes" in figures:
        peak = figures["peak_memory_bytes"] / 2**20
        yield f"Peak memory beyond the shared weights: {peak:.0f} MiB, KV cache included."


def _peers(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "| side | ms per token |"
    yield "|---|---:|"
    for name, side in figures["sides"].items():
        yield f"| {name} | {side['inter_token_latency_ms']:.2f} |"
    yield ""
    for ops, count in figures["greedy_ids_agreeing"].items():
        yield f"Greedy ids of ours ({ops}) that agree before the first difference: {count} of {figures['of']}."
