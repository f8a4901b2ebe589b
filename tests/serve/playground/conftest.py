"""A page in headless Chromium, where there are Playwright and a Chromium; else the tests that want one are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.playground.fake_server import FakeServer, fake_server

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    command = next(filter(None, map(shutil.which, NAMES)), None)
    if command is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        # Its sandbox does not start for root.
        found = driver.chromium.launch(executable_path=command, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page. Whatever its console complains of fails the test, a refusal by its security policy included.

    A test may add to `page.expected_complaints` parts of what must be complained of.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.expected_complaints = []
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    unexpected = [text for text in complaints if not any(part in text for part in page.expected_complaints)]
    assert not unexpected, unexpected


class Playground:
    """The page, as a user sees and uses it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.keyboard = page, page.keyboard
        page.goto(url)
        self.editor = page.get_by_role("textbox", name="Code.")
        self.ghost = page.locator(".ghost")
        self.status = page.get_by_role("status")
        self.card = page.get_by_role("tooltip")

    def suggest(self, code: str = "x = 5") -> None:
        """Replace all by `code`, at one stroke: however slow this is, it is one request."""
        self.editor.focus()
        self.keyboard.press("Control+a")
        self.keyboard.insert_text(code)

    @property
    def code(self) -> str:
        """What is in the document; a suggestion is not."""
        script = "lines => lines.map(l => [...l.childNodes].filter(n => !n.classList?.contains('ghost'))"
        lines = self.page.locator(".cm-line")
        return lines.evaluate_all(f"{script}.map(n => n.textContent).join('')).join('\\n')")

    def fact(self, name: str) -> str:
        """A line of the panel."""
        return self.page.locator(f"dt:text-is('{name}') + dd").inner_text()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """The page's server. It answers what a test tells it to."""
    with fake_server() as found:
        yield found


@pytest.fixture
def playground(server: FakeServer, page: Any) -> Playground:
    """The page of that server, as it begins."""
    return Playground(page, server.url)
