"""What the pages say about the repository is so: the files they name exist, and so do the options of their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoints_convert import __main__ as convert
from megatron_infer.commands import bench, complete
from megatron_infer.eval import command as eval_command
from megatron_infer.serve import command as serve_command

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PATH = re.compile(r"`([\w.*-]+(?:/[\w.*-]+)+/?)`")
PROGRAMS = {
    "sess_megatron.py": complete.main,
    "-m megatron_infer bench": bench.main,
    "-m megatron_infer eval": eval_command.main,
    "-m megatron_infer serve": serve_command.main,
    "-m checkpoints_convert": convert.main,
}
COMMAND = re.compile(rf"({'|'.join(PROGRAMS)})(?: (\w[\w-]*))?")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands() -> dict[tuple[str, str], set[str]]:
    """(program, its command) -> the options that the pages give it."""
    found: dict[tuple[str, str], set[str]] = {}
    for text in map(read, PAGES):
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
            if match := COMMAND.search(line):
                options = re.findall(r"(?<=\s)--\w[\w-]*", line[match.end() :].partition("#")[0])
                found.setdefault((match[1], match[2] or ""), set()).update(options)
    return {command: options for command, options in found.items() if options - {"--help"}}


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_longer_than_a_screen(page: str) -> None:
    assert not [number for number, line in enumerate(read(page).splitlines(), start=1) if len(line) > 120]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    """Relative to the top folder or to the package."""
    named = {path for path in PATH.findall(read(page)) if path.endswith("/") or "." in path.rsplit("/", 1)[1]}
    assert not {path for path in named if not any(list(base.glob(path)) for base in (ROOT, ROOT / "megatron_infer"))}


@pytest.mark.parametrize(("command", "options"), commands().items(), ids=[" ".join(key) for key in commands()])
def test_options_of_commands_exist(
    command: tuple[str, str], options: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program, name = command
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS[program]([*name.split(), "--help"])
    assert not options - set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))


def test_every_page_is_reached_from_the_readme() -> None:
    assert not {page for page in PAGES if page != "README.md" and f"`{page}`" not in read("README.md")}


def test_tests_that_a_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", read("docs/operations.md")))
    assert len(named) >= 20
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in named if not any(f"\ndef {name}(" in source for source in sources)}
