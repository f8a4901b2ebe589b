"""The suite's results as a page of markdown, as JSON and as a plot. Measures nothing.

python -m benchmarks.gpu.report gpu_<device>.json     # page and plot again, for instance where there is matplotlib
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.targets import targets
from benchmarks.gpu.two_ranks import first_difference
from benchmarks.gpu.workload import Workload, workload_for

MIB = 2**20
REFERENCE = "transformers eager"
"""Whose greedy ids others are compared with."""
Results = Mapping[str, Any]


def write(directory: Path, results: Results, work: Workload) -> None:
    """gpu_<device>.json and .md, the page with the plot if that has been drawn."""
    path = stem(directory, results)
    reached = [target.to_json() for target in targets(results["sections"], work)]
    path.with_suffix(".json").write_text(json.dumps({**results, "targets": reached}, indent=1) + "\n")
    text = markdown(results, work)
    if path.with_suffix(".png").exists():
        text += f"\n![milliseconds per token against context, and prefill]({path.name}.png)\n"
    path.with_suffix(".md").write_text(text)


def draw(directory: Path, results: Results, work: Workload) -> None:
    """gpu_<device>.png, where matplotlib is installed; elsewhere a line on how to draw it later."""
    path = stem(directory, results)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot: without matplotlib; later: python -m benchmarks.gpu.report {path}.json", file=sys.stderr)
        return
    # Here and not at the top: without matplotlib everything else still works.
    from benchmarks.gpu import plot

    plot.draw(results["sections"], results["device"], work, path.with_suffix(".png"))


def stem(directory: Path, results: Results) -> Path:
    """Of the three files' names."""
    return directory / ("gpu_" + re.sub(r"\W+", "_", results["device"].lower()))


def markdown(results: Results, work: Workload) -> str:
    """The whole page."""
    sections = results["sections"]
    lines = [f"# GPU: {results['device']}", ""]
    if results["device_type"] == "cpu":
        lines += ["A tiny model on the CPU, to try the suite: the figures say nothing.", ""]
    lines += [*targets_table(sections, work), "", *_course(results)]
    if "ceilings" in sections:
        lines += ["", "## Ceilings", "", *_ceilings(sections["ceilings"])]
    for name, figures in sections.items():
        if "quantization" in figures:
            lines += ["", f"## {name}", "", *_engine(figures, sections.get("ceilings", {}))]
        elif "linear" in figures:
            lines += ["", f"## {name}", "", *_kernels(figures, sections.get("ceilings", {}))]
    lines += _others(sections)
    for provenance in (results["provenance"], *reversed(results["earlier"])):
        lines += ["", "## Provenance", "", *(f"- {name}: {value}" for name, value in provenance.items())]
    return "\n".join(lines) + "\n"


def targets_table(sections: Mapping[str, Any], work: Workload) -> Iterator[str]:
    """What was to be reached, and how far the run got."""
    yield "| target | goal | measured | |"
    yield "|---|---:|---:|---|"
    for target in targets(sections, work):
        goal = f"{'at most' if target.at_most else 'at least'} {target.goal:,g} {target.unit}"
        value = "" if target.value is None else f"{target.value:,.{1 if target.value >= 100 else 2}f} {target.unit}"
        yield f"| {target.text} | {goal} | {value} | {target.verdict} |"


def _course(results: Results) -> Iterator[str]:
    """What ran, for how long, and what did not."""
    yield f"Seconds: {', '.join(f'{name} {seconds:.1f}' for name, seconds in results['seconds'].items())}."
    for name, reason in results["skipped"].items():
        yield f"\n- Skipped: {name}: {reason}"
    for name, error in results["failed"].items():
        yield f"\n- FAILED: {name}: {error.strip().splitlines()[-1]}"
    for name, warnings in results["warnings"].items():
        for warning in warnings:
            yield f"\n- Warning: {name}: {warning.splitlines()[0]}"


def _ceilings(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---:|"
    yield f"| read, the best way | {figures['read_gb_per_second']:.0f} GB/s |"
    for name, speed in figures["read_gb_per_second_by_way"].items():
        yield f"| read: {name} | {speed:.0f} GB/s |"
    yield f"| copy, read and written bytes | {figures['copy_gb_per_second']:.0f} GB/s |"
    yield f"| bf16 product of square matrices | {figures['matmul_tflop_per_second']:.1f} TFLOP/s |"
    yield f"| bf16 products of a prefill step | {figures['prefill_matmul_tflop_per_second']:.1f} TFLOP/s |"
    yield ""
    yield f"SM clock, memory clock, power, temperature under load: {figures['clocks_under_load']}."


def _engine(figures: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Iterator[str]:
    """One variant of our engine."""
    for chosen, names in figures["ops"].items():
        yield f"- ops: {chosen}: {', '.join(names)}"
    graphs = figures["graphs"]
    if graphs is None:
        yield "- CUDA graphs: none"
    else:
        keys = ", ".join(f"{num_seqs} x {query_len}" for num_seqs, query_len in graphs["captured"])
        size = f"{graphs['memory_bytes'] / MIB:.0f} MiB"
        yield f"- CUDA graphs: {len(graphs['captured'])}, {size}, for sequences x tokens {keys}"
    yield from _decode_table([*figures.get("decode", ()), *figures.get("batches", ())], ceilings)
    if "prefill" in figures:
        yield from _prefill_table(figures["prefill"], ceilings)
    if "keystroke" in figures:
        key = figures["keystroke"]
        yield ""
        yield (
            f"Three tokens typed behind {key['context']} warm ones: first token after "
            f"{key['time_to_first_token_ms']:.2f} ms, "
            f"{key['completion_tokens']} tokens after {key['completion_ms']:.1f} ms."
        )
    if figures.get("memory"):
        weights, cache = (f"{figures['memory'][f'{name}_bytes'] / MIB:,.0f} MiB" for name in ("without_cache", "cache"))
        yield f"After loading: {weights}, and a KV cache of {cache}."


def _kernels(figures: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Iterator[str]:
    """Single kernels of one weight format."""
    read = ceilings.get("read_gb_per_second")

    def table(head: str, rows: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
        yield from ("", f"| {head} | microseconds | GB/s | of read |", "|---|---:|---:|---:|")
        for what, row in rows:
            share = f"{row['gb_per_second'] / read:.0%}" if read else ""
            yield f"| {what} | {row['microseconds']:.1f} | {row['gb_per_second']:,.0f} | {share} |"

    linear, layers = figures["linear"], figures["layers"]
    shapes = ((f"{row['layer']} {row['rows']} x {row['columns']}, {row['tokens']} tokens", row) for row in linear)
    yield from table("linear layer", shapes)
    switches = ((f"dependent launch {row['dependent_launch']}, context {row['context']}", row) for row in layers)
    yield from table("decoder layer of one token", switches)
    if "attention" in figures:
        yield from table("decode attention", ((f"{r['batch']} x {r['context']}", r) for r in figures["attention"]))
        yield from ("", "| prefill attention, queries of context | microseconds | TFLOP/s |", "|---|---:|---:|")
        for row in figures["prefill_attention"]:
            speed = f"{row['microseconds']:.1f} | {row['tflop_per_second']:.1f}"
            yield f"| {row['queries']} of {row['context']} | {speed} |"


def _decode_table(rows: list[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> Iterator[str]:
    read = ceilings.get("read_gb_per_second")
    yield ""
    yield "| decode: batch x context | ms per step | p50 / p95 / p99 | tokens/s | GB/s | of read |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        latency = " / ".join(f"{row['inter_token_latency_ms'][p]:.2f}" for p in ("p50", "p95", "p99"))
        share = f"{row['gb_per_second'] / read:.0%}" if read else ""
        speed = f"{row['tokens_per_second']:,.1f} | {row['gb_per_second']:,.0f}"
        yield f"| {row['batch']} x {row['context']} | {row['ms_per_step']:.3f} | {latency} | {speed} | {share} |"


def _prefill_table(rows: list[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> Iterator[str]:
    matmul = ceilings.get("matmul_tflop_per_second")
    yield ""
    yield "| prefill, tokens | first token, ms | tokens/s | TFLOP/s | of matmul |"
    yield "|---|---:|---:|---:|---:|"
    for row in rows:
        share = f"{row['tflop_per_second'] / matmul:.0%}" if matmul else ""
        speed = f"{row['tokens_per_second']:,.0f} | {row['tflop_per_second']:.1f}"
        yield f"| {row['tokens']} | {row['time_to_first_token_ms']:.1f} | {speed} | {share} |"


def _others(sections: Mapping[str, Any]) -> Iterator[str]:
    """Peers, agreement of greedy ids, two ranks, tests."""
    peers = [name for name in sections if name.startswith(("transformers", "gpt-fast"))]
    if peers:
        yield from ("", "## Peers", "", "| | context | ms per token |", "|---|---:|---:|")
    for name in peers:
        for row in sections[name]["decode"]:
            yield f"| {name} | {row['context']} | {row['ms_per_step']:.3f} |"
    if REFERENCE in sections:
        theirs = sections[REFERENCE]["greedy_ids"]
        yield from ("", f"Greedy ids that agree with {REFERENCE} before the first difference, of {len(theirs)}:", "")
        for name, figures in sections.items():
            if name != REFERENCE and "greedy_ids" in figures:
                yield f"- {name}: {first_difference(figures['greedy_ids'], theirs)}"
    if "two ranks" in sections:
        yield from ("", "## Two ranks against one, the demo checkpoint", "")
        for mode, figures in sections["two ranks"].items():
            agreeing = ", ".join(f"{n} of {of}" for n, of in zip(figures["ids_agreeing"], figures["of"], strict=True))
            equal = "equal" if figures["logprobs_equal"] else "not equal"
            yield f"- {mode}: greedy ids agreeing {agreeing}; log probabilities bitwise {equal}"
    if "tests" in sections:
        yield from ("", "## Tests", "", *(f"- {name}: {summary}" for name, summary in sections["tests"].items()))


if __name__ == "__main__":
    source = Path(sys.argv[1])
    saved = json.loads(source.read_text())
    size = workload_for(saved["device_type"])
    draw(source.parent, saved, size)
    write(source.parent, saved, size)
