"""Text to token ids and back: SentencePiece (tokenizer.model) and Hugging Face (tokenizer.json) behind one interface.

Owns the promise that text never becomes a control token. Knows nothing of prompts: which control token goes where is
fim.py's business.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from megatron_infer.gguf_header import GgufHeader
from megatron_infer.gguf_tokenizer import gguf_tokenizer

GUARD = "☺"
"""Encoded in front of a text and cut off again, so that the dummy space sticks to the guard and not to the text."""

SPACE_MARK = "▁"
_ModelProto: Any = vars(sp_pb2)["ModelProto"]  # generated at import, so type checkers cannot see it
UNKNOWN_TEXT = b"\xef\xbf\xbd"  # U+FFFD
_MARKER = re.compile(r"▁?(<[^<>\s]+>|\[[A-Z_]+\])")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip"}
_TEMPLATES = Path(__file__).with_name("fim_templates.json")


class Tokenizer(ABC):
    """Token ids <-> text.

    vocab_size: number of ids this tokenizer knows (a model may have more rows, as padding).
    bos_id, eos_id, pad_id: None where the tokenizer has none. adds_bos: whether a plain prompt starts with bos_id.
    has_dummy_prefix: whether `encode` starts a text with a space of its own (SentencePiece's habit).
    control_ids: ids without text; `encode` never returns them, `decode` skips them.
    """

    def __init__(
        self, texts: list[bytes], ids: dict[str, int], control_ids: Iterable[int], *,
        specials: Mapping[str, int | None], adds_bos: bool, has_dummy_prefix: bool,
    ) -> None:  # fmt: skip
        self.vocab_size = len(texts)
        self.bos_id, self.eos_id, self.pad_id = (specials.get(name) for name in ("bos", "eos", "pad"))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.has_dummy_prefix = has_dummy_prefix
        self.control_ids = frozenset(control_ids)
        self._texts, self._ids = texts, ids

    @abstractmethod
    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        """Ids of a text that is not empty and is valid Unicode."""

    def encode(self, text: str, *, dummy_prefix: bool = True) -> list[int]:
        """Ids of `text` taken as plain text: control tokens written out in it stay ordinary characters.

        With `dummy_prefix`, SentencePiece models put a space in front, as they do at the start of a document.
        Raises ValueError for lone surrogates.
        """
        check_text(text)
        if not text:
            return []
        ids = self._encode(text, dummy_prefix)
        assert self.control_ids.isdisjoint(ids), "text was encoded to a control token"
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, a leading space included. Control tokens have none; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, possibly a part of a character; empty for control tokens and padding rows."""
        assert token_id >= 0, token_id
        return self._texts[token_id] if token_id < len(self._texts) else b""

    def id_of(self, piece: str) -> int | None:
        """Id of a vocabulary entry by its exact name, control tokens included."""
        return self._ids.get(piece)


def check_text(text: str, name: str = "text") -> None:
    """Raise ValueError where `text` cannot be written as UTF-8, i.e. holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; read the file "
            'with errors="replace", or cut text only between whole characters'
        ) from None


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory (tokenizer.model, else tokenizer.json), or of a GGUF file."""
    root = Path(model_dir)
    if root.suffix == ".gguf":
        content, settings = gguf_tokenizer(GgufHeader.read(root))
        if isinstance(content, bytes):
            return SentencePieceTokenizer(root, content, settings)
        return HuggingFaceTokenizer(root, content, settings)
    settings = _read_settings(root)
    if (path := root / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path, path.read_bytes(), settings)
    if (path := root / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, _read_json(path), settings)
    raise ValueError(
        f"{root} has neither tokenizer.model nor tokenizer.json; copy one of them from the model's original files"
    )


def _read_settings(root: Path) -> dict[str, Any]:
    path = root / "tokenizer_config.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise _broken(path, str(error)) from error
    if not isinstance(raw, dict):
        raise _broken(path, "not a JSON object")
    return raw


def _broken(path: Path, why: str) -> ValueError:
    remedy = "copy it again from the model's original files"
    if path.is_file() and path.read_bytes()[:40].startswith(b"version https://git-lfs"):
        why, remedy = "it is a Git LFS pointer", "fetch the real file with `git lfs pull`"
    return ValueError(f"{path} cannot be read ({' '.join(why.split())[:200]}); {remedy}")


def known_control_pieces() -> frozenset[str]:
    """Control tokens of every FIM family; some vocabularies list them as ordinary pieces."""
    families = json.loads(_TEMPLATES.read_text(encoding="utf-8"))["families"].values()
    return frozenset(piece for family in families for piece in [*family["tokens"].values(), *family["stop"]])


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model; every marker in it is made a control piece before the processor sees it."""

    def __init__(self, path: Path, content: bytes, settings: Mapping[str, Any]) -> None:
        try:
            proto = _ModelProto.FromString(content)
            if not proto.pieces:
                raise DecodeError("no pieces in it")
            texts, control = self._read_pieces(proto)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            has_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
            proto.normalizer_spec.add_dummy_prefix = False
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise _broken(path, str(error)) from error
        sp = self._processor
        ids = {p.piece: i for i, p in enumerate(proto.pieces)}
        specials = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        super().__init__(
            texts,
            ids,
            control,
            specials={name: i if i >= 0 else None for name, i in specials.items()},
            adds_bos=bool(settings.get("add_bos_token", True)),
            has_dummy_prefix=has_dummy_prefix,
        )
        self._guard_ids: list[int] = sp.encode(GUARD)
        # Without byte fallback, neighbouring unknown characters share one id: the guard would swallow its neighbour.
        self._guard_is_known = sp.unk_id() not in self._guard_ids

    @staticmethod
    def _read_pieces(proto: Any) -> tuple[list[bytes], list[int]]:
        """Text of every piece, and the ids of control pieces, which it also marks as such in `proto`."""
        kind = _ModelProto.SentencePiece
        known = known_control_pieces()
        texts: list[bytes] = []
        control = []
        for i, piece in enumerate(proto.pieces):
            if piece.type == kind.BYTE:
                texts.append(bytes([int(piece.piece[3:5], 16)]))
            elif piece.type == kind.UNKNOWN:
                texts.append(UNKNOWN_TEXT)
            elif (
                piece.type == kind.CONTROL
                or piece.piece in known
                or (piece.type == kind.USER_DEFINED and _MARKER.fullmatch(piece.piece))
            ):
                piece.type = kind.CONTROL
                control.append(i)
                texts.append(b"")
            else:
                texts.append(piece.piece.replace(SPACE_MARK, " ").encode())
        return texts, control

    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        if dummy_prefix or not self.has_dummy_prefix:
            return list(self._processor.encode(text))
        if self._guard_is_known:
            ids = self._processor.encode(GUARD + text)
            if ids[: len(self._guard_ids)] == self._guard_ids:
                return list(ids[len(self._guard_ids) :])
        # The vocabulary has pieces that join the guard to what follows it.
        return list(self._bare.encode(text))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json holding a BPE model; control tokens are taken out of the encoder's vocabulary altogether."""

    def __init__(self, path: Path, raw: dict[str, Any], settings: Mapping[str, Any]) -> None:
        try:
            model, kinds = raw["model"], {part["type"] for part in _parts(raw.get("decoder"))}
            model_type = model.get("type", "BPE")
        except (KeyError, TypeError, AttributeError) as error:
            raise _broken(path, f"{type(error).__name__}: {error}") from error
        if model_type != "BPE" or not kinds or kinds - _DECODERS:
            raise ValueError(
                f"{path} is of a kind that is not supported ({model_type} model, decoders {sorted(kinds)}): it "
                "must be BPE with a byte-level or SentencePiece-like decoder; use the model's tokenizer.model if any"
            )
        try:
            added = {token["content"]: token for token in raw.get("added_tokens") or []}
            ids = {**model["vocab"], **{content: token["id"] for content, token in added.items()}}
            control = _take_out_control(raw, added, byte_level="ByteLevel" in kinds)
            texts = _piece_texts(ids, set(added), kinds)
            for name in control:
                texts[ids[name]] = b""
            if model.get("unk_token"):
                texts[ids[model["unk_token"]]] = UNKNOWN_TEXT
            templates = [p for p in _parts(raw.pop("post_processor", None)) if p["type"] == "TemplateProcessing"]
            adds_bos = any("SpecialToken" in piece for p in templates for piece in p["single"][:1])
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(raw))
            has_dummy_prefix = _drop_dummy_prefix(raw)
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(raw)) if has_dummy_prefix else self._encoder
        except Exception as error:  # the tokenizers library raises plain Exception for what it cannot parse
            raise _broken(path, f"{type(error).__name__}: {error}") from error
        names = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "pad")}
        names = {name: value["content"] if isinstance(value, dict) else value for name, value in names.items()}
        super().__init__(
            texts,
            ids,
            {ids[name] for name in control},
            specials={name: None if value is None else ids.get(value) for name, value in names.items()},
            adds_bos=bool(settings.get("add_bos_token", adds_bos)),
            has_dummy_prefix=has_dummy_prefix,
        )

    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        encoder = self._encoder if dummy_prefix else self._bare
        return list(encoder.encode(text, add_special_tokens=False).ids)


def _take_out_control(raw: dict[str, Any], added: Mapping[str, Mapping[str, Any]], *, byte_level: bool) -> set[str]:
    """Make `raw`, a tokenizer.json, one whose encoder has never heard of control tokens; returns their names."""
    model = raw["model"]
    control = {name for name, token in added.items() if token.get("special") or _MARKER.fullmatch(name)}
    control |= known_control_pieces() & (model["vocab"].keys() | added.keys())
    if byte_level:
        model["unk_token"] = None  # never needed there, and some files name their end token
    elif model.get("unk_token"):
        control.discard(model["unk_token"])
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in control}
    kept = [t for t in added.values() if t["content"] not in control and t["content"] != model.get("unk_token")]
    # An added token missing in the model's vocabulary is numbered by its place in the list, which has just changed.
    vocab.update({token["content"]: token["id"] for token in kept})
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    model["merges"] = [[a, b] for a, b in merges if not control & {a, b, a + b}]
    model["vocab"], raw["added_tokens"] = vocab, kept
    raw["truncation"] = raw["padding"] = None
    return control


def _drop_dummy_prefix(raw: dict[str, Any]) -> bool:
    """Remove from `raw` whatever puts a space before a text; False when there was nothing to remove."""
    normalizers = _parts(raw.get("normalizer"))
    kept = [part for part in normalizers if part["type"] != "Prepend"]
    raw["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    found = len(kept) < len(normalizers)
    for part in _parts(raw.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            prepends = part.pop("add_prefix_space", True) and part.get("prepend_scheme") != "never"
            part["prepend_scheme"] = "never"
            found |= prepends
        elif part["type"] == "ByteLevel":
            found |= part["add_prefix_space"]
            part["add_prefix_space"] = False
    return found


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer, decoder or post-processor as a flat list, its Sequences opened."""
    if not component:
        return []
    if component["type"] != "Sequence":
        return [component]
    inner = next(value for key, value in component.items() if key != "type")
    return [part for item in inner for part in _parts(item)]


def _piece_texts(ids: Mapping[str, int], added: set[str], decoders: set[str]) -> list[bytes]:
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
