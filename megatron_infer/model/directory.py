"""Which files of a directory make up a checkpoint.

Owns file names and Hugging Face's index. Opens no file of tensors.
"""

from __future__ import annotations

from pathlib import Path

from megatron_infer.files import read_json_object
from megatron_infer.model.manifest import parse_shard_name
from megatron_infer.model.naming import MERGE_COMMAND
from megatron_infer.model.pieces import refuse


def shards_in(directory: Path) -> list[Path]:
    """Our shards, by their names."""
    return sorted(
        path for path in directory.glob("model-rank*.safetensors") if path.is_file() and parse_shard_name(path.name)
    )


def existing(path: Path) -> list[Path]:
    """The file, if it is one."""
    return [path] if path.is_file() else []


def hf_entry(directory: Path, stem: str, suffix: str) -> list[Path]:
    """What announces a Hugging Face checkpoint: its single file, else its index, else shards that lack one."""
    found = existing(directory / f"{stem}{suffix}") or existing(directory / f"{stem}{suffix}.index.json")
    return found or sorted(directory.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}"))


def hf_files(entry: list[Path]) -> tuple[list[Path], dict[str, str]]:
    """Files to read, and the index's map of tensor name to file name (empty for a single file).

    Raises:
        ValueError: there is no index, it is damaged, or it names a file that is not beside it.
    """
    index = entry[0]
    if index.suffix != ".json":
        unlisted = [f"{path} lies there without an index" for path in entry if "-of-" in path.name]
        refuse(unlisted, "Download the .index.json file too")
        return entry, {}
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    paths: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or len(name.encode()) > 255:
            raise ValueError(f"{index} points outside its directory, or at no file ({name!r:.80}); refused")
        paths[name] = index.parent / name
        if not paths[name].is_file():
            raise ValueError(f"{index} says tensor {tensor!r} is in {name}, which does not exist; download {name}")
    return [paths[name] for name in sorted(paths)], weight_map


def nothing_found(directory: Path, model_name: str) -> str:
    """The error for a directory without a checkpoint: what is accepted, and what is there."""
    names = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
    other = [name for name in names if name.endswith(".pt")]
    hint = f". For {other[0]} pass its name without .pt (or without _states_N.pt) as model_name" if other else ""
    if "adapter_config.json" in names:
        hint += f". It holds a PEFT adapter: merge it with {MERGE_COMMAND}"
    return (
        f"{directory} holds no checkpoint; accepted are model-rankR-of-N.safetensors (converted), model.safetensors or "
        f"its shards with model.safetensors.index.json, {model_name}.pt, {model_name}_states_*.pt, "
        f"pytorch_model.bin or its shards with an index, and one .gguf file; found: {listed}{hint}"
    )
