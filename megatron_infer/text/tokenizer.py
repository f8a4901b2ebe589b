"""Text to token ids and back: SentencePiece (tokenizer.model) and Hugging Face (tokenizer.json) behind one interface.

Owns the promise that text never becomes a control token. Knows nothing of prompts: which control token goes where is
fim.py's business. What the files mean is tokenizer_files.py's.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from megatron_infer.checks import check_text
from megatron_infer.files import broken_file, read_json_object
from megatron_infer.gguf_header import GgufHeader
from megatron_infer.text import tokenizer_files
from megatron_infer.text.gguf_tokenizer import gguf_tokenizer
from megatron_infer.text.tokenizer_files import MARKER, SPACE_MARK, AddedToken, Settings, known_control_pieces

GUARD = "☺"
"""Encoded in front of a text and cut off again, so that the dummy space sticks to the guard and not to the text."""

_ModelProto: Any = vars(sp_pb2)["ModelProto"]  # generated at import, so type checkers cannot see it
UNKNOWN_TEXT = b"\xef\xbf\xbd"  # U+FFFD
_NO_PIECE = "unused "  # begins the names that fill gaps; in a piece a space would be a space mark
_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip"}


class Tokenizer(ABC):
    """Token ids <-> text.

    vocab_size: number of ids this tokenizer knows (a model may have more rows, as padding).
    bos_id, eos_id, pad_id: None where the tokenizer has none. adds_bos: whether a plain prompt starts with bos_id.
    has_dummy_prefix: whether `encode` starts a text with a space of its own (SentencePiece's habit).
    control_ids: ids that `encode` never returns. `decode` skips those of special tokens, which have no text.
    """

    def __init__(
        self, texts: list[bytes], ids: dict[str, int], control_ids: Iterable[int], settings: Settings, *,
        adds_bos: bool, has_dummy_prefix: bool, own: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.vocab_size = len(texts)
        special = (ids.get(settings.names.get(name, ""), (own or {}).get(name, -1)) for name in ("bos", "eos", "pad"))
        self.bos_id, self.eos_id, self.pad_id = (i if i >= 0 else None for i in special)
        self.adds_bos = bool(adds_bos if settings.adds_bos is None else settings.adds_bos) and self.bos_id is not None
        self.has_dummy_prefix = has_dummy_prefix
        self.control_ids = frozenset(control_ids)
        self._texts, self._ids = texts, ids
        mark = [(ids.get(f"<0x{byte:02X}>"), bytes([byte])) for byte in SPACE_MARK.encode()]
        self._mark_ids = [i for i, byte in mark if i is not None and texts[i] == byte]
        """The space mark as byte pieces, where a vocabulary that writes spaces with it has them."""

    @abstractmethod
    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        """Ids of a text that is not empty and is valid Unicode."""

    def encode(self, text: str, *, dummy_prefix: bool = True) -> list[int]:
        """Ids of `text` taken as plain text: control tokens written out in it stay ordinary characters.

        With `dummy_prefix`, SentencePiece models put a space in front, as they do at the start of a document. The
        character with which they write a space (U+2581) stays what it is where the vocabulary has bytes to say so.
        Raises ValueError for lone surrogates.
        """
        check_text(text)
        if not text:
            return []
        if SPACE_MARK in text and len(self._mark_ids) == len(SPACE_MARK.encode()):
            first, *others = text.split(SPACE_MARK)
            with_dummy = dummy_prefix and self.has_dummy_prefix
            ids = self._encode(first, dummy_prefix) if first else [self._ids[SPACE_MARK]] * with_dummy
            for part in others:
                ids += self._mark_ids + (self._encode(part, False) if part else [])
        else:
            ids = self._encode(text, dummy_prefix)
        assert self.control_ids.isdisjoint(ids), "text was encoded to a control token"
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, a leading space included; special tokens have none.

        Bytes that can never become a character become U+FFFD; one that has only begun at the end is left out.
        """
        return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(map(self.token_bytes, ids)))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, possibly a part of a character; empty for special tokens and padding rows."""
        assert token_id >= 0, token_id
        return self._texts[token_id] if token_id < len(self._texts) else b""

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but control tokens written out in `text`, with or without their "▁", become those tokens."""
        ids: list[int] = []
        for part in self._control_pattern.split(text) if self.control_pieces else [text]:
            control = self.control_id_of(part)
            ids += self.encode(part, dummy_prefix=not ids) if control is None else [control]
        return ids

    @cached_property
    def control_pieces(self) -> Mapping[str, int]:
        """Control tokens by name."""
        return {piece: i for piece, i in self._ids.items() if i in self.control_ids}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        """Any of their names, the longest first."""
        names = sorted({piece.lstrip(SPACE_MARK) for piece in self.control_pieces}, key=len, reverse=True)
        return re.compile(f"{SPACE_MARK}?({'|'.join(map(re.escape, names))})")

    def gaps(self, num_rows: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the ids below `num_rows` that stand for no piece: a model's padding rows."""
        known = sorted({-1, *(i for i in self._ids.values() if i < num_rows), num_rows})
        return [(low + 1, high) for low, high in itertools.pairwise(known) if high > low + 1]

    def id_of(self, piece: str) -> int | None:
        """Id of a vocabulary entry by its exact name, control tokens included."""
        return self._ids.get(piece)

    def control_id_of(self, text: str) -> int | None:
        """Id of the control token that `text` names, with or without the space mark that some names begin with."""
        found = (self._ids.get(name) for name in (text, SPACE_MARK + text))
        return next((i for i in found if i in self.control_ids), None)


def load_tokenizer(model_dir: str | Path, num_rows: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint directory (tokenizer.model, else tokenizer.json), or of a GGUF file.

    num_rows: of the model's embedding, where known; added tokens that have no row are left out. Raises ValueError.
    """
    root = Path(model_dir)
    if root.suffix == ".gguf":
        content, raw = gguf_tokenizer(GgufHeader.read(root))
        settings = Settings.of(raw, {}, num_rows)
        if isinstance(content, bytes):
            return SentencePieceTokenizer(root, content, settings)
        return HuggingFaceTokenizer(root, content, settings)
    settings = Settings.read(root, num_rows)
    if (path := root / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path, path.read_bytes(), settings)
    if (path := root / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, read_json_object(path), settings)
    raise ValueError(
        f"{root} has neither tokenizer.model nor tokenizer.json; copy one of them from the model's original files"
    )


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model; every marker in it is made a control piece before the processor sees it."""

    def __init__(self, path: Path, content: bytes, settings: Settings) -> None:
        try:
            proto = _ModelProto.FromString(content)
            if not proto.pieces:
                raise DecodeError("no pieces in it")
            self._add(proto, settings.added_tokens())
            texts, control = self._read_pieces(proto)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            has_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
            proto.normalizer_spec.add_dummy_prefix = False
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise broken_file(path, f"cannot be read ({error})") from error
        sp = self._processor
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if not piece.piece.startswith(_NO_PIECE)}
        own = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        super().__init__(texts, ids, control, settings, adds_bos=True, has_dummy_prefix=has_dummy_prefix, own=own)
        self._guard_ids: list[int] = sp.encode(GUARD)
        # Without byte fallback, neighbouring unknown characters share one id: the guard would swallow its neighbour.
        self._guard_is_known = sp.unk_id() not in self._guard_ids

    @staticmethod
    def _add(proto: Any, added: Mapping[str, AddedToken]) -> None:
        """Give `proto` a piece for every added token, under the token's id; text can say those that are not special."""
        kind = _ModelProto.SentencePiece
        for content, token in added.items():
            while len(proto.pieces) <= token["id"]:
                proto.pieces.add(piece=f"{_NO_PIECE}{len(proto.pieces)}", score=0.0, type=kind.UNUSED)
            piece = proto.pieces[token["id"]]
            if piece.type not in (kind.UNKNOWN, kind.BYTE):
                piece.piece = content.replace(" ", SPACE_MARK)
                piece.type = kind.CONTROL if token["special"] else kind.USER_DEFINED

    @staticmethod
    def _read_pieces(proto: Any) -> tuple[list[bytes], set[int]]:
        """Text of every piece, and the ids of markers, which it also makes control pieces in `proto`."""
        kind = _ModelProto.SentencePiece
        known = known_control_pieces()
        texts: list[bytes] = []
        control = set()
        for i, piece in enumerate(proto.pieces):
            if piece.type == kind.BYTE:
                texts.append(bytes([int(piece.piece[3:5], 16)]))
            elif piece.type == kind.UNKNOWN:
                texts.append(UNKNOWN_TEXT)
            elif piece.type == kind.CONTROL or piece.piece in known:
                piece.type = kind.CONTROL
                control.add(i)
                texts.append(b"")
            else:
                texts.append(piece.piece.replace(SPACE_MARK, " ").encode())
                if piece.type == kind.USER_DEFINED and MARKER.fullmatch(piece.piece):
                    piece.type = kind.CONTROL
                    control.add(i)
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

    def __init__(self, path: Path, raw: dict[str, Any], settings: Settings) -> None:
        try:
            model, kinds = raw["model"], {part["type"] for part in tokenizer_files.parts(raw.get("decoder"))}
            model_type = model.get("type", "BPE")
        except (KeyError, TypeError, AttributeError) as error:
            raise broken_file(path, f"cannot be read ({type(error).__name__}: {error})") from error
        if model_type != "BPE" or not kinds or kinds - _DECODERS:
            raise ValueError(
                f"{path} is of a kind that is not supported ({model_type} model, decoders {sorted(kinds)}): it "
                "must be BPE with a byte-level or SentencePiece-like decoder; use the model's tokenizer.model if any"
            )
        try:
            listed = {token["content"]: token for token in raw.get("added_tokens") or []}
            added = settings.added_tokens(listed.values())
            left_out = listed.keys() - added.keys()
            ids = {piece: i for piece, i in model["vocab"].items() if piece not in left_out}
            ids |= {content: token["id"] for content, token in added.items()}
            if not all(type(i) is int and 0 <= i <= tokenizer_files.MAX_ID for i in ids.values()):
                raise ValueError(f"an id of the vocabulary is no integer from 0 to {tokenizer_files.MAX_ID}")
            known = known_control_pieces()
            special = {name for name, token in added.items() if token["special"]} | known & (ids.keys() - added.keys())
            control = special | {name for name in added if MARKER.fullmatch(name)}
            if "ByteLevel" in kinds:
                model["unk_token"] = None  # never needed there, and some files name their end token
            control.discard(model.get("unk_token"))
            texts = tokenizer_files.piece_texts(ids, set(added), kinds)
            for name in special:
                texts[ids[name]] = b""
            if model.get("unk_token"):
                texts[ids[model["unk_token"]]] = UNKNOWN_TEXT
            tokenizer_files.take_out(raw, control | left_out, added)
            steps = tokenizer_files.parts(raw.pop("post_processor", None))
            templates = [step["single"] for step in steps if step["type"] == "TemplateProcessing"]
            adds_bos = any("SpecialToken" in piece for single in templates for piece in single[:1])
            self._encoder = _without_panic(tokenizers.Tokenizer.from_str, json.dumps(raw))
            _without_panic(self._encoder.encode, f"def {GUARD}(x):\n")  # some panic here rather than above
            has_dummy_prefix = tokenizer_files.drop_dummy_prefix(raw)
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(raw)) if has_dummy_prefix else self._encoder
        except Exception as error:  # the tokenizers library raises plain Exception for what it cannot parse
            raise broken_file(path, f"cannot be read ({type(error).__name__}: {error})") from error
        control_ids = [ids[name] for name in control]
        super().__init__(texts, ids, control_ids, settings, adds_bos=adds_bos, has_dummy_prefix=has_dummy_prefix)

    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        encoder = self._encoder if dummy_prefix else self._bare
        return list(_without_panic(encoder.encode, text, add_special_tokens=False).ids)


def _without_panic(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the tokenizers library returns; a Rust panic, which is no Exception, as a ValueError."""
    try:
        return call(*args, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library gave up on tokenizer.json: {error}") from None
