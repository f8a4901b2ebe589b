"""Code from elsewhere in the repository before the prompt: in the family's own format, or else as comment lines."""

from __future__ import annotations

from dataclasses import replace

from megatron_infer.languages import Language, language_at
from megatron_infer.llm import LLM
from megatron_infer.text.fim_prompt import FimPrompt

_SHARE = 2
"""Context may fill one in so many of the tokens that are left for the prompt."""
_CHARACTERS_PER_TOKEN = 32
"""A snippet longer than its budget by this measure is not even tokenized."""
_NAMELESS = "filename"
"""The path of a file whose client does not send one, as llama.cpp's server has it."""


def with_context(llm: LLM, prompt: FimPrompt, max_new_tokens: int) -> tuple[FimPrompt, int]:
    """`prompt` with those of its extra_files that fit, as files or as comment lines of the prefix; how many did not."""
    as_files = llm.fim.takes_extra_files
    wanted = [(path or _NAMELESS, text) for path, text in prompt.extra_files if text.strip()]
    paths = [prompt.path, *(path for path, _ in reversed(wanted))]
    language = next(filter(None, map(language_at, paths)), None)
    room = (llm.max_model_len - min(max_new_tokens, llm.max_model_len // 2)) // _SHARE
    kept: list[tuple[str, str]] = []
    for path, given in reversed(wanted):
        text = given if as_files else comment_lines(path, given, language)
        if len(text) > room * _CHARACTERS_PER_TOKEN:
            break
        room -= len(llm.tokenizer.encode(f"{path}\n{text}\n"))
        if room < 0:
            break
        kept.insert(0, (path, text))
    if as_files and kept:
        prompt = replace(prompt, path=prompt.path or _NAMELESS, extra_files=tuple(kept))
    else:
        prompt = replace(prompt, prefix="".join(text for _, text in kept) + prompt.prefix, extra_files=())
    return prompt, len(wanted) - len(kept)


def comment_lines(path: str, text: str, language: Language | None) -> str:
    """A snippet as comment lines, its path in front; marks in it that would end the comment are left out."""
    mark, close = (language.open, language.close) if language else ("# ", "")
    end = close.strip()
    lines = [f"Path: {path}", *(text.replace(end, "") if end else text).strip("\n").splitlines()]
    return "".join(f"{mark}{line}{close}".rstrip() + "\n" for line in lines)
