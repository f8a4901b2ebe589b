"""Code from elsewhere in the repository, laid out before the prompt within a budget; what did not fit is counted.

In the format that the model's family documents, or else as comment lines before the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_infer.fim import FimPrompt, load_languages
from megatron_infer.llm import LLM

_SHARE = 2
"""Context may fill one in so many of the tokens that are left for the prompt."""
_CHARACTERS_PER_TOKEN = 32
"""A snippet longer than its budget by this measure is not even tokenized."""
_NAMELESS = "filename"
"""The path of a file whose client does not send one, as llama.cpp's server has it."""


@dataclass(frozen=True)
class Snippet:
    """A piece of another file, or of a place further off in this one."""

    path: str
    text: str


@dataclass(frozen=True)
class WithContext:
    """A prompt with what fitted of its context, and how many snippets did not."""

    prompt: FimPrompt
    num_dropped: int = 0


def with_context(llm: LLM, prompt: FimPrompt, snippets: Sequence[Snippet], max_new_tokens: int) -> WithContext:
    """`snippets`, the most relevant last, before `prompt`. Tokenizes: not for the event loop."""
    wanted = [snippet for snippet in snippets if snippet.text.strip()]
    room = (llm.max_model_len - max_new_tokens) // _SHARE
    comment = None if llm.fim.takes_extra_files else _comment(prompt, wanted)
    kept: list[tuple[str, str]] = []
    for snippet in reversed(wanted):
        path = " ".join(snippet.path.split()) or _NAMELESS
        text = snippet.text if comment is None else comment_lines(path, snippet.text, *comment)
        if len(text) > room * _CHARACTERS_PER_TOKEN:
            break
        num_tokens = len(llm.tokenizer.encode(f"{path}\n{text}\n"))
        if num_tokens > room:
            break
        room -= num_tokens
        kept.insert(0, (path, text))
    num_dropped = len(wanted) - len(kept)
    if not kept:
        return WithContext(prompt, num_dropped)
    if comment is None:
        path = prompt.path or _NAMELESS
        return WithContext(replace(prompt, path=path, extra_files=tuple(kept)), num_dropped)
    return WithContext(replace(prompt, prefix="".join(text for _, text in kept) + prompt.prefix), num_dropped)


def _comment(prompt: FimPrompt, snippets: Sequence[Snippet]) -> tuple[str, str]:
    """What opens and closes a comment line, by the first path that tells."""
    languages = load_languages()
    for path in [prompt.path, *(snippet.path for snippet in reversed(snippets))]:
        dot = path.rfind(".")
        if dot >= 0 and (language := languages.get(path[dot:])):
            return language.open, language.close
    return "# ", ""


def comment_lines(path: str, text: str, mark: str, close: str) -> str:
    """A snippet as comment lines, its path in front; marks in it that would end the comment are left out."""
    end = close.strip()
    lines = [f"Path: {path}", *(text.replace(end, "") if end else text).strip("\n").splitlines()]
    return "".join(f"{mark}{line}{close}".rstrip() + "\n" for line in lines)
