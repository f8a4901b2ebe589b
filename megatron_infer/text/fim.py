"""Fill-in-the-middle prompts: FimPrompt -> token ids, laid out as the model family was trained.

Owns the families (data: fim_templates.json), header lines, PSM and SPM order. What a long prompt loses is planned in
fim_cut.py. Text becomes ids segment by segment, never parsed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_infer.languages import language_at
from megatron_infer.text.fim_cut import REACHES, cut_at_step, plan_cut, plan_reach
from megatron_infer.text.fim_prompt import FimOptions, FimPrompt, check_size
from megatron_infer.text.tokenizer import Tokenizer

__all__ = ["FimEncoding", "FimFormat", "FimOptions", "FimPrompt", "load_fim", "load_preset"]

log = logging.getLogger("megatron_infer")


@dataclass(frozen=True)
class FimEncoding:
    """A prompt's token ids, the ids and strings that end its completion, how many tokens of either side did not fit.

    Text too far from the cursor to be tokenized at all is counted as one token per 4 characters. `prefix`: where in
    `ids` the prefix lies, its header included.
    """

    ids: list[int]
    stop_token_ids: frozenset[int]
    dropped_prefix_tokens: int = 0
    dropped_suffix_tokens: int = 0
    stop: tuple[str, ...] = ()
    prefix: range = range(0)


def load_preset(name: str) -> FimOptions:
    """A named set of options from fim_templates.json."""
    presets = _read_templates()["presets"]
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; known are {', '.join(presets)}")
    return FimOptions(**presets[name])


def load_fim(name: str | None, tokenizer: Tokenizer) -> FimFormat:
    """The format of a family by name, or, with a note in the log, of the first whose tokens the tokenizer has."""
    families = _read_templates()["families"]
    if name is not None:
        if name not in families:
            raise ValueError(f"there is no FIM family {name!r}; known are {', '.join(families)}")
        return FimFormat(name, families[name], tokenizer)
    with_tokens = {family: data["tokens"].values() for family, data in families.items() if data["tokens"]}
    found = [f for f, pieces in with_tokens.items() if all(tokenizer.id_of(piece) is not None for piece in pieces)]
    if not found:
        looked_for = "; ".join(f"{family}: {' '.join(pieces)}" for family, pieces in with_tokens.items())
        raise ValueError(
            f"the tokenizer has the control tokens of no known FIM family ({looked_for}); name the family with "
            'fim=..., or use fim="none" to continue a prefix without a suffix'
        )
    others = f"; it has those of {', '.join(found[1:])} too" if found[1:] else ""
    log.info("FIM family: %s, by the tokenizer's control tokens%s (--fim or fim=... names another)", found[0], others)
    return FimFormat(found[0], families[found[0]], tokenizer)


def _read_templates() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(Path(__file__).with_name("fim_templates.json").read_text(encoding="utf-8"))
    return raw


class FimFormat:
    """One family's prompt layout, bound to a tokenizer.

    orders: supported orders, the default first. stop_token_ids: ids that end a completion.
    """

    def __init__(self, name: str, family: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self.name = name
        self.orders: tuple[str, ...] = tuple(family["orders"])
        self._tokenizer = tokenizer
        self._layouts: dict[str, list[str]] = {order: words.split() for order, words in family["orders"].items()}
        self._plain: list[str] = family["plain"].split()
        self._frames_empty_suffix: bool = family["empty_suffix"] == "frame"
        self._has_header = bool(family.get("comment_header"))
        self._dummy_prefix: list[str] = family.get("dummy_prefix", "").split()
        self._files: Mapping[str, Any] | None = family.get("files")
        found = {role: tokenizer.id_of(piece) for role, piece in family["tokens"].items()}
        missing = [family["tokens"][role] for role, token_id in found.items() if token_id is None]
        if tokenizer.bos_id is None and "bos" in self._plain:
            missing.append("a begin-of-sequence token")
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}, so it is not of the FIM family {name!r}")
        self._ids: dict[str, list[int]] = {role: [i] for role, i in found.items() if i is not None}
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ends = [*bos, tokenizer.eos_id, tokenizer.pad_id, *found.values(), *map(tokenizer.id_of, family["stop"])]
        self.stop_token_ids = frozenset(i for i in ends if i is not None)
        self._ids |= {"bos": bos, "bos?": bos if tokenizer.adds_bos else []}

    @property
    def takes_extra_files(self) -> bool:
        """Whether the family documents a format for other files of the repository."""
        return self._files is not None

    def encode(
        self, prompt: FimPrompt, *, budget_tokens: int | None = None, options: FimOptions | None = None
    ) -> FimEncoding:
        """Token ids of `prompt`, at most `budget_tokens` of them.

        What exceeds the budget is cut from the far ends of prefix and suffix, never from header or other files.
        Raises ValueError, with the remedy, for what cannot be laid out: an order or a suffix that the family does not
        know, other files where it has no format for them, an empty prompt, more than MAX_PROMPT_BYTES of text.
        """
        options = options or FimOptions()
        check_size(prompt)
        layout = self._layout(prompt, options)
        files, header = self._other_files(prompt, layout)
        header += self.header(prompt.path, options.header)
        if not (header or prompt.prefix or prompt.suffix):
            raise ValueError("the prompt is empty; give it a prefix, a suffix, or a path whose language is known")
        prefix, far_prefix = self._limit(prompt.prefix, options.prefix_tokens, keep_head=False)
        suffix, far_suffix = self._limit(prompt.suffix, options.suffix_tokens, keep_head=True)
        parts = {**self._ids, "files": files, "prefix": [], "suffix": []}
        num_fixed = sum(len(parts[word]) for word in layout)
        room = None if budget_tokens is None else budget_tokens - num_fixed
        parts["prefix"], dropped_prefix, parts["suffix"], dropped_suffix = self._fit(header, prefix, suffix, room)
        ids = [i for word in layout for i in parts[word]]
        start = sum(len(parts[word]) for word in layout[: layout.index("prefix")])
        where = range(start, start + len(parts["prefix"]))
        stop = tuple(self._files["stop"]) if self._files and prompt.extra_files else ()
        dropped = far_prefix + dropped_prefix, far_suffix + dropped_suffix
        return FimEncoding(ids, self.stop_token_ids, *dropped, stop, where)

    @property
    def interactive(self) -> FimOptions:
        """For typing: suffix first where the family knows it, so that it stays computed, and words are completed."""
        return FimOptions(order="spm" if "spm" in self.orders else None, token_healing=True)

    def header(self, path: str, which: str = "full") -> str:
        """Comment lines that introduce a file, or nothing where the family or the file's extension has none."""
        language = language_at(path) if self._has_header and which != "none" else None
        if language is None:
            return ""
        lines = [f"the file path is: {path}"] if which == "full" else []
        lines.append(f"the code file is written by {language.name}")
        return "".join(f"{language.open}{line}{language.close}\n" for line in lines)

    def _layout(self, prompt: FimPrompt, options: FimOptions) -> list[str]:
        order = options.order
        if order is not None and order not in self.orders:
            known = f"it knows {', '.join(self.orders)}" if self.orders else "it has none"
            raise ValueError(f"the FIM family {self.name!r} has no order {order!r}; {known}")
        if not self.orders and (prompt.suffix or options.frame_empty_suffix):
            raise ValueError(
                f"the FIM family {self.name!r} cannot take a suffix; leave the suffix empty, or name the model's family"
            )
        if self.orders and (prompt.suffix or options.frame_empty_suffix or self._frames_empty_suffix):
            return self._layouts[order or self.orders[0]]
        return self._plain

    def _encode(self, side: str, text: str) -> list[int]:
        return self._tokenizer.encode(text, dummy_prefix=side in self._dummy_prefix)

    def _other_files(self, prompt: FimPrompt, layout: list[str]) -> tuple[list[int], str]:
        """`extra_files`: ids for their place in the layout, and what is text directly before the prefix."""
        if not prompt.extra_files:
            return [], ""
        if self._files is None:
            raise ValueError(
                f"no format for extra_files is documented for the FIM family {self.name!r}; leave them out"
            )
        if not prompt.path:
            raise ValueError("with extra_files, give path too: the model must know which file it completes")
        current = {"path": prompt.path, "repository": prompt.repository}
        pieces = [(word, current) for word in self._files["start"]]
        for path, text in prompt.extra_files:
            values = {"path": path, "text": text, "lines": text if text.endswith("\n") else text + "\n"}
            pieces += [(word, values) for word in self._files["each"]]
        pieces += [(word, current) for word in self._files["current"]]
        ids: list[int] = []
        text = ""
        for word, values in pieces:
            if word in self._ids:
                ids += [*self._encode("files", text), *self._ids[word]]
                text = ""
            else:
                text += word.format(**values)
        if dict(pairwise(layout)).get("files", "prefix") == "prefix":
            return ids, text
        return ids + self._encode("files", text), ""

    def _limit(self, text: str, limit: int | None, *, keep_head: bool) -> tuple[str, int]:
        if limit is None:
            return text, 0
        ids = self._tokenizer.encode(text)
        if len(ids) <= limit:
            return text, 0
        # Half a character at an end becomes U+FFFD, as in the reference harness.
        kept = ids[:limit] if keep_head else ids[-limit:]
        cut = b"".join(map(self._tokenizer.token_bytes, kept)).decode("utf-8", "replace")
        if self._tokenizer.has_dummy_prefix:
            cut = cut.removeprefix(" ")  # as the reference harness, whose decode takes it for the dummy prefix
        return cut, len(ids) - limit

    def _fit(self, header: str, prefix: str, suffix: str, room: int | None) -> tuple[list[int], int, list[int], int]:
        """Prefix ids, how many were dropped, suffix ids, how many were dropped, with both in `room` tokens."""
        if room is None:
            return self._encode("prefix", header + prefix), 0, self._encode("suffix", suffix), 0
        for reach in REACHES:
            far_prefix, far_suffix = plan_reach(len(prefix), len(suffix), max(1, room) * reach)
            before = self._encode("prefix", header + prefix[far_prefix:])
            after = self._encode("suffix", suffix[: len(suffix) - far_suffix])
            if all(len(ids) > room or not far for ids, far in ((before, far_prefix), (after, far_suffix))):
                break
        dropped_prefix, dropped_suffix = -(-far_prefix // 4), -(-far_suffix // 4)
        if len(before) + len(after) <= room:
            return before, dropped_prefix, after, dropped_suffix
        head = self._encode("prefix", header)
        if before[: len(head)] == head:
            before = before[len(head) :]
        else:
            before = self._tokenizer.encode(prefix[far_prefix:], dummy_prefix=False)
        room -= len(head)
        if room < 1:
            raise ValueError(
                f"the prompt's fixed part (control tokens, header lines, extra files) alone exceeds its budget by "
                f"{1 - room} tokens; raise the budget, or give a shorter path or fewer extra_files"
            )
        # The line that is being typed counts as one length: its last tokens come and go, and a cut must not with them.
        line = next((n for n, i in enumerate(reversed(before)) if self._ends_line(i)), len(before))
        least_prefix, least_suffix = plan_cut(len(before) + max(0, room // 48 - line), len(after), room)
        cut_prefix = cut_at_step(least_prefix, len(before), room, lambda i: self._ends_line(before[i - 1]))
        cut_suffix = cut_at_step(least_suffix, len(after), room, lambda i: self._ends_line(after[-i - 1]))
        kept_suffix = after[: len(after) - cut_suffix]
        return head + before[cut_prefix:], dropped_prefix + cut_prefix, kept_suffix, dropped_suffix + cut_suffix

    def _ends_line(self, token_id: int) -> bool:
        return self._tokenizer.token_bytes(token_id).endswith(b"\n")
