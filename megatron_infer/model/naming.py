"""Names that other programs give to the tensors of a Hugging Face model.

Owns what stands in front of a name when a wrapper was saved in the model's place, the buffers that are no weights, and
how an adapter is recognised. The names proper are in model.weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""DataParallel, torch.compile, FSDP, activation checkpointing: modules that only hold another."""
_DERIVED = re.compile(
    r"(?:.*\.)?(?:\w*inv_freq|(?:cos|sin)_cached|freqs(?:_\w+)?|(?:rotary_emb|rotary|rope)\.\w+"
    r"|masked_bias|(?:\w+_)?mask|position_ids|(?:self_attn|attn|attention)\.bias)"
)
_ADAPTER = re.compile(r"(?:.*\.)?(?:base_model\.model|base_layer|lora_\w+|modules_to_save)\..+")
MERGE_COMMAND = "python -m checkpoints_convert merge-lora BASE ADAPTER OUT"


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration: tables of rotary positions, masks. None of them is read."""
    return _DERIVED.fullmatch(name) is not None


def without_wrappers(names: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Stored name -> name of the model, of those that differ in wrappers or in `model.`, missing or once too often.

    Args:
        names: all that a checkpoint's files hold. expected: the model's Hugging Face names.

    Raises:
        ValueError: it is a PEFT model, or every name begins with something else that belongs to no model.
    """
    adapted = next(filter(_ADAPTER.fullmatch, names), None)
    if adapted is not None:
        raise ValueError(
            f"tensor {adapted!r} is of a PEFT model that was saved with its adapter unmerged. Save what "
            f"model.merge_and_unload() returns, or save base and adapter apart and merge them: {MERGE_COMMAND}"
        )
    found: dict[str, str] = {}
    taken = set(names)
    for name in names:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        while parts[:1] == ["model"]:
            del parts[0]
        plain = next((p for p in (".".join(parts), ".".join(["model", *parts])) if p in expected), name)
        if plain not in taken:
            found[name] = plain
            taken.add(plain)
    if not found and not any(name in expected for name in names):
        weights = sorted(name for name in names if not is_derived(name)) or [""]
        ends = zip(weights[0].split(".")[:-1], weights[-1].split(".")[:-1], strict=False)
        common = [first for first, last in itertools.takewhile(lambda pair: pair[0] == pair[1], ends)]
        if common:
            raise ValueError(
                f"all {len(weights)} names begin with {'.'.join(common) + '.'!r}, which is no part of this model; save "
                "the model that is inside, without what wraps it"
            )
    return found
