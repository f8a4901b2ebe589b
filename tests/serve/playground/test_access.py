"""The playground for everyone: by keyboard alone, dark and light, in a narrow window."""

from __future__ import annotations

import pytest

from tests.serve.playground.conftest import Playground

expect = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser").expect


def test_the_keyboard_reaches_everything_and_is_trapped_nowhere(playground: Playground) -> None:
    page = playground.page
    name = "document.activeElement.id || document.activeElement.closest('#editor')?.id || 'page'"
    visited = []
    for _ in range(20):
        page.keyboard.press("Tab")
        visited.append(page.evaluate(name))
        ring = "getComputedStyle(document.activeElement.closest('#editor') ?? document.activeElement).outlineWidth"
        assert visited[-1] == "page" or page.evaluate(ring) == "3px"
        if visited[-1] == "editor":
            page.keyboard.press("Escape")
        if visited[-1] == "curl":
            break
    assert visited == [
        "path", "language", "ending", "limit", "probabilities", "editor", "suggest", "dialect", "copy", "curl"
    ]  # fmt: skip
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    expect(playground.editor).to_be_focused()
    before = playground.code
    page.keyboard.press("Tab")
    assert len(playground.code) > len(before), "without Escape, Tab indents"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(playground: Playground, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1; of bounds of controls 3 to 1 (1.4.11)."""
    playground.page.emulate_media(color_scheme=scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue('--%s').trim()"
    colours = {name: playground.page.evaluate(style % name) for name in COLOURS}
    is_dark = luminance(colours["page"]) < 0.5
    assert is_dark == (scheme == "dark")
    for background in ("page", "field"):
        for name in set(COLOURS) - {"page", "field"}:
            least = 3 if name == "line" else 4.5
            assert contrast(colours[name], colours[background]) >= least, (name, background)
    assert playground.page.evaluate("getComputedStyle(document.body).color") == rgb(colours["text"])


COLOURS = (
    "page", "field", "text", "muted", "line", "accent", "ghost", "problem", "keyword", "string", "number", "comment",
    "type", "function",
)  # fmt: skip


def channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def rgb(colour: str) -> str:
    return f"rgb({', '.join(map(str, channels(colour)))})"


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    linear = [v / 12.92 if (v := c / 255) <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_a_narrow_window_scrolls_in_one_direction(playground: Playground) -> None:
    """WCAG 2.2, 1.4.10: at 320 pixels."""
    playground.page.set_viewport_size({"width": 320, "height": 800})
    playground.suggest("x = " + "long " * 50)
    expect(playground.ghost).to_have_text("alpha + beta")
    assert playground.page.evaluate("document.scrollingElement.scrollWidth") == 320
