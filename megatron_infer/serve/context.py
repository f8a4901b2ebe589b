"""Code from elsewhere in the repository before the prompt: in the family's own format, or else as comment lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_infer.languages import language_at
from megatron_infer.llm import LLM
from megatron_infer.text.fim_prompt import FimPrompt

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


def with_context(
    llm: LLM, prompt: FimPrompt, snippets: Sequence[Snippet], max_new_tokens: int
) -> tuple[FimPrompt, int]:
    """`snippets`, the most relevant last, before `prompt`, and how many did not fit. Takes its time: it tokenizes."""
    wanted = [snippet for snippet in snippets if snippet.text.strip()]
    room = (llm.max_model_len - min(max_new_tokens, llm.max_model_len // 2)) // _SHARE
    mark, close = ("", "") if llm.fim.takes_extra_files else _comment(prompt, wanted)
    kept: list[tuple[str, str]] = []
    for snippet in reversed(wanted):
        path = " ".join(snippet.path.split()) or _NAMELESS
        text = comment_lines(path, snippet.text, mark, close) if mark else snippet.text
        if len(text) <= room * _CHARACTERS_PER_TOKEN:
            room -= len(llm.tokenizer.encode(f"{path}\n{text}\n"))
            if room >= 0:
                kept.insert(0, (path, text))
                continue
        break
    if not kept:
        return prompt, len(wanted)
    if mark:
        prompt = replace(prompt, prefix="".join(text for _, text in kept) + prompt.prefix)
    else:
        prompt = replace(prompt, path=prompt.path or _NAMELESS, extra_files=tuple(kept))
    return prompt, len(wanted) - len(kept)


def _comment(prompt: FimPrompt, snippets: Sequence[Snippet]) -> tuple[str, str]:
    """What opens and closes a comment line, by the first path that tells."""
    paths = [prompt.path, *(snippet.path for snippet in reversed(snippets))]
    language = next(filter(None, map(language_at, paths)), None)
    return (language.open, language.close) if language else ("# ", "")


def comment_lines(path: str, text: str, mark: str, close: str) -> str:
    """A snippet as comment lines, its path in front; marks in it that would end the comment are left out."""
    end = close.strip()
    lines = [f"Path: {path}", *(text.replace(end, "") if end else text).strip("\n").splitlines()]
    return "".join(f"{mark}{line}{close}".rstrip() + "\n" for line in lines)
