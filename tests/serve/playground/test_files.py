"""The playground's files: what is committed is what its sources make, safe as it stands, and part of the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.playground.fake_server import PLAYGROUND

ROOT = PLAYGROUND.parents[2]
SOURCES = sorted((PLAYGROUND / "src").glob("*.js"))


def test_the_bundle_is_what_its_sources_make(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (PLAYGROUND / "node_modules").is_dir():
        pytest.skip(f"needs node, and `npm ci` in {PLAYGROUND.relative_to(ROOT)}")
    subprocess.run([node, str(PLAYGROUND / "build.mjs"), str(tmp_path)], check=True)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (PLAYGROUND / path.name).read_bytes(), f"{path.name}: run `npm run build`"


def test_the_lock_pins_every_package_and_names_no_registry() -> None:
    packages = json.loads((PLAYGROUND / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    declared = json.loads((PLAYGROUND / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert packages.pop("")["devDependencies"] == declared
    for name, entry in packages.items():
        assert entry["integrity"].startswith("sha512-"), name
        assert "resolved" not in entry, name
    licences = (PLAYGROUND / "LICENSES.txt").read_text(encoding="utf-8")
    for name, version, licence in re.findall(r"^(\S+) (\d[\d.]*) \((.+)\)$", licences, re.MULTILINE):
        assert packages[f"node_modules/{name}"]["version"] == version
        assert licence == "MIT", name
    assert "@codemirror/view " in licences


def test_no_text_becomes_markup_or_code() -> None:
    """The page's policy forbids it in the browser; here nobody even tries."""
    page = (PLAYGROUND / "index.html").read_text(encoding="utf-8")
    assert "script-src 'self';" in page
    assert not re.search(r"\son\w+=|javascript:|<script(?! type=\"module\" src=\"playground.js\")|https?://", page)
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage|document\.cookie"
    )
    assert SOURCES
    for path in SOURCES:
        assert not re.search(sinks, path.read_text(encoding="utf-8")), path.name


def test_the_package_has_the_page_but_not_what_it_is_built_from(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / PLAYGROUND.relative_to(ROOT)
    names = ["LICENSES.txt", "icon.svg", "index.html", "playground.css", "playground.js"]
    assert sorted(path.name for path in built.rglob("*")) == names
