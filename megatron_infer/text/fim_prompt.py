"""What is to be completed, and how it is to be laid out: FimPrompt and FimOptions, checked. Knows no tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_infer.checks import check_text, one_of, option
from megatron_infer.languages import name_of_language

MAX_PROMPT_BYTES = 8 << 20
"""More UTF-8 text than this is refused before it is tokenized; 32,768 tokens of code are about 0.1 MB."""

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
    token_healing: where the prefix ends inside a token, its last tokens are written anew by the answer (healing.py).
    The text begins at the cursor all the same; token_ids and logprobs have them, and max_new_tokens counts them.
    prefix_tokens, suffix_tokens: cut each side to so many tokens and encode the rest again, as FIM-Eval does.
    """

    order: str | None = option(None, "spm (suffix first) or psm (prefix first) (default: the family's)")
    header: str = option("full", "comment lines of models that have them: full (path and language), language or none")
    frame_empty_suffix: bool = option(False, "write the FIM frame even around an empty suffix")
    token_healing: bool = option(False, "complete the word in which the prefix ends, whatever its tokens")
    prefix_tokens: int | None = option(None, "cut the prefix to so many tokens (default: what the context leaves)")
    suffix_tokens: int | None = option(None, "cut the suffix to so many tokens (default: what the context leaves)")

    def __post_init__(self) -> None:
        one_of("header", self.header, _HEADERS)
        one_of("order", self.order, (None, *_ORDERS))
        for name in ("prefix_tokens", "suffix_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


def language_of(prompt: FimPrompt) -> str:
    """The name of the prompt's language, by its path where it does not say; "" where that does not tell either."""
    return prompt.language or name_of_language(prompt.path)


def check_size(prompt: FimPrompt) -> None:
    """Refuse text that is not Unicode, or more of it than MAX_PROMPT_BYTES (ValueError)."""
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
