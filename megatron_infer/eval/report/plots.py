"""The report's figures: numbers in, SVG text out that takes its colours and its font from the page around it.

Owns what a figure looks like. The same numbers give the same bytes. Knows no run, no metric and no file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Colours that stand for the page's own, and are replaced by them: so one figure suits light, dark and paper.
_INK, _GRID, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLORS = {_INK: "currentColor", _GRID: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}

_STYLE: dict[Any, Any] = json.loads(Path(__file__).with_name("plots.json").read_text(encoding="utf-8"))
"""Text stays text, so that it can be searched, selected and read aloud; a $ in a label is a $."""
_WIDTH_INCHES = 9.6
_ROW_INCHES = 0.26
_IDS = re.compile(r'(\bid="|url\(#|href="#)')
_SIZE = re.compile(r'width="[\d.]+pt" height="[\d.]+pt" ')
_STYLE_SHEET = re.compile(r"<style.*?</style>", re.DOTALL)  # inside a page it would hold for the whole page


@dataclass(frozen=True)
class Estimate:
    """A labelled value with its interval, if it has one, all in one unit."""

    label: str
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Panel:
    """A column of estimates under one title. They are matched to other panels' by label."""

    title: str
    estimates: tuple[Estimate, ...]


def interval_plot(name: str, about: str, panels: Sequence[Panel], *, is_difference: bool = False) -> str:
    """Dots with whiskers, a row per label, a panel per metric, in percent; differences have a line at zero.

    name: unique on the page, for ids. about: what the figure shows, for those who do not see it.
    """
    labels = list(dict.fromkeys(estimate.label for panel in panels for estimate in panel.estimates))
    places = {label: -i for i, label in enumerate(labels)}
    with _figure(name, 0.95 + _ROW_INCHES * len(labels)) as (figure, svg):
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            heights = [places[estimate.label] for estimate in panel.estimates]
            means = [estimate.mean for estimate in panel.estimates]
            for height, estimate in zip(heights, panel.estimates, strict=True):
                if estimate.low is not None and estimate.high is not None:
                    axis.hlines(height, estimate.low, estimate.high, color=_FIRST, linewidth=1.6)
            axis.plot(means, heights, "o", color=_FIRST, markersize=4.5)
            axis.set_title(panel.title)
            axis.grid(axis="x")
            axis.tick_params(length=0)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            if is_difference:
                axis.axvline(0.0, color=_INK, linewidth=0.8)
            else:
                axis.set_xlim(-2.0, max(102.0, *(estimate.high or estimate.mean for estimate in panel.estimates)))
            axis.set_xlabel("percentage points" if is_difference else "percent")
        axes[0].set_yticks(list(places.values()), labels)
        axes[0].set_ylim(-len(labels) + 0.4, 0.6)
    return _page_svg(svg[0], name, about)


@contextmanager
def _figure(name: str, height_inches: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw in; its SVG is the one element of the list when the block ends."""
    svg: list[str] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg.append(buffer.getvalue())


def _page_svg(svg: str, name: str, about: str) -> str:
    """The <svg> element alone, as wide as its place, with ids of its own, colours of the page, and a description."""
    svg = _STYLE_SHEET.sub("", svg[svg.index("<svg") :], count=1)
    svg = _IDS.sub(rf"\g<1>{name}-", _SIZE.sub("", svg, count=1))
    for stand_in, color in _PAGE_COLORS.items():
        svg = svg.replace(stand_in, color)
    description = about.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
