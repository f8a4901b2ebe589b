"""The tokenizer in a GGUF file's metadata, as the tokenizer.json or tokenizer.model that it was made of.

Owns which pre-tokenizer a name in the metadata means: llama.cpp's src/llama-vocab.cpp, and the models' own regular
expressions quoted there. Knows nothing of encoding and decoding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from megatron_infer.gguf_header import GgufHeader

_ModelProto: Any = vars(sp_pb2)["ModelProto"]
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
"""Token types; those of SentencePiece have the same numbers."""
_BPE = 2
_SPECIALS = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class _Pre:
    """What a pre-tokenizer's name means: how text is cut before bytes are merged, and llama.cpp's defaults with it."""

    steps: tuple[dict[str, Any], ...] = ()
    gpt2_words: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizer: dict[str, Any] | None = None


_GPT2 = _Pre(gpt2_words=True)
_STARCODER = _Pre((_DIGITS,), gpt2_words=True)
_LLAMA3 = _Pre((_split(_WORDS + r"\p{N}{1,3}" + _REST),), ignore_merges=True, adds_bos=True)
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2, "mellum": _GPT2,
    "starcoder": _STARCODER, "refact": _STARCODER, "smollm": _STARCODER, "codeshell": _STARCODER,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _Pre((_split(_WORDS + r"\p{N}" + _REST),), normalizer={"type": "NFC"}),
    "tekken": _Pre((_split(_TEKKEN + r"\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*")),), False, True, True),
    "seed-coder": _Pre((_split(_WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"),)),
    "deepseek-coder": _Pre((
        *map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")), _DIGITS,
    )),
}  # fmt: skip


def gguf_tokenizer(header: GgufHeader) -> tuple[dict[str, Any] | bytes, dict[str, Any]]:
    """A tokenizer.json (parsed) or the bytes of a tokenizer.model, and a tokenizer_config.json (parsed).

    Raises:
        ValueError: a tokenizer or pre-tokenizer that is not known, or metadata that is missing or contradicts itself.
    """
    kind = header.get("tokenizer.ggml.model", str)
    tokens = header.get("tokenizer.ggml.tokens", list)
    if kind not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"{header.path}: tokenizer {kind!r} of {len(tokens or ())} tokens is not known; known: gpt2 (byte-level "
            "BPE), llama (SentencePiece). If the model's safetensors load, take those"
        )
    types = header.numbers("tokenizer.ggml.token_type", len(tokens), 1)
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens has a token twice; convert the model again")
    ids = {name: header.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in _SPECIALS.items()}
    if not all(i is None or 0 <= i < len(tokens) for i in ids.values()):
        raise ValueError(f"{header.path}: one of the token ids {ids} is not below {len(tokens)}, the number of tokens")
    settings: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    if kind == "llama":
        settings |= {"add_bos_token": header.get("tokenizer.ggml.add_bos_token", bool, True)}
        return _sentencepiece(header, tokens, types, ids), settings | {"tokenizer_class": "LlamaTokenizer"}
    name = header.get("tokenizer.ggml.pre", str)
    if name not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: pre-tokenizer {name!r} is not known; known: {', '.join(_PRE_TOKENIZERS)}. If the model's "
            "safetensors load, take those"
        )
    pre = _PRE_TOKENIZERS[name]
    settings |= {"add_bos_token": header.get("tokenizer.ggml.add_bos_token", bool, pre.adds_bos)}
    bos = settings.get("bos_token") if settings["add_bos_token"] else None
    raw = _byte_level(tokens, types, header.get("tokenizer.ggml.merges", list, []) or [], pre)
    raw["post_processor"] = None if bos is None else _begins_with(bos, tokens.index(bos))
    return raw, settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _byte_level(tokens: list[str], types: list[int], merges: list[str], pre: _Pre) -> dict[str, Any]:
    """A tokenizer.json; ids of unused tokens have no piece."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.gpt2_words}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": kind != _USER_DEFINED, **flags}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre.steps, byte_level]},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED},
            "merges": merges,
        },
    }


def _begins_with(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts a begin token in front of a text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    both = [first, text, first, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": both, "special_tokens": special}


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int], ids: dict[str, int | None]) -> bytes:
    """A tokenizer.model."""
    proto = _ModelProto()
    for i, (token, kind, score) in enumerate(
        zip(tokens, types, header.numbers("tokenizer.ggml.scores", len(tokens)), strict=True)
    ):
        if (kind == _BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)) or not 1 <= kind <= _BYTE or not token:
            raise ValueError(f"{header.path}: token {i}, {token!r}, cannot be of type {kind}; convert the model again")
        # The converter writes spaces of added tokens as such. An id that is not in use gets a name that is no piece.
        piece = f"unused {i}" if kind == _UNUSED else token.replace(" ", "▁")
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = _BPE, len(tokens), _BYTE in types
    for name, default in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", -1)):
        given = ids[name]
        found = default if given is None else given
        setattr(spec, f"{name}_id", found)
        if 0 <= found < len(tokens):
            setattr(spec, f"{name}_piece", proto.pieces[found].piece)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    return bytes(proto.SerializeToString())
