"""Code as text: what languages look like (languages.json), and a scanner of brackets, strings and comments.

Works a character at a time, on any part of a file. Knows no grammar, no cursor and no completion.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PAIRS = {")": "(", "]": "[", "}": "{"}

TAB_COLUMNS = 4
_WORD = re.compile(r"\s*(@?\w*)")


@dataclass(frozen=True)
class Syntax:
    """What the rules know of a language; the default is for one that is not known.

    comments: what begins a line comment. quotes: characters around strings that end with their line. long: what opens
    and closes strings and comments of several lines. openers: how a line ends that opens a block, where no bracket
    does; blocks: how it begins. The rest are first words of a line: continues (`else`) carries a statement on, closes
    (`end`) ends a block, declares a function, types a class; what follows on leaves (`return`) is not reached.
    """

    comments: tuple[str, ...] = ()
    quotes: str = '"'
    long: tuple[tuple[str, str], ...] = ()
    openers: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    continues: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    declares: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    @functools.cached_property
    def special_characters(self) -> frozenset[str]:
        """All that begin, end or escape something; none of them is a letter."""
        return frozenset("\n\\([{)]}'").union(self.quotes, *self.comments, *(a + b for a, b in self.long))

    @property
    def is_indented(self) -> bool:
        """Whether indentation alone says where blocks end."""
        return ":" in self.openers

    def opens_block(self, line: str) -> bool:
        """Whether the lines after this one stand deeper."""
        return line.rstrip().endswith((*PAIRS.values(), *self.openers)) or first_word(line) in self.blocks

    def declares_function(self, line: str) -> bool:
        """Whether a function begins here, or what is written above it (`@decorator`)."""
        word = first_word(line)
        return word in self.declares or (word.startswith("@") and "@" in self.declares)


def syntax_of(language: str) -> Syntax:
    """By the language's key or name in languages.json, or another usual name, in any case of letters."""
    return _syntaxes().get(language.lower(), Syntax())


@functools.cache
def _syntaxes() -> dict[str, Syntax]:
    table: dict[str, Syntax] = {}
    folder = Path(__file__).parent
    for key, entry in json.loads((folder.parent / "languages.json").read_text(encoding="utf-8")).items():
        mark, end = entry["open"].strip(), entry["close"].strip()
        syntax = Syntax(long=((mark, end),)) if end else Syntax(comments=(mark,))
        table |= dict.fromkeys((key, entry["name"].lower()), syntax)
    for entry in json.loads((folder / "languages.json").read_text(encoding="utf-8")):
        syntax = _parse(entry)
        table |= dict.fromkeys(entry["names"], syntax)
    return table


def _parse(entry: dict[str, Any]) -> Syntax:
    words = {f.name: tuple(entry[f.name].split()) for f in fields(Syntax) if isinstance(entry.get(f.name), str)}
    lists = {name: tuple(entry.get(name, ())) for name in ("comments", "openers")}
    longest_first = sorted(map(tuple, entry["long"]), key=lambda pair: -len(pair[0]))
    return Syntax(**{**words, **lists, "quotes": entry["quotes"], "long": tuple(longest_first)})


def columns(line: str) -> int:
    """Columns of the white space that a line begins with; a tab goes to the next multiple of 4."""
    count = 0
    for character in line:
        if character not in " \t":
            break
        count += TAB_COLUMNS - count % TAB_COLUMNS if character == "\t" else 1
    return count


def first_word(line: str) -> str:
    """The word that a line begins with after its indentation, or ""; an `@` before it belongs to it."""
    match = _WORD.match(line)
    assert match
    return match[1]


class Scanner:
    """Brackets, strings and comments of a text, a character at a time.

    until: what ends the string or comment that the text is in ("\\n": a line comment), "" in code. open: brackets that
    stand open, as (bracket, columns of its line). closed: closing brackets without an opening one, as (bracket, columns
    where its line begins with it, else None).
    """

    def __init__(self, syntax: Syntax, until: str = "") -> None:
        self.until = until
        self.open: list[tuple[str, int]] = []
        self.closed: list[tuple[str, int | None]] = []
        self._syntax = syntax
        self._special = syntax.special_characters
        self._tail = " "  # a line's start counts as a space, which some comments need before them
        self._margin = ""
        self._is_margin = True
        self._is_escaped = False

    def feed(self, text: str) -> None:
        """Take in text."""
        for character in text:
            if character in self._special or (self._is_margin and character in " \t"):
                self._take(character)
            else:  # most of a text
                self._tail, self._is_margin, self._is_escaped = character, False, False

    def _take(self, character: str) -> None:
        if character == "\n":
            if self.until == "\n" or self.until in self._syntax.quotes:
                self.until = ""
            self._tail, self._margin, self._is_margin, self._is_escaped = " ", "", True, False
            return
        self._tail = self._tail[-3:] + character
        is_first, self._is_margin = self._is_margin, self._is_margin and character.isspace()
        if self._is_margin:
            self._margin += character
        elif self._is_escaped:
            self._is_escaped = False
        elif self.until:
            self._take_inside(character)
        elif not self._enters(character) and character in "([{)]}" and not self._is_literal():
            self._take_bracket(character, is_first)

    def _take_inside(self, character: str) -> None:
        if character == "\\" and self.until[0] in "\"'`":
            self._is_escaped = True
        elif self._tail.endswith(self.until):
            self.until = ""
        elif self.until == "\n":
            self._enters_long()  # Lua's --[[ begins like its line comment

    def _enters_long(self) -> bool:
        for opening, closing in self._syntax.long:
            if self._tail.endswith(opening):
                if not self.until:  # brackets that have turned out to begin a comment
                    del self.open[len(self.open) - sum(character in "([{" for character in opening[:-1]) :]
                self.until, self._tail = closing, ""
                return True
        return False

    def _enters(self, character: str) -> bool:
        if self._enters_long():
            return True
        if self._tail.endswith(self._syntax.comments):
            self.until = "\n"
        elif character in self._syntax.quotes and not self._is_literal():
            self.until = character
        return bool(self.until)

    def _is_literal(self) -> bool:
        """Whether this is a character in single quotes, where strings have none: Rust's '(' beside its lifetimes."""
        return "'" not in self._syntax.quotes and self._tail[-2:-1] == "'"

    def _take_bracket(self, character: str, is_first: bool) -> None:
        if character not in PAIRS:
            self.open.append((character, columns(self._margin)))
        elif self.open and self.open[-1][0] == PAIRS[character]:
            self.open.pop()
        elif not self.open:
            self.closed.append((character, columns(self._margin) if is_first else None))
