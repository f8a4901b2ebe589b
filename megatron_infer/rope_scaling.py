"""Rotary positions stretched beyond the trained context, and how config.json says so.

Owns RopeScaling and the reading of `rope_theta`, `rope_scaling` and `rope_parameters`. model.rope has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_infer.checks import boolean, finite, one_of, positive_int

DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_FIELDS = {
    "linear": ("factor",),
    "yarn": (
        "factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
"""What a type reads; transformers ignores the rest."""
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
_LOWEST = {
    "factor": 1.0, "beta_fast": 1e-6, "beta_slow": 1e-6, "attention_factor": 0.0, "mscale": 0.0, "mscale_all_dim": 0.0,
    "low_freq_factor": 1e-6, "high_freq_factor": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary positions beyond the trained context, with the field names of Hugging Face.

    `linear` divides positions by `factor`; `yarn` is YaRN (arXiv 2309.00071); `llama3` is that of Llama 3.1. All but
    `factor` belongs to the latter two; `original_max_position_embeddings` is the trained context.
    """

    rope_type: Literal["linear", "yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        one_of("rope scaling type", self.rope_type, tuple(_FIELDS))
        for name, low in _LOWEST.items():
            if getattr(self, name) is not None:
                finite(f"rope scaling: {name}", getattr(self, name), low=low)
        if self.rope_type != "linear":
            positive_int(f"rope scaling: {_ORIGINAL}", self.original_max_position_embeddings)
        boolean("rope scaling: truncate", self.truncate)
        if self.rope_type == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise ValueError(
                f"rope scaling: high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor "
                f"({self.low_freq_factor})"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], trained: Any) -> RopeScaling | None:
        """Read one such object of config.json, for a model whose context was `trained`; None for plain RoPE.

        Raises:
            ValueError: another type, none at all beside settings of one, or a field that is missing or wrong.
        """
        kinds = [raw[name] for name in ("rope_type", "type") if name in raw]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            raise ValueError(f"rope scaling has rope_type {kinds[0]!r} and type {kinds[1]!r}; remove the wrong one")
        lost = [name for name, value in raw.items() if name not in ("rope_theta", "partial_rotary_factor") and value]
        if not kinds and lost:
            raise ValueError(
                f"rope scaling has {', '.join(lost)} but no rope_type, without which transformers ignores it; add the "
                f"one that is meant ({', '.join(_FIELDS)}), or remove the rest"
            )
        if not kinds or kinds[0] == "default":
            return None
        one_of("rope scaling type", kinds[0], tuple(_FIELDS))
        given = {name: raw[name] for name in _FIELDS[kinds[0]] if raw.get(name) is not None}
        missing = [name for name in _NEEDED if name in _FIELDS[kinds[0]] and name not in given]
        if missing:
            raise ValueError(f"rope scaling of type {kinds[0]!r} has no {missing[0]!r}")
        if kinds[0] != "linear":
            given[_ORIGINAL] = trained
        # transformers takes 0 for the default of these two.
        unset = [name for name in ("beta_fast", "beta_slow") if given.get(name) == 0]
        return cls(rope_type=kinds[0], **{name: value for name, value in given.items() if name not in unset})

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face dictionary this was read from, defaults left out."""
        out: dict[str, Any] = {"rope_type": self.rope_type, "factor": self.factor}
        for name, spec in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if name not in out and value != spec.default:
                out[name] = value
        return out


def read_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Base of the rotary frequencies and their scaling, of a parsed config.json.

    As transformers 5 resolves them (modeling_rope_utils.py): `rope_scaling`, unless empty, replaces `rope_parameters`;
    a base in there replaces `rope_theta` beside it; the trained context is that at the top level, else the one in
    there, else `max_position_embeddings`. Where it would drop one of two statements that differ, this refuses both.

    Raises:
        ValueError: naming the fields that contradict each other, or the one that is wrong.
    """
    scaling, parameters = (_flat_object(raw, name) for name in ("rope_scaling", "rope_parameters"))
    used, name = (scaling, "rope_scaling") if scaling else (parameters, "rope_parameters")
    if any(source.get("partial_rotary_factor") not in (None, 1) for source in (raw, scaling, parameters)):
        raise ValueError("partial_rotary_factor is not supported; this network rotates whole heads")
    theta = used.get("rope_theta", raw.get("rope_theta", DEFAULT_THETA))
    for prefix, source in (("", raw), ("rope_scaling.", scaling), ("rope_parameters.", parameters)):
        if source.get("rope_theta") not in (None, theta):
            raise ValueError(
                f"{prefix}rope_theta is {source['rope_theta']!r}, but {name} comes first, and with it transformers "
                f"takes {theta!r}; state the right rope_theta in {name}, and nowhere another"
            )
    contexts = [source[_ORIGINAL] for source in (raw, used) if source.get(_ORIGINAL) is not None]
    if len(contexts) == 2 and contexts[0] != contexts[1]:
        raise ValueError(
            f"{_ORIGINAL} is {contexts[0]!r} at the top level, {contexts[1]!r} in {name}; remove the wrong one"
        )
    trained = contexts[0] if contexts else max_position_embeddings
    read = RopeScaling.from_hf(used, trained)
    if scaling and RopeScaling.from_hf(parameters, parameters.get(_ORIGINAL, trained)) not in (None, read):
        raise ValueError(
            "rope_scaling and rope_parameters ask for different scalings, of which transformers takes rope_scaling; "
            "remove the wrong one"
        )
    return theta, read


def _flat_object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r:.80}")
    nested = [key for key, inner in value.items() if isinstance(inner, Mapping)]
    if nested:
        raise ValueError(
            f"{name} has settings of its own for {', '.join(nested)}, but this network rotates all layers alike; put "
            f"what applies to all layers directly into {name}"
        )
    return value
