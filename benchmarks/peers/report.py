"""The results as tables, as a plot and as files. Knows no engine's code and measures nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.plan import (
    ENGINES,
    INSTALL_HINT,
    MODEL,
    Engine,
    Metric,
    head_params,
    layer_params,
    prefill_flops,
    streamed_bytes,
    weight_bytes,
)

Results = dict[str, Any]

_COLOURS = {"megatron_infer": "#1f6fb4", "llama.cpp": "#e08a2e", "transformers": "#8a8a8a"}
MIB = 2**20


def markdown(results: Results, metrics: Sequence[Metric]) -> str:
    """The whole report."""
    measured = [engine for engine in ENGINES if engine.name in results["engines"]]
    sections = [
        "# This engine, llama.cpp and transformers on the CPU",
        _model_line(),
        _speed(results, metrics, measured),
        _ratios(results, metrics, measured),
        _shares(results, metrics, measured),
        _memory(results, measured),
        _agreement(results, measured),
        _settings(results, metrics, measured),
        _provenance(results, measured),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write(directory: Path, results: Results, metrics: Sequence[Metric]) -> None:
    """cpu_vs_peers.md, .json and, where matplotlib is installed, .png."""
    directory.mkdir(parents=True, exist_ok=True)
    text = markdown(results, metrics)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot: matplotlib is not installed; {INSTALL_HINT}")
    else:
        plot(results, metrics, directory / "cpu_vs_peers.png")
        text += "\n![tokens per second and memory](cpu_vs_peers.png)\n"
    (directory / "cpu_vs_peers.md").write_text(text, encoding="utf-8")
    (directory / "cpu_vs_peers.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


def _model_line() -> str:
    params = layer_params(MODEL) + 2 * head_params(MODEL)
    return (
        f"One model of aiXcoder's shape with random weights, {params / 1e6:.0f} million parameters: hidden "
        f"{MODEL.hidden_size}, {MODEL.num_hidden_layers} layers, {MODEL.num_attention_heads} heads, "
        f"{MODEL.num_key_value_heads} KV heads of {MODEL.head_dim}, ffn {MODEL.intermediate_size}, vocabulary "
        f"{MODEL.vocab_size}, RoPE theta {MODEL.rope_theta:.0f}, RMSNorm eps {MODEL.rms_norm_eps}, untied head."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([row(header), row(rule), *map(row, rows)])


def _cells(
    results: Results, engine: Engine, metrics: Sequence[Metric], show: Callable[[Metric, float], str]
) -> list[str]:
    """One cell per metric; a dash where the engine has no figure."""
    medians = results["engines"][engine.name]["medians"]
    return [show(metric, medians[metric.name]) if metric.name in medians else "-" for metric in metrics]


def _ttft_metric(metrics: Sequence[Metric]) -> Metric | None:
    return next((metric for metric in metrics if metric.name == "prefill-short"), None)


def _speed(results: Results, metrics: Sequence[Metric], measured: Sequence[Engine]) -> str:
    first = _ttft_metric(metrics)
    header = ["", *(metric.title for metric in metrics)]
    if first is not None:
        header.append(f"TTFT {first.prompt_tokens}, ms")
    rows = []
    for engine in measured:
        cells = _cells(results, engine, metrics, lambda _, rate: f"{rate:.1f}" if rate < 1000 else f"{rate:.0f}")
        if first is not None:
            cells += _cells(results, engine, [first], lambda metric, rate: f"{1000 * metric.prompt_tokens / rate:.0f}")
        rows.append([engine.label, *cells])
    title = (
        f"## Tokens per second, medians of {results['repetitions']} repetition(s)\n\nBatches: all sequences together. "
        "Prefill and TTFT are one measurement, the time to the first token. Every prompt is new: no prefix cache hits."
    )
    return f"{title}\n\n{_table(header, rows)}"


def _better_transformers(results: Results, metric: Metric) -> float | None:
    rates = [
        results["engines"][engine.name]["medians"].get(metric.name)
        for engine in ENGINES
        if engine.project == "transformers" and engine.name in results["engines"]
    ]
    return max((rate for rate in rates if rate is not None), default=None)


def _ratios(results: Results, metrics: Sequence[Metric], measured: Sequence[Engine]) -> str:
    rows = []
    for engine in measured:
        if engine.project != "megatron_infer":
            continue
        peer = results["engines"].get(engine.peer, {"medians": {}})["medians"]
        against_peer = _cells(
            results, engine, metrics, lambda m, rate, p=peer: f"{rate / p[m.name]:.2f}" if m.name in p else "-"
        )
        rows.append([f"{engine.label} / {engine.peer.replace('llama-', 'llama.cpp ')}", *against_peer])

        def against_transformers(metric: Metric, rate: float) -> str:
            other = _better_transformers(results, metric)
            return "-" if other is None else f"{rate / other:.2f}"

        cells = _cells(results, engine, metrics, against_transformers)
        rows.append([f"{engine.label} / transformers, better dtype", *cells])
    if not rows:
        return ""
    return "## Ratios (above 1: this engine is faster)\n\n" + _table(["", *(m.title for m in metrics)], rows)


def share(engine: Engine, metric: Metric, rate: float, ceilings: dict[str, float]) -> float:
    """Share of the machine's ceiling that a figure reaches: of fp32 arithmetic for prefill, of reading else."""
    if metric.is_prefill:
        flops = prefill_flops(MODEL, metric.prompt_tokens) * rate / metric.prompt_tokens
        return flops / (1e9 * ceilings["fma_gflop_per_second"])
    return streamed_bytes(engine, MODEL) * rate / metric.batch / (1e9 * ceilings["read_gb_per_second"])


def _shares(results: Results, metrics: Sequence[Metric], measured: Sequence[Engine]) -> str:
    ceilings = results["ceilings"]
    read, fma = ([ceilings[name], ceilings[f"{name}_max"]] for name in ("read_gb_per_second", "fma_gflop_per_second"))
    rows = []
    for engine in measured:

        def cell(metric: Metric, rate: float, engine: Engine = engine) -> str:
            # Peers may multiply in bf16 or int8, for which fp32 is no ceiling.
            if metric.is_prefill and engine.project != "megatron_infer":
                return "-"
            return f"{100 * share(engine, metric, rate, ceilings):.0f} %"

        rows.append([engine.label, *_cells(results, engine, metrics, cell)])
    title = (
        "## Shares of the machine's ceilings\n\nMeasured before every metric of every repetition, median (best): "
        f"reading {read[0]:.1f} ({read[1]:.1f}) GB/s, fp32 multiply-adds {fma[0]:.0f} ({fma[1]:.0f}) GFLOP/s. Decode: "
        "weight bytes read per step, without the KV cache. Prefill: operations of the linear layers, without attention."
    )
    return f"{title}\n\n{_table(['', *(m.title for m in metrics)], rows)}"


def _memory(results: Results, measured: Sequence[Engine]) -> str:
    rows = []
    for engine in measured:
        record = results["engines"][engine.name]
        if "memory" not in record:
            continue
        used = record["memory"]
        imports = record["baseline_bytes"] * engine.ranks
        expected = weight_bytes(engine, MODEL) + used["kv_bytes"]
        numbers = (
            weight_bytes(engine, MODEL), used["kv_bytes"], imports, used["peak_bytes"],
            used["anonymous_bytes"], used["resident_bytes"] - imports - expected,
        )  # fmt: skip
        mebibytes = [f"{number / MIB:.0f}" for number in numbers]
        rows.append([engine.label, f"{record['load_seconds']:.2f}", f"{record['ready_seconds']:.2f}", *mebibytes])
    title = (
        "## Load time and memory in MiB\n\n`ready`: loaded and one prompt of 32 tokens answered; files are in the page "
        "cache. Memory after the first long prompt, all ranks: `imports` before the model, `rest` what is resident "
        "beyond imports, weights and KV cache. `anonymous` leaves mapped files out."
    )
    header = ["", "load, s", "ready, s", "weights", "KV cache", "imports", "peak", "anonymous", "rest"]
    return f"{title}\n\n{_table(header, rows)}"


def _agreement(results: Results, measured: Sequence[Engine]) -> str:
    rows = []
    for engine in measured:
        if found := results["engines"][engine.name].get("agreement"):
            same = f"{found['same_top']} of {len(results['scored_prefixes'])}"
            rows.append([engine.label, same, f"{found['common']:.1f}", f"{found['largest_difference']:.4f}"])
    if not rows:
        return ""
    title = (
        f"## The same network\n\nNext-token distributions against {results['reference']}, after the first "
        f"{', '.join(map(str, results['scored_prefixes']))} tokens of one random prompt, before any timing. The last "
        "column: of the log probabilities of tokens that both count among the 20 likeliest."
    )
    header = ["", "same likeliest token", "common among the 20 likeliest", "largest difference"]
    return f"{title}\n\n{_table(header, rows)}"


def _settings(results: Results, metrics: Sequence[Metric], measured: Sequence[Engine]) -> str:
    rows = []
    for engine in measured:
        settings = results["engines"][engine.name]["settings"]
        if settings:
            rows.append([engine.label, *(settings.get(metric.name, "-") for metric in metrics)])
    if not rows:
        return ""
    title = "## What llama.cpp ran with\n\nEach way was timed before the repetitions, and the fastest kept."
    return f"{title}\n\n{_table(['', *(m.title for m in metrics)], rows)}"


def _provenance(results: Results, measured: Sequence[Engine]) -> str:
    lines = [f"- {name}: {value}" for name, value in results["provenance"].items()]
    told: set[str] = set()
    for engine in measured:
        for name, value in results["engines"][engine.name]["facts"].items():
            line = f"- {name}: {value}"
            # Formats of one program mostly say the same.
            if name in ("ops",):
                line = f"- {engine.label}: {value}"
            if line not in told and name not in results["provenance"]:
                told.add(line)
                lines.append(line)
    idle = {e.label: _per_second(results["engines"][e.name], "idle_") for e in measured}
    if idle:
        worst = max(idle, key=idle.__getitem__)
        lines.append(f"- a worker while another one is measured used at most {idle[worst]:.1%} of a core ({worst})")
    others = _per_second(results["disturbance"], "")
    lines.append(f"- other programs and the host used {others:.2f} cores while engines were measured")
    return "## How this was measured\n\n" + "\n".join(lines)


def _per_second(record: dict[str, float], prefix: str) -> float:
    """Processor seconds per second."""
    seconds = record[f"{prefix}seconds"]
    return record[f"{prefix}cpu_seconds"] / seconds if seconds else 0.0


def plot(results: Results, metrics: Sequence[Metric], path: Path) -> None:
    """Bars: a panel per metric and one for memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [engine for engine in reversed(ENGINES) if engine.name in results["engines"]]
    panels: list[tuple[str, dict[str, float]]] = []
    for metric in metrics:
        medians = {e.name: results["engines"][e.name]["medians"].get(metric.name, 0.0) for e in measured}
        panels.append((f"{metric.title}, tokens/s", medians))
    memory = {e.name: results["engines"][e.name].get("memory", {}).get("peak_bytes", 0) / MIB for e in measured}
    panels.append(("peak memory, MiB (less is better)", memory))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.9 + 0.28 * len(measured)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, height * rows), sharey=True, squeeze=False)
    for axis, (title, values) in zip(axes.flat, panels, strict=False):
        bars = axis.barh(
            [e.label for e in measured], [values[e.name] for e in measured],
            color=[_COLOURS[e.project] for e in measured], height=0.72,
        )  # fmt: skip
        axis.bar_label(bars, [f"{values[e.name]:.0f}" for e in measured], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.margins(x=0.14)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", bottom=False, labelbottom=False)
        axis.tick_params(axis="y", length=0, labelsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    about = results["provenance"]
    figure.text(
        0.995, 0.004,
        f"{about['cpu']}, {about['threads']} threads, {about['instruction set']}, commit {about['commit']}",
        ha="right", va="bottom", fontsize=7, color="#666666",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
