"""The hole that a fill-in-the-middle completion fills, and the text that grows in it.

Hole is what prefix and suffix say about the text between them; Seen is the text so far and where the suffix fits. Both
are what the rules (rules.py) look at; nothing here decides where a text ends.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from megatron_infer.ending.scanner import PAIRS, Scanner, Syntax, columns, first_word

_REACH = 1 << 15
"""Characters on either side of the cursor that are looked at."""
_CLOSING = re.compile(r"[\s)\]}>\"'`;,:]*")


class Hole:
    """What prefix and suffix say about the text between them.

    head, rest: the cursor's line before and after it. above: lines before that line that are not blank, the nearest
    last. below: lines after it that are not blank; `rest` is the first of them where `is_whole_lines`, that is where
    the text needs a line break of its own before the suffix. is_inside_line: text follows on the cursor's line.
    until, open: the string or comment, and the brackets, that the cursor is in. num_closes, num_opens: how many
    brackets the text has to close beyond its own, and to leave open.
    """

    def __init__(self, prefix: str, suffix: str, syntax: Syntax) -> None:
        near, suffix = prefix[-_REACH:], suffix[:_REACH]
        *above, self.head = near.split("\n")
        self.rest, *below = suffix.split("\n")
        # A prefix without the line break that the suffix's indentation asks for: a hole of whole lines as well.
        is_glued = bool(self.head.strip()) and columns(self.rest) > 1
        self.is_whole_lines = bool(self.rest.strip()) and (not self.head or is_glued)
        self.is_inside_line = bool(self.rest.strip()) and not self.is_whole_lines
        self.above = [line.rstrip() for line in above if line.strip()]
        self.below = [line.rstrip() for line in ([self.rest, *below] if self.is_whole_lines else below) if line.strip()]
        self.columns_below = columns(self.below[0]) if self.below else None
        self.syntax = syntax
        self._scanner = Scanner(syntax)
        self._scanner.feed(near)
        self.until, self.open = self._scanner.until, self._scanner.open
        after = self.scanner()
        after.feed("\n" * self.is_whole_lines + suffix)
        self.num_closes, self.num_opens = self._balance(after.closed)
        is_quote = self.until in self.syntax.quotes
        self.suffix_closes_string = (
            bool(self.until)
            and self.until != "\n"
            and (self.rest.startswith(self.until) if is_quote else self.until in suffix and not after.until)
        )

    def scanner(self) -> Scanner:
        """A scanner that goes on at the cursor, with no bracket open."""
        scanner = copy.copy(self._scanner)
        scanner.open, scanner.closed = [], []
        return scanner

    def mode(self) -> str:
        """`line` or `block`: within a string or a line comment, or before other code of the line, only a line fits."""
        is_in_line = self.until == "\n" or (self.until != "" and self.until in self.syntax.quotes)
        return "line" if is_in_line or (self.is_inside_line and not _CLOSING.fullmatch(self.rest)) else "block"

    def _balance(self, closed: list[tuple[str, int | None]]) -> tuple[int, int]:
        """num_closes and num_opens, from the brackets that the suffix closes, the nearest first.

        Each is paired with one that the prefix leaves open: of the same kind and, for one that begins its line, from a
        line of the same indentation. What stands open within that pair is left to the text to close.
        """
        open_, num_closes, num_opens = list(self.open), 0, 0
        entry = columns(self.head if self.head.strip() else self.above[-1] if self.above else "")
        for closing, column in closed:
            pairs = [i for i, (opening, at) in enumerate(open_) if opening == PAIRS[closing] and column in (None, at)]
            if pairs:
                num_closes += len(open_) - 1 - pairs[-1]
                del open_[pairs[-1] :]
            elif column is not None and len(open_) > 1 and open_[-2][1] < column < open_[-1][1]:
                open_.pop()  # its line is a continuation, which stands deeper than the statement
            elif column is None or column >= entry:
                num_opens += 1
            else:
                break  # closes what the prefix, cut at its start, no longer shows
        return num_closes + len(open_), num_opens


@dataclass(frozen=True)
class Line:
    """A line of the text: text[start:end], its break excluded; text[start:after] with it.

    shown: as it stands in the file, the prefix's part included and white space at the end excluded.
    """

    number: int
    start: int
    end: int
    after: int
    shown: str
    is_blank: bool
    is_last: bool


class Seen:
    """The text so far, and what the rules have found out about it.

    lines: those that are complete; `start`, `starts_in_...`: where and in what the one in progress begins. fits: ends
    of lines after which the suffix can follow. doubt: what comes after it counts only if the text arrives at the
    suffix, or ends by itself. run: the text repeats lines of the suffix: index of the one that has to come next ->
    where the repeated ones start.
    """

    def __init__(self, hole: Hole) -> None:
        self.hole, self.scanner = hole, hole.scanner()
        self.text = ""
        self.lines: list[Line] = []
        self.fits: list[int] = []
        self.doubt: int | None = None
        self.run: dict[int, int] = {}
        self._begin_line(0)

    @property
    def line(self) -> str:
        """The line in progress."""
        return self.text[self.start :]

    @property
    def is_first_line(self) -> bool:
        return not self.lines

    def last_shown(self) -> str:
        """The last complete line of the text that is not blank, or ""."""
        return next((line.shown for line in reversed(self.lines) if line.shown), "")

    def end_line(self, end: int, is_last: bool) -> Line:
        """The line in progress, which ends here."""
        shown = (self.hole.head * self.is_first_line + self.text[self.start : end]).rstrip()
        is_blank = not self.text[self.start : end].strip()
        return Line(len(self.lines), self.start, end, len(self.text), shown, is_blank, is_last)

    def next_line(self, line: Line) -> None:
        """Begin another line after this one."""
        if not line.is_blank and self._fits(line):
            self.fits.append(line.after if self.hole.is_whole_lines else line.end)
            if not self.last_shown() and self.hole.syntax.opens_block(line.shown):
                self.mark_doubt(line.after)  # the suffix is its body, so a body of the text's own may be none
        self.lines.append(line)
        self._begin_line(line.after)

    def _begin_line(self, start: int) -> None:
        self.start = start
        self.starts_in_string, self.starts_in_parentheses = bool(self.scanner.until), self._is_in_parentheses()

    def _is_in_parentheses(self) -> bool:
        """Whether lines may stand anyhow: in parentheses, or in any bracket where braces make no blocks."""
        still_open = self.hole.open[: max(0, len(self.hole.open) - len(self.scanner.closed))] + self.scanner.open
        return bool(still_open) and (still_open[-1][0] != "{" or self.hole.syntax.is_indented)

    def mark_doubt(self, start: int) -> None:
        """What begins here is in doubt; an earlier doubt stays."""
        if self.fits and self.doubt is None:
            self.doubt = start

    def last_fit(self, start: int) -> int:
        """The last place up to `start` where the suffix fits and nothing is in doubt; `start` if there is none."""
        limit = start if self.doubt is None else min(start, self.doubt)
        return max((fit for fit in self.fits if fit <= limit), default=start)

    def _fits(self, line: Line) -> bool:
        """Whether the suffix can follow this line: brackets closed, and its indentation one that stands open."""
        hole, scanner, syntax = self.hole, self.scanner, self.hole.syntax
        if scanner.until or hole.until:
            return scanner.until == hole.until
        opens = syntax.opens_block(line.shown)
        if hole.columns_below is None:
            return not scanner.open and not opens
        if len(scanner.open) != hole.num_opens or len(scanner.closed) != hole.num_closes:
            return False
        if self._is_in_parentheses() and not scanner.open:
            return True
        here, below, follower = columns(line.shown), hole.columns_below, hole.below[0].lstrip()
        if opens:
            return below > here
        if follower[0] in PAIRS:
            return below <= here
        if first_word(follower) in syntax.continues or first_word(line.shown) in syntax.leaves:
            return below < here
        return below <= here and (not syntax.is_indented or below in self._levels(line))

    def _levels(self, line: Line) -> set[int]:
        """The indentations of the blocks that are open at this line."""
        levels = [columns(line.shown)]
        for shown in (*(earlier.shown for earlier in reversed(self.lines)), *reversed(self.hole.above)):
            if levels[-1] == 0:
                break
            if shown and columns(shown) < levels[-1]:
                levels.append(columns(shown))
        return set(levels)
