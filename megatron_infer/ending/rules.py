"""The rules by which a fill-in-the-middle completion ends.

A rule sees the hole and the text so far (hole.py), and says where the text ends. Which rules hold in which mode, and
what of a text is certain meanwhile, is ending.py's.
"""

from __future__ import annotations

import re
from itertools import takewhile

from megatron_infer.ending.hole import Hole, Line, Seen
from megatron_infer.ending.scanner import PAIRS, TAB_COLUMNS, columns, first_word

_DISTINCTIVE_CHARACTERS = 8
_MAX_BLANK_LINES = 2
_MAX_EQUAL_LINES = 2


class Rule:
    """A reason for a text to end. Each method returns where it ends, or None: it goes on."""

    name = ""

    def on_character(self, seen: Seen) -> int | None:
        """After a character that is no line break."""
        return None

    def on_line(self, seen: Seen, line: Line) -> int | None:
        """After a line is complete, or the text has ended in it."""
        return None

    def on_finish(self, seen: Seen) -> int | None:
        """After the model has ended the text."""
        return None

    def held(self, seen: Seen) -> int:
        """Text from here on may still be cut by this rule."""
        return len(seen.text)


class OneLine(Rule):
    """One line; an empty one before it does not count, and the line break stays where the hole needs it."""

    name = "line"

    def on_line(self, seen: Seen, line: Line) -> int | None:
        is_skipped = line.number == 0 and line.is_blank and not seen.hole.is_inside_line
        if line.is_last or is_skipped:
            return None
        return line.after if seen.hole.is_whole_lines else line.end


class RestOfLine(Rule):
    """The first line ends with what follows the cursor on its line."""

    name = "rest-of-line"

    def __init__(self, hole: Hole) -> None:
        self.rest = hole.rest if hole.is_inside_line else ""
        # Brackets alone may be the text's own: Closer counts those.
        self.tail = "" if set(self.rest) & PAIRS.keys() and not re.search(r"\w", self.rest) else self.rest.strip()

    def on_line(self, seen: Seen, line: Line) -> int | None:
        own = seen.text[line.start : line.end].rstrip()
        end = self.without_tails(own, len(own))
        return end if line.number == 0 and end < len(own) else None

    def without_tails(self, own: str, end: int) -> int:
        """Where a first line that ends here ends without what follows the cursor."""
        while self.tail and own[:end].rstrip().endswith(self.tail):
            end = len(own[:end].rstrip()) - len(self.tail)
        return end

    def held(self, seen: Seen) -> int:
        own = seen.line.rstrip()
        if not self.rest or not seen.is_first_line:
            return len(seen.text)
        starts = range(max(0, len(own) - len(self.rest)), len(own) + 1)
        begun = [i for i in starts if self.rest.startswith(own[i:]) or self.tail.startswith(own[i:])]
        return min(self.without_tails(own, i) for i in begun)


class Closer(Rule):
    """A bracket or string is closed that the suffix closes already."""

    name = "closer"

    def __init__(self, rest_of_line: RestOfLine) -> None:
        self._rest_of_line = rest_of_line

    def on_character(self, seen: Seen) -> int | None:
        end = self._end(seen)
        return self._rest_of_line.without_tails(seen.text, end) if end is not None and seen.is_first_line else end

    def held(self, seen: Seen) -> int:
        until = seen.hole.until if seen.hole.suffix_closes_string else ""
        begun = (size for size in range(len(until)) if seen.text.endswith(until[:size]))
        return len(seen.text) - max(begun, default=0)

    def _end(self, seen: Seen) -> int | None:
        hole = seen.hole
        if hole.suffix_closes_string and not seen.scanner.until:
            return len(seen.text) - len(hole.until)
        if len(seen.scanner.closed) <= hole.num_closes:
            return None
        own = seen.line
        if seen.is_first_line and hole.is_inside_line:
            ends = range(len(hole.rest), 0, -1)
            overlap = next((end for end in ends if own.endswith(hole.rest[:end])), 1)
            return len(seen.text) - overlap
        if own[:-1].strip() or seen.is_first_line or hole.is_inside_line:
            return len(seen.text) - 1
        repeats = 1 in seen.run and len(hole.below) > 1 and hole.below[1].lstrip()[0] == own[-1]
        return seen.run[1] if repeats else seen.start


class LineBelow(Rule):
    """The text repeats the suffix: its first line and what follows that, or two later lines.

    A first line that occurs once is taken for the suffix's as soon as it is all of it, or the line after agrees.
    """

    name = "line-below"

    def __init__(self, hole: Hole) -> None:
        self.below = [_comparable(line) for line in hole.below]
        first = self.below[0].strip() if self.below else ""
        others = [line.strip() for line in (*map(_comparable, hole.above), *self.below)]
        self.is_distinctive = len(first) >= _DISTINCTIVE_CHARACTERS and others.count(first) == 1

    def on_character(self, seen: Seen) -> int | None:
        """A line that closes more than the text may cannot be completed: it is the suffix's if it begins as that."""
        hole, own = seen.hole, seen.line
        if len(seen.scanner.closed) <= hole.num_closes or (seen.is_first_line and not hole.is_whole_lines):
            return None
        is_below = bool(hole.below) and hole.below[0].startswith(own) and re.search(r"\w", own)
        return seen.start if is_below else None

    def on_line(self, seen: Seen, line: Line) -> int | None:
        shown = _comparable(line.shown)
        if not shown:
            return None
        has_word = re.search(r"\w", shown)
        indices = [j for j, other in enumerate(self.below) if shown == other and (has_word or j in seen.run)]
        started = {j + 1: line.start for j in indices}
        for j in indices:
            if j == 0 and (line.is_last or (self.is_distinctive and len(self.below) == 1)):
                return line.start
            if j in seen.run:
                if j == 1:
                    return seen.run[j]
                if any(fit <= seen.run[j] for fit in seen.fits):
                    return seen.last_fit(seen.run[j])
        if 0 in indices and (self.is_distinctive or len(self.below) == 1):
            seen.mark_doubt(line.start)
        seen.run = started
        return None

    def on_finish(self, seen: Seen) -> int | None:
        return seen.run.get(1) if len(self.below) == 1 else None

    def held(self, seen: Seen) -> int:
        return min(seen.run.values(), default=len(seen.text))


def _comparable(line: str) -> str:
    """Models often indent by spaces in a file that has tabs, and the reverse."""
    return line.rstrip(" \t,;").expandtabs(TAB_COLUMNS)


class Leave(Rule):
    """The text leaves the block that the hole is in.

    That is: the function, by a line that stands less deep; a block that nothing below continues, by one after `return`;
    or a brace, by closing the one that the prefix's last line has opened, or all where nothing follows. `else` and its
    like go on.
    """

    name = "dedent"

    def __init__(self, hole: Hole) -> None:
        self.entry: int | None = None
        self.limit = 0
        self.opens = hole.syntax.opens_block(hole.head)
        self.is_indented = hole.syntax.is_indented
        self.has_brace = hole.head.rstrip().endswith("{")
        self.end: int | None = None
        self.decided = -1
        if hole.head.strip():
            self._enter(hole, columns(hole.head) + self.opens)

    def _enter(self, hole: Hole, entry: int) -> None:
        """The text begins with this indentation: a line of less than `limit` leaves."""
        self.entry, syntax = entry, hole.syntax
        if self.opens and hole.columns_below is None:
            self.limit = entry
            return
        level, limit = entry, min(entry, 1)
        for line in reversed(hole.above):
            if columns(line) < level:
                level = columns(line)
                if first_word(line) in syntax.types:
                    break
                if syntax.declares_function(line):
                    limit = level + 1
        if hole.columns_below is not None and syntax.declares_function(hole.below[0]):
            limit = max(limit, hole.columns_below + 1)
        self.limit = min(entry, limit)

    def on_character(self, seen: Seen) -> int | None:
        if self.decided == len(seen.lines) or seen.line.isspace():
            return None
        own = seen.line
        word, syntax = first_word(own), seen.hole.syntax
        telling = (*syntax.continues, *syntax.closes)
        if seen.starts_in_parentheses or columns(own) >= self.limit:
            telling += syntax.declares
        if word and own.endswith(word) and any(w.startswith(word) for w in telling):
            return None  # the word may become one that decides
        return self._decide(seen, own)

    def on_line(self, seen: Seen, line: Line) -> int | None:
        end = None if line.is_blank or self.decided == line.number else self._decide(seen, line.shown)
        scanner, hole = seen.scanner, seen.hole
        if scanner.closed and not (scanner.open or line.is_blank or self.is_indented) and line.number:
            has_all = not hole.below and len(scanner.closed) == hole.num_closes and line.shown.lstrip()[0] in PAIRS
            if self.has_brace or has_all:
                self.end = line.end
        return end

    def _decide(self, seen: Seen, line: str) -> int | None:
        """Whether the text ends before this line, of which the first word is known."""
        self.decided = len(seen.lines)
        hole, syntax = seen.hole, seen.hole.syntax
        if seen.is_first_line and hole.head.strip():
            return None
        here, word = columns(hole.head * seen.is_first_line + line), first_word(line)
        if self.entry is None:
            self._enter(hole, here)
            return None
        is_function = here < self.entry and syntax.declares_function(line)
        if seen.starts_in_string or (seen.starts_in_parentheses and not is_function):
            return None
        end, self.end = self.end, None
        if end is not None and word not in syntax.continues:
            return end
        if here < self.entry and hole.below:
            seen.mark_doubt(seen.start)
        previous = seen.last_shown()
        if first_word(previous) in syntax.leaves and here == columns(previous):
            return seen.last_fit(seen.start)
        if not is_function and (here >= self.limit or (word in syntax.continues and here == self.limit - 1)):
            return None
        if line.lstrip()[0] in PAIRS:
            self.limit = here  # a closer that is due, or Closer would have ended the text
            return None
        if word in syntax.closes and not (here == hole.columns_below and first_word(hole.below[0]) in syntax.closes):
            return None
        return seen.last_fit(seen.start)


class Blank(Rule):
    """Two blank lines, or one at the top level of a file that ends here."""

    name = "blank"

    def on_line(self, seen: Seen, line: Line) -> int | None:
        if line.is_last or not line.is_blank or seen.scanner.until or seen.scanner.open:
            return None
        blank = 1 + sum(1 for _ in takewhile(lambda earlier: earlier.is_blank, reversed(seen.lines)))
        last = seen.last_shown()
        if blank == len(seen.lines) + 1:
            return 0 if blank > _MAX_BLANK_LINES else None
        is_top_level = not seen.hole.below and not columns(last)
        if blank < (1 if is_top_level else _MAX_BLANK_LINES):
            return None
        return seen.last_fit(seen.lines[-blank].after if seen.hole.is_whole_lines else seen.lines[-blank].end)


class Repeat(Rule):
    """The third equal line running; the second stays."""

    name = "repeat"

    def on_line(self, seen: Seen, line: Line) -> int | None:
        equal = [earlier.shown == line.shown for earlier in seen.lines[-_MAX_EQUAL_LINES:]]
        return line.start if line.shown and len(equal) == _MAX_EQUAL_LINES and all(equal) else None
