"""What a checkpoint's files say about its tokenizer: settings, added tokens, and what is in a tokenizer.json.

Knows no encoder. It reads, and takes out of a tokenizer.json what text must never become.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infer.files import broken_file, read_json_object

SPACE_MARK = "▁"
MARKER = re.compile(r"▁?(<[^<>\s]+>|\[[A-Z_]+\])")
"""Pieces that look like this are never encoded from text, whatever a file calls them."""

MAX_ID = (1 << 22) - 1
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TEMPLATES = Path(__file__).with_name("fim_templates.json")
_MATCHING = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

AddedToken = Mapping[str, Any]
"""A token beside the trained vocabulary, as tokenizer.json writes one; a `special` one has no text."""

log = logging.getLogger("megatron_infer")


@dataclass(frozen=True)
class Settings:
    """What lies beside a vocabulary. names: of the bos, eos and pad token. num_rows: of the model's embedding.

    adds_bos: whether a plain prompt starts with the bos token; None where no file says so.
    """

    names: Mapping[str, str]
    special: frozenset[str]
    adds_bos: bool | None
    num_rows: int
    added: tuple[AddedToken, ...]

    @classmethod
    def read(cls, root: Path, num_rows: int | None) -> Settings:
        """From tokenizer_config.json, special_tokens_map.json and added_tokens.json, if there are any (ValueError)."""
        files = [root / name for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")]
        base, config, bare = (read_json_object(path) if path.is_file() else {} for path in files)
        try:
            return cls.of(base | {name: value for name, value in config.items() if value is not None}, bare, num_rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise broken_file(files[1], f"cannot be read ({type(error).__name__}: {error})") from None

    @classmethod
    def of(cls, raw: Mapping[str, Any], bare: Mapping[str, Any], num_rows: int | None) -> Settings:
        """From the contents of tokenizer_config.json and added_tokens.json."""
        names = {name: _content_of(raw[f"{name}_token"]) for name in ("bos", "eos", "pad") if raw.get(f"{name}_token")}
        special = frozenset([*names.values(), *map(_content_of, raw.get("additional_special_tokens") or [])])
        added = [{**token, "id": int(i)} for i, token in raw.get("added_tokens_decoder", {}).items()]
        added += [{"id": i, "content": content} for content, i in bare.items()]
        return cls(names, special, raw.get("add_bos_token"), MAX_ID + 1 if num_rows is None else num_rows, tuple(added))

    def added_tokens(self, listed: Iterable[AddedToken] = ()) -> dict[str, AddedToken]:
        """By content, in the order of ids: those `listed` by the tokenizer's own file, and others (ValueError).

        The first to list a token says its id; it is special if any says so. One without a row in the model could be
        neither read nor written, and is left out with a warning: padding tokens are often added so.
        """
        tokens: dict[str, dict[str, Any]] = {}
        known = known_control_pieces()
        for entry in (*listed, *self.added):
            content, token_id = entry.get("content"), entry.get("id")
            if not isinstance(content, str) or not content or type(token_id) is not int or not 0 <= token_id <= MAX_ID:
                raise ValueError(f"an added token of the tokenizer is {content!r} with the id {token_id!r}; correct it")
            token = tokens.setdefault(content, {**_MATCHING, **entry, "special": content in self.special})
            token["special"] |= bool(entry.get("special", content in known))
        in_order = sorted(tokens.items(), key=lambda item: int(item[1]["id"]))
        rowless = [content for content, token in in_order if token["id"] >= self.num_rows]
        if rowless:
            log.warning("the model has no row for the tokenizer's added %s; left out", ", ".join(map(repr, rowless)))
        return dict(in_order[: len(in_order) - len(rowless)])


def _content_of(token: Any) -> str:
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"a token must be text, not {content!r}")
    return content


def known_control_pieces() -> frozenset[str]:
    """Control tokens of every FIM family; some vocabularies list them as ordinary pieces."""
    families = json.loads(_TEMPLATES.read_text(encoding="utf-8"))["families"].values()
    return frozenset(piece for family in families for piece in [*family["tokens"].values(), *family["stop"]])


def take_out(raw: dict[str, Any], control: set[str], added: Mapping[str, AddedToken]) -> None:
    """Make `raw`, a tokenizer.json, one whose encoder has never heard of `control`, but of what else is `added`."""
    model = raw["model"]
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in control}
    kept = [t for t in added.values() if t["content"] not in control and t["content"] != model.get("unk_token")]
    # An added token missing in the model's vocabulary is numbered by its place in the list, which has just changed.
    vocab.update({token["content"]: token["id"] for token in kept})
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    model["merges"] = [[a, b] for a, b in merges if not control & {a, b, a + b}]
    model["vocab"], raw["added_tokens"] = vocab, kept
    raw["truncation"] = raw["padding"] = None


def drop_dummy_prefix(raw: dict[str, Any]) -> bool:
    """Remove from `raw` whatever puts a space before a text; False when there was nothing to remove."""
    normalizers = parts(raw.get("normalizer"))
    kept = [part for part in normalizers if part["type"] != "Prepend"]
    raw["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    found = len(kept) < len(normalizers)
    for part in parts(raw.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            prepends = part.pop("add_prefix_space", True) and part.get("prepend_scheme") != "never"
            part["prepend_scheme"] = "never"
            found |= prepends
        elif part["type"] == "ByteLevel":
            found |= part["add_prefix_space"]
            part["add_prefix_space"] = False
    return found


def parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer, decoder or post-processor as a flat list, its Sequences opened."""
    if not component:
        return []
    if component["type"] != "Sequence":
        return [component]
    inner = next(value for key, value in component.items() if key != "type")
    return [part for item in inner for part in parts(item)]


def piece_texts(ids: Mapping[str, int], added: set[str], decoders: set[str]) -> list[bytes]:
    """UTF-8 bytes of every id, by what the file's decoder says its pieces mean."""
    texts = [b""] * (max(ids.values()) + 1)
    alphabet = _byte_alphabet()
    for piece, i in ids.items():
        byte = _BYTE_PIECE.fullmatch(piece)
        if piece in added:
            texts[i] = piece.encode()
        elif "ByteLevel" in decoders:
            texts[i] = b"".join(alphabet.get(c, c.encode()) for c in piece)
        elif byte and "ByteFallback" in decoders:
            texts[i] = bytes([int(byte[1], 16)])
        else:
            texts[i] = piece.replace(SPACE_MARK, " ").encode()
    return texts


def _byte_alphabet() -> dict[str, bytes]:
    """The byte-level alphabet (GPT-2): printable Latin-1 stands for itself, other bytes for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + n): bytes([b]) for n, b in enumerate(others)}
