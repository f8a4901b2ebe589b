"""Token healing: a prefix may end inside what the model would write as one token. Its last tokens are then taken out of
the prompt, and the answer's first tokens are bound to write their text anew, in whatever tokens the model prefers.

Works on bytes, so a token may begin or end inside a character. Knows no prompts' layout and no logits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_infer.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]


class TokenTable:
    """A vocabulary's tokens in the order of their bytes, without control tokens. Sorts 150,000 of them when made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text_of = tokenizer.token_bytes
        with_text = ((self.text_of(i), i) for i in range(tokenizer.vocab_size) if i not in tokenizer.control_ids)
        pairs = sorted(pair for pair in with_text if pair[0])
        self._texts, self._ids = [text for text, _ in pairs], np.array([i for _, i in pairs], dtype=np.int64)
        self.longest_bytes = max(map(len, self._texts), default=0)

    def starting_with(self, head: bytes) -> Ids:
        """Of the tokens that are `head` or go on from it, the shortest first."""
        return self._ids[bisect_left(self._texts, head) : bisect_left(self._texts, head + b"\xff" * self.longest_bytes)]

    def equal_to(self, text: bytes) -> Ids:
        """Of the tokens that are just `text`: bytes have several in some vocabularies."""
        return self._ids[bisect_left(self._texts, text) : bisect_left(self._texts, text + b"\0")]


class Healing:
    """The `text` with which an answer has to begin, because it was taken out of the prompt; a Guide of the engine."""

    def __init__(self, text: bytes, table: TokenTable) -> None:
        self.text, self._text_of = text, table.text_of
        self._allowed: list[Ids] = []
        """By how much of the text is written. A token that leads to where no other fits is not allowed."""
        for at in reversed(range(len(text))):
            fitting = [table.starting_with(text[at:])]
            for end in range(at + 1, len(text)):
                if len(self._allowed[len(text) - 1 - end]):
                    fitting.append(table.equal_to(text[at:end]))
            self._allowed.append(np.sort(np.concatenate(fitting)))
        self._allowed.reverse()

    def allowed(self, new_ids: Sequence[int]) -> Ids | None:
        """Ids of which one must follow `new_ids`; None once the text is written, or behind a draft of another one."""
        written = b""
        for token_id in new_ids:
            written += self._text_of(token_id)
            if not self.text.startswith(written):
                return None
        return self._allowed[len(written)] if len(written) < len(self.text) else None


def heal(ids: Sequence[int], prefix: range, table: TokenTable) -> tuple[list[int], Healing | None]:
    """Take the prefix's last tokens out of a prompt: as many as some token of the vocabulary begins with, and goes on.

    Args:
        ids: the prompt, of which at least one token stays. prefix: where in it the prefix's text is.
    Returns:
        the prompt, and what the answer must begin with; None where no token goes on from where the prefix ends.
    """
    tail, text, start = b"", b"", prefix.stop
    for at in reversed(prefix[1:] if len(prefix) == len(ids) else prefix):
        tail = table.text_of(ids[at]) + tail
        if len(tail) >= table.longest_bytes:
            break
        if len(table.starting_with(tail)) > len(table.equal_to(tail)):
            text, start = tail, at
    healed = [*ids[:start], *ids[prefix.stop :]]
    return healed, Healing(text, table) if text else None
