"""Text as its tokens come: what is certain is handed out, half a character or stop string is not yet."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from megatron_infer.text.tokenizer import Tokenizer

_BARE_NEWLINE = re.compile(r"(?<!\r)\n")


class TextStream:
    """Turns token ids into text as they come, cut at the first stop string.

    Joined, the pieces of `feed` and `finish` are exactly `tokenizer.decode(ids)` up to the earliest start of a stop
    string, wherever tokens begin and end. A newline in a stop string is any line end, LF or CRLF. Held back are only
    unfinished UTF-8 and text that may begin a stop string.
    `stopped`: the stop string that ended the text, or None. skip_bytes: the first ones are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_bytes: int = 0) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a list of non-empty strings, not {stop!r}")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        # Shortest first: of two that start at one place, the shorter one is complete earlier.
        self._stop = sorted(set(stop), key=lambda s: (len(s), s))
        self._patterns = {s: re.compile("\r?\n".join(map(re.escape, _BARE_NEWLINE.split(s)))) for s in self._stop}
        self._in_lines = [s.replace("\r\n", "\n") for s in self._stop]
        self._reach = max((len(s) + s.count("\n") for s in self._stop), default=0)
        """As long as the longest match."""
        self._skip_bytes = skip_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token; empty after a stop string."""
        data = self._tokenizer.token_bytes(token_id)
        skipped, self._skip_bytes = self._skip_bytes, max(0, self._skip_bytes - len(data))
        return self._take(self._utf8.decode(data[skipped:]), final=False)

    def finish(self) -> str:
        """What was held back, once no token follows; a character that has only begun is left out."""
        return self._take("", final=True)

    def _take(self, text: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        if not self._stop:
            return text
        self._held += text
        matches = [(m.start(), s) for s, pattern in self._patterns.items() if (m := pattern.search(self._held))]
        end = len(self._held) if final else self._first_open_start()
        if matches and (match := min(matches, key=lambda m: m[0]))[0] <= end:
            end, self.stopped = match
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    def _first_open_start(self) -> int:
        """First place in the held text where a stop string may have begun without having ended; else its length."""
        for at in range(max(0, len(self._held) - self._reach + 1), len(self._held)):
            begun = self._held[at:].replace("\r\n", "\n")
            if any(_may_become(begun, s) for s in self._in_lines):
                return at
        return len(self._held)


def _may_become(begun: str, stop: str) -> bool:
    """Whether text that ends with `begun` may go on to have `stop` from there; both with LF for CRLF."""
    return (stop.startswith(begun) and len(stop) > len(begun)) or (
        begun.endswith("\r") and stop.startswith(begun[:-1] + "\n")
    )


class WholeLines:
    """Text that a limit cuts back to the end of a line, though not before one that is not blank. As an Ending is used.

    Held back is the line in progress, but for the first that is not blank.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._text, self._num_emitted = "", 0

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that no limit takes back."""
        self._text += text
        start, self._num_emitted = self._num_emitted, self._line_end()
        return self._text[start : self._num_emitted], self.reason

    def finish(self, is_complete: bool) -> tuple[str, str | None]:
        """The last line; without it ("unfinished") if a limit has cut it."""
        if not is_complete and self._num_emitted < len(self._text):
            self._num_emitted, self.reason = len(self._text), "unfinished"
        return self._text[self._num_emitted :], self.reason

    def _line_end(self) -> int:
        num_blank = len(self._text) - len(self._text.lstrip())
        return self._text.rfind("\n", num_blank) + 1 or len(self._text)
