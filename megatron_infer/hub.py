"""A model's name on the Hugging Face hub, as the local directory or GGUF file that its files are fetched to.

Owns the names and which files are fetched. Where from, where to, tokens and offline use are huggingface_hub's business,
and its environment variables': HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_infer.world import World

_NAME = re.compile(r"(?P<repo>[\w.-]*\w/\w[\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<file>[^:/]+))?")
_FILES = ["*.safetensors", "*.json", "*.model", "merges.txt", "*.jinja"]
_IGNORED = ["*/*", "consolidated*"]
"""Copies in other formats: folders, and the duplicates that Mistral's repositories have."""


def local_path(model_dir: str | Path) -> Path:
    """A local path as it is; the files of "org/name", "org/name@revision" or "org/name:FILE", fetched where need be.

    FILE is a GGUF file, which is fetched alone, or a pattern of .bin or .pt files, which are not fetched unasked. What
    is cached is used without a look at the network. Ranks of one host fetch a file once: huggingface_hub locks it.

    Raises:
        ValueError: it cannot be fetched, or huggingface_hub is not installed.
    """
    path, match = Path(model_dir), _NAME.fullmatch(str(model_dir))
    if match is None or path.exists() or (path.suffix == ".gguf" and ":" not in path.name):
        return path
    repo, file = match["repo"], match["file"]
    by_hand = f"`hf download {repo} --local-dir DIR`, and give DIR"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise ValueError(
            f"{model_dir} is not a local path; to get it from the hub, pip install huggingface_hub, or run {by_hand}"
        ) from None
    if World.from_env().local_rank:
        disable_progress_bars()
    is_gguf = file is not None and file.endswith(".gguf")
    wanted = [file] if file is not None and is_gguf else _FILES + ([file] if file else [])

    def fetch(*, from_cache: bool) -> Path:
        return Path(
            snapshot_download(
                repo, revision=match["revision"], allow_patterns=wanted, ignore_patterns=_IGNORED,
                local_files_only=from_cache,
            )
        )  # fmt: skip

    try:
        try:
            folder = fetch(from_cache=True)
        except LocalEntryNotFoundError:
            folder = fetch(from_cache=False)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{model_dir} is not a local path, and the hub does not give it ({type(error).__name__}: {why}). Check the "
            f"name and the network, or run {by_hand}"
        ) from error
    if file is not None and not any(folder.glob(file)):
        raise ValueError(f"{repo} on the hub has no file {file}; look at its list of files for the right name")
    if file is None and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repo} on the hub has no safetensors files; name a GGUF file that it has as {repo}:FILE.gguf, or have "
            f".bin or .pt files fetched too with {repo}:'*.bin'"
        )
    return folder / file if file is not None and is_gguf else folder
