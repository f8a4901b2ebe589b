"""The suite's figures as one picture: what a token costs at which context, and what a prefill reaches.

Colours are Okabe and Ito's, which colour-blind people can tell apart; markers and dashes say the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.gpu.weights import kv_bytes_per_token, streamed_bytes
from benchmarks.gpu.workload import Workload


@dataclass(frozen=True)
class Style:
    """How a section's line looks."""

    color: str
    marker: str
    dashes: str = "-"


_STYLES = {
    "bf16": Style("#0072B2", "o"),
    "int8": Style("#009E73", "s"),
    "int4": Style("#D55E00", "^"),
    "fp8": Style("#CC79A7", "D"),
    "bf16 no graphs": Style("#0072B2", "o", ":"),
    "bf16 vendor": Style("#56B4E9", "v", "--"),
    "transformers eager": Style("#000000", "x", "--"),
    "transformers compiled": Style("#000000", "+", "-."),
    "gpt-fast": Style("#E69F00", "*"),
}
_QUANTIZATIONS = {"bf16": "none", "int8": "int8", "int4": "int4", "fp8": "fp8"}
"""Sections that have a floor of their own."""


def draw(sections: Mapping[str, Any], device: str, work: Workload, path: Path) -> bool:
    """Write the PNG; False, and no file, if nothing of it has been measured."""
    sections = _one_line_each(sections)
    drawn = [name for name in _STYLES if "decode" in sections.get(name, {})]
    if not drawn:
        return False
    figure = Figure(figsize=(11, 5), layout="constrained")
    decode, prefill = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(f"{device}: {work.model.num_hidden_layers} layers of {work.model.hidden_size}, one sequence")
    _decode(decode, sections, drawn, work)
    _prefill(prefill, sections, [name for name in drawn if "prefill" in sections[name]])
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return True


def _one_line_each(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections, with the decode rows of "NAME, more contexts" behind those of NAME."""
    joined = dict(sections)
    for name in sections:
        base = name.removesuffix(", more contexts")
        if base != name and base in sections:
            joined[base] = {**sections[base], "decode": [*sections[base]["decode"], *sections[name]["decode"]]}
    return joined


def _decode(axes: Axes, sections: Mapping[str, Any], drawn: list[str], work: Workload) -> None:
    contexts = sorted({row["context"] for name in drawn for row in sections[name]["decode"]})
    for name in drawn:
        style, rows = _STYLES[name], sections[name]["decode"]
        axes.plot(
            [row["context"] for row in rows], [row["ms_per_step"] for row in rows],
            color=style.color, marker=style.marker, linestyle=style.dashes, label=name,
        )  # fmt: skip
    read = sections.get("ceilings", {}).get("read_gb_per_second")
    label = "floor: bytes at the measured read bandwidth"
    for name in drawn if read else ():
        if name not in _QUANTIZATIONS:
            continue
        weights, token = streamed_bytes(work.model, _QUANTIZATIONS[name]), kv_bytes_per_token(work.model)
        floor = [(weights + token * context) / read / 1e6 for context in contexts]
        axes.plot(contexts, floor, color=_STYLES[name].color, linewidth=0.8, linestyle=(0, (1, 3)), label=label)
        label = "_nolegend_"
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("context, tokens")
    axes.set_title("Milliseconds per token", loc="left")
    axes.grid(which="both", linewidth=0.4, alpha=0.6)


def _prefill(axes: Axes, sections: Mapping[str, Any], drawn: list[str]) -> None:
    """Bars of TFLOP/s for each variant, one per prompt length, with the measured matmul rate above them."""
    ceiling = sections.get("ceilings", {}).get("matmul_tflop_per_second")
    for place, name in enumerate(drawn):
        rows = sections[name]["prefill"]
        for i, row in enumerate(rows):
            width = 0.8 / len(rows)
            height = row["tflop_per_second"]
            center = place - 0.4 + (i + 0.5) * width
            axes.bar(center, height, 0.92 * width, color=_STYLES[name].color, alpha=1.0 if i else 0.6)
            share = f"\n{height / ceiling:.0%}" if ceiling else ""
            axes.annotate(f"{row['tokens']:,}{share}", (center, height), fontsize=7, ha="center", va="bottom")
    if ceiling:
        axes.axhline(ceiling, color="#000000", linewidth=0.8, linestyle="--")
        axes.annotate("bf16 matmul, measured", (0, ceiling), fontsize=8, va="bottom")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(drawn)), drawn, rotation=30, ha="right")
    axes.set_title("Prefill, TFLOP/s, by prompt length in tokens", loc="left")
