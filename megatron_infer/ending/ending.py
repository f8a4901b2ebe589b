"""When a fill-in-the-middle completion is over: text rules, exact and deterministic, while the text comes in pieces.

Owns the modes (raw, line, block, auto) and what of a growing text is certain. The rules are rules.py's, what
prefix and suffix say is hole.py's. Knows no tokens, no stop strings and no engine.
"""

from __future__ import annotations

from megatron_infer.checks import ENDINGS, one_of
from megatron_infer.ending.hole import Hole, Seen
from megatron_infer.ending.rules import Blank, Closer, Leave, LineBelow, OneLine, Repeat, RestOfLine, Rule
from megatron_infer.ending.scanner import syntax_of


class Ending:
    """Where one completion ends; joined, what `feed` and `finish` return is the same for any division into pieces.

    prefix, suffix: the code around the cursor. language: its key or name in languages.json; of one that is not known
    only double quotes and brackets are understood. mode: raw (no rule), line (one line), block, or auto, which chooses
    between those two by prefix and suffix. Raises ValueError for another mode.
    """

    def __init__(self, prefix: str, suffix: str, language: str = "", mode: str = "auto") -> None:
        one_of("mode", mode, ENDINGS)
        self._hole = hole = Hole(prefix, suffix, syntax_of(language))
        self.mode = hole.mode() if mode == "auto" else mode
        self.reason: str | None = None
        rest_of_line = RestOfLine(hole)
        self._rules: list[Rule] = []
        if self.mode == "line":
            self._rules = [rest_of_line, Closer(rest_of_line), OneLine()]
        elif self.mode == "block":
            self._rules = [rest_of_line, Closer(rest_of_line), LineBelow(hole), Leave(hole), Blank(), Repeat()]
        self._seen = Seen(hole)
        self._end: int | None = None
        self._num_emitted = 0

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take in the next piece; the text that is certain now, and the name of the rule that has ended it, or None."""
        for character in text:
            if self._end is not None:
                break
            self._take(character)
        return self._emit()

    def finish(self, is_complete: bool = True) -> tuple[str, str | None]:
        """The text is over, whether by the model's end token or, not `is_complete`, by a limit: the rest, as by `feed`.

        Of a block that a limit cuts, what follows the last place where the suffix fits is left out ("unfinished").
        """
        seen = self._seen
        if self._end is None and seen.line:
            self._ask_line(len(seen.text), is_last=True)
        if self._end is None and is_complete:
            self._ask([rule.on_finish(seen) for rule in self._rules])
        if self._end is None:
            self._end = len(seen.text)
            if not is_complete and self.mode == "block" and seen.last_fit(self._end) < self._end:
                self._end, self.reason = seen.last_fit(self._end), "unfinished"
        return self._emit()

    def _take(self, character: str) -> None:
        seen, head = self._seen, self._hole.head
        if character == " " and self._rules and not seen.text and head.strip() and head[-1] in " \t":
            return  # the prefix has this space
        seen.text += character
        seen.scanner.feed(character)
        if character == "\n":
            self._ask_line(len(seen.text) - (2 if seen.text.endswith("\r\n") else 1), is_last=False)
        else:
            self._ask([rule.on_character(seen) for rule in self._rules])

    def _ask_line(self, end: int, is_last: bool) -> None:
        line = self._seen.end_line(end, is_last)
        self._ask([rule.on_line(self._seen, line) for rule in self._rules])
        if not is_last and self._end is None:
            self._seen.next_line(line)

    def _ask(self, ends: list[int | None]) -> None:
        found = [(end, index) for index, end in enumerate(ends) if end is not None]
        if found:
            self._end, index = min(found)
            self.reason = self._rules[index].name

    def _emit(self) -> tuple[str, str | None]:
        start, self._num_emitted = self._num_emitted, max(self._num_emitted, self._certain())
        return self._seen.text[start : self._num_emitted], self.reason

    def _certain(self) -> int:
        """How much of the text no rule can take back. White space at its end goes unless something follows there."""
        seen, hole = self._seen, self._hole
        if not self._rules:
            return len(seen.text)
        end = self._end
        if end is None:
            end = min(rule.held(seen) for rule in self._rules)
            if self.mode == "block":
                end = min(seen.last_fit(end), end) if any(fit <= end for fit in seen.fits) else 0
        kept = len(seen.text[:end].rstrip())
        needs_space = self._end is not None and (hole.is_inside_line or hole.is_whole_lines)
        return end if needs_space and kept else kept


def find_end(
    prefix: str, suffix: str, text: str, language: str = "", mode: str = "auto", *, is_complete: bool = True
) -> tuple[str, str | None]:
    """What of a whole `text` belongs between prefix and suffix, and the name of the rule that ended it; as Ending."""
    ending = Ending(prefix, suffix, language, mode)
    first, _ = ending.feed(text)
    rest, reason = ending.finish(is_complete)
    return first + rest, reason
