"""Fill-in-the-middle prompts: FimPrompt -> token ids, laid out as the model family was trained.

Owns the families (data: fim_templates.json), header lines, PSM and SPM order. What a long prompt loses is planned in
fim_cut.py. Text becomes ids segment by segment, never parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infer.fim_cut import REACH, plan_cut, plan_reach
from megatron_infer.fim_prompt import FimOptions, FimPrompt, check_size
from megatron_infer.languages import language_at
from megatron_infer.tokenizer import Tokenizer

__all__ = ["FimEncoding", "FimFormat", "FimOptions", "FimPrompt", "load_fim", "load_preset"]


@dataclass(frozen=True)
class FimEncoding:
    """A prompt's token ids, the ids that end its completion, and how many tokens of either side did not fit.

    Text too far from the cursor to be tokenized at all is counted as one token per 32 characters. `prefix`: where in
    `ids` the prefix lies, its header included.
    """

    ids: list[int]
    stop_token_ids: frozenset[int]
    dropped_prefix_tokens: int = 0
    dropped_suffix_tokens: int = 0
    prefix: range = range(0)


def load_preset(name: str) -> FimOptions:
    """A named set of options from fim_templates.json."""
    presets = _read_templates()["presets"]
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; known are {', '.join(presets)}")
    return FimOptions(**presets[name])


def load_fim(name: str | None, tokenizer: Tokenizer) -> FimFormat:
    """The format of a family by name, or of the first family whose control tokens the tokenizer has."""
    families = _read_templates()["families"]
    if name is not None:
        if name not in families:
            raise ValueError(f"there is no FIM family {name!r}; known are {', '.join(families)}")
        return FimFormat(name, families[name], tokenizer)
    for family, data in families.items():
        if data["tokens"] and all(tokenizer.id_of(piece) is not None for piece in data["tokens"].values()):
            return FimFormat(family, data, tokenizer)
    looked_for = "; ".join(f"{n}: {' '.join(d['tokens'].values())}" for n, d in families.items() if d["tokens"])
    raise ValueError(
        f"the tokenizer has the control tokens of no known FIM family ({looked_for}); name the family with fim=..., or "
        'use fim="none" to continue a prefix without a suffix'
    )


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
        before, header = self._other_files(prompt)
        header += self.header(prompt.path, options.header)
        if not (header or prompt.prefix or prompt.suffix):
            raise ValueError("the prompt is empty; give it a prefix, a suffix, or a path whose language is known")
        prefix, cut_prefix = self._limit(prompt.prefix, options.prefix_tokens, keep_head=False)
        suffix, cut_suffix = self._limit(prompt.suffix, options.suffix_tokens, keep_head=True)
        if budget_tokens is not None:
            far_prefix, far_suffix = plan_reach(len(prefix), len(suffix), budget_tokens)
            prefix, suffix = prefix[far_prefix:], suffix[: len(suffix) - far_suffix]
            cut_prefix, cut_suffix = cut_prefix + -(-far_prefix // REACH), cut_suffix + -(-far_suffix // REACH)
        texts = {"prefix": self._encode("prefix", header + prefix), "suffix": self._encode("suffix", suffix)}
        num_fixed = len(before) + sum(len(self._ids[word]) for word in layout if word not in texts)
        if budget_tokens is not None and num_fixed + sum(map(len, texts.values())) > budget_tokens:
            texts["prefix"], dropped_p, texts["suffix"], dropped_s = self._cut(
                header, prefix, texts, budget_tokens - num_fixed
            )
            cut_prefix, cut_suffix = cut_prefix + dropped_p, cut_suffix + dropped_s
        parts = [texts[word] if word in texts else self._ids[word] for word in layout]
        start = len(before) + sum(map(len, parts[: layout.index("prefix")]))
        where = range(start, start + len(texts["prefix"]))
        ids = before + [i for part in parts for i in part]
        return FimEncoding(ids, self.stop_token_ids, cut_prefix, cut_suffix, where)

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

    def _other_files(self, prompt: FimPrompt) -> tuple[list[int], str]:
        """Ids that come before everything else, and text that comes before the prefix, for `extra_files`."""
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
            values = {"path": path, "text": text.removesuffix("\n")}
            pieces += [(word, values) for word in self._files["each"]]
        pieces += [(word, current) for word in self._files["current"]]
        if self._files["place"] == "header":
            return [], "".join(word.format(**values) for word, values in pieces)
        ids: list[int] = []
        for word, values in pieces:
            ids += self._ids[word] if word in self._ids else self._encode("files", word.format(**values))
        return ids, ""

    def _limit(self, text: str, limit: int | None, *, keep_head: bool) -> tuple[str, int]:
        if limit is None:
            return text, 0
        ids = self._tokenizer.encode(text)
        if len(ids) <= limit:
            return text, 0
        cut = self._tokenizer.decode(ids[:limit] if keep_head else ids[-limit:])
        if self._tokenizer.has_dummy_prefix:
            cut = cut.removeprefix(" ")  # as the reference harness, whose decode takes it for the dummy prefix
        return cut, len(ids) - limit

    def _cut(
        self, header: str, prefix: str, texts: Mapping[str, list[int]], room: int
    ) -> tuple[list[int], int, list[int], int]:
        """Prefix ids, how many were dropped, suffix ids, how many were dropped, with both in `room` tokens."""
        head = self._encode("prefix", header)
        body = self._tokenizer.encode(prefix, dummy_prefix=False) if header else texts["prefix"]
        room -= len(head)
        if room < 1:
            raise ValueError(
                f"the prompt's fixed part (control tokens, header lines, extra files) alone exceeds its budget by "
                f"{1 - room} tokens; raise the budget, or give a shorter path or fewer extra_files"
            )
        suffix = texts["suffix"]
        drop_prefix, drop_suffix = plan_cut(len(body), len(suffix), room)
        return head + body[drop_prefix:], drop_prefix, suffix[: len(suffix) - drop_suffix], drop_suffix
