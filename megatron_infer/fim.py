"""Fill-in-the-middle prompts: FimPrompt -> token ids, laid out as the model family was trained.

Owns header lines, PSM and SPM order, and what is cut when a prompt exceeds its budget. The families are data
(fim_templates.json), and so are the languages (languages.json). Text becomes ids segment by segment, never parsed.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infer.checks import one_of, option
from megatron_infer.tokenizer import Tokenizer, check_text

MAX_PROMPT_BYTES = 8 << 20
"""More UTF-8 text than this is refused before it is tokenized; 32,768 tokens of code are about 0.1 MB."""

_REACH = 32
"""Characters per budget token: text further from the cursor is not tokenized. Code has about 4 to a token."""

_EXTENSION = re.compile(r"\.\w+$")
_HEADERS = ("full", "language", "none")
_ORDERS = ("spm", "psm")


@dataclass(frozen=True)
class FimPrompt:
    """The code around a cursor.

    path: of the file, as it should appear to the model; it selects the comment header of models that have one.
    extra_files: (path, text) pairs of the same repository, the most relevant last. repository: its name.
    language: of the code, a key or name of languages.json, where the path does not tell. Never part of the prompt: it
    is for the rules that end a completion.
    """

    prefix: str
    suffix: str = ""
    path: str = ""
    extra_files: tuple[tuple[str, str], ...] = ()
    repository: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        for name in ("prefix", "suffix", "path", "repository", "language"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, not {type(getattr(self, name)).__name__}")
        object.__setattr__(self, "extra_files", tuple(tuple(pair) for pair in self.extra_files))
        for pair in self.extra_files:
            if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
                raise ValueError("extra_files must be pairs of strings: ((path, text), ...)")
        for path in (self.path, self.repository, *(path for path, _ in self.extra_files)):
            if "\n" in path or "\r" in path:
                raise ValueError(f"the path {path!r} has a line break, which would end its comment line; rename it")


@dataclass(frozen=True)
class FimOptions:
    """How a prompt is laid out, where that differs from the family's habit; presets are instances of this.

    header: "full" (path line and language line), "language" or "none"; only for families with comment headers.
    frame_empty_suffix: write the FIM frame even around an empty suffix, where the family would continue plain text.
    prefix_tokens, suffix_tokens: cut each side to so many tokens and encode the rest again, as FIM-Eval does.
    """

    order: str | None = option(None, "spm (suffix first) or psm (prefix first) (default: the family's)")
    header: str = option("full", "comment lines of models that have them: full (path and language), language or none")
    frame_empty_suffix: bool = option(False, "write the FIM frame even around an empty suffix")
    prefix_tokens: int | None = option(None, "cut the prefix to so many tokens (default: what the context leaves)")
    suffix_tokens: int | None = option(None, "cut the suffix to so many tokens (default: what the context leaves)")

    def __post_init__(self) -> None:
        one_of("header", self.header, _HEADERS)
        one_of("order", self.order, (None, *_ORDERS))
        for name in ("prefix_tokens", "suffix_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class FimEncoding:
    """A prompt's token ids, the ids that end its completion, and how many tokens of either side did not fit.

    Text too far from the cursor to be tokenized at all is counted as one token per 32 characters.
    """

    ids: list[int]
    stop_token_ids: frozenset[int]
    dropped_prefix_tokens: int = 0
    dropped_suffix_tokens: int = 0


@dataclass(frozen=True)
class Language:
    """A language as the header lines name it: `open` and `close` enclose a comment line."""

    name: str
    open: str
    close: str


def language_of(prompt: FimPrompt) -> str:
    """The name of the prompt's language, by its path where it does not say; "" where that does not tell either."""
    language = _language_at(prompt.path)
    return prompt.language or (language.name if language else "")


def _language_at(path: str) -> Language | None:
    match = _EXTENSION.search(path)
    return load_languages().get(match[0]) if match else None


@functools.cache
def load_languages() -> Mapping[str, Language]:
    """File extension (with its dot, case-sensitive) -> language. Where an extension is missing there is no header."""
    table = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    return {
        extension: Language(entry["name"], entry["open"], entry["close"])
        for entry in table.values()
        for extension in entry["extensions"].split()
    }


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
        _check_size(prompt)
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
            cut_prefix, cut_suffix = cut_prefix + -(-far_prefix // _REACH), cut_suffix + -(-far_suffix // _REACH)
        texts = {"prefix": self._encode("prefix", header + prefix), "suffix": self._encode("suffix", suffix)}
        num_fixed = len(before) + sum(len(self._ids[word]) for word in layout if word not in texts)
        if budget_tokens is not None and num_fixed + sum(map(len, texts.values())) > budget_tokens:
            texts["prefix"], dropped_p, texts["suffix"], dropped_s = self._cut(
                header, prefix, texts, budget_tokens - num_fixed
            )
            cut_prefix, cut_suffix = cut_prefix + dropped_p, cut_suffix + dropped_s
        ids = before + [i for word in layout for i in (texts[word] if word in texts else self._ids[word])]
        return FimEncoding(ids, self.stop_token_ids, cut_prefix, cut_suffix)

    def header(self, path: str, which: str = "full") -> str:
        """Comment lines that introduce a file, or nothing where the family or the file's extension has none."""
        language = _language_at(path) if self._has_header and which != "none" else None
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


def plan_reach(num_prefix: int, num_suffix: int, budget_tokens: int) -> tuple[int, int]:
    """How many characters to leave out of a long prefix and suffix before they are tokenized, to bound the work.

    The prefix starts at a multiple of the reach, so that its start, and with it every cut, stays while one types.
    """
    reach = max(1, budget_tokens) * _REACH
    return max(0, num_prefix // reach - 1) * reach, max(0, num_suffix - reach)


def plan_cut(num_prefix: int, num_suffix: int, room: int) -> tuple[int, int]:
    """How many tokens to drop from the prefix's head and from the suffix's tail, so that the rest fits into `room`.

    Three quarters of the room are the prefix's, and either side may use what the other leaves. Drops are whole
    multiples of a step of about an eighth of the room: while one types, the cuts stay where they are for a step's
    length, and the KV cache of everything behind them stays valid.
    """
    if num_prefix + num_suffix <= room:
        return 0, 0
    step = max(1, room // 8)
    if step >= 64:
        step -= step % 64
    prefix_share = room - room // 4
    prefix_room = max(prefix_share, room - num_suffix)
    suffix_room = max(room - prefix_share, room - num_prefix)
    drop_prefix = math.ceil(max(0, num_prefix - prefix_room) / step) * step
    drop_suffix = math.ceil(max(0, num_suffix - suffix_room) / step) * step
    return min(drop_prefix, num_prefix), min(drop_suffix, num_suffix)


def _check_size(prompt: FimPrompt) -> None:
    texts = [(name, str(getattr(prompt, name))) for name in ("prefix", "suffix", "path", "repository")]
    texts += [(f"extra file {i}", item) for i, pair in enumerate(prompt.extra_files) for item in pair]
    size = 0
    for name, text in texts:
        check_text(text, name)
        size += len(text.encode())
    if size > MAX_PROMPT_BYTES:
        raise ValueError(
            f"the prompt has {size} bytes of text, and {MAX_PROMPT_BYTES} are allowed; send the part around the cursor"
        )
