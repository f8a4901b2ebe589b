"""Text as token sequences: windows of plain text, and fill-in-the-middle holes with their true answer.

What calibration and evaluation read; every choice is seeded, so that equal files give equal sequences.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_infer.model_config import ModelConfig
from megatron_infer.text.fim import FimPrompt, load_fim
from megatron_infer.text.tokenizer import Tokenizer, load_tokenizer

WINDOW_TOKENS = 512
_SHORTEST_WINDOW = 64
_SHORTEST_HOLE = 3


@dataclass(frozen=True)
class Text:
    """A file: its path as the model is told of it, and its contents."""

    path: str
    text: str


@dataclass(frozen=True)
class Hole:
    """A prompt and the answer that was cut out: `ids` is both, the answer from `start` on; `ends`: ids that end it."""

    ids: list[int]
    start: int
    ends: frozenset[int]


def read_texts(places: Iterable[str | Path]) -> list[Text]:
    """UTF-8 files, and all of those below directories, in sorted order; what is not UTF-8 is left out there.

    Raises:
        ValueError: a place does not exist, a file is not text, or there is no text at all.
    """
    texts = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist; name text files or directories of them")
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                if place.is_dir():
                    continue
                raise ValueError(f"{path} is not UTF-8 text") from None
            texts.append(Text(path.relative_to(place).as_posix() if place.is_dir() else path.name, text))
    if not any(text.text.strip() for text in texts):
        raise ValueError(f"there is no text in {', '.join(map(str, places))}; name other files")
    return texts


def windows(texts: Sequence[Text], tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """At most `count` sequences of at most WINDOW_TOKENS ids, drawn from all that the texts can be cut into."""
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    step = WINDOW_TOKENS - len(head)
    found = []
    for text in texts:
        ids = tokenizer.encode(text.text)
        found += [[*head, *ids[start : start + step]] for start in range(0, len(ids), step)]
    long = [ids for ids in found if len(ids) >= _SHORTEST_WINDOW] or found
    return long if len(long) <= count else random.Random(0).sample(long, count)


def holes(texts: Sequence[Text], model_dir: Path, config: ModelConfig, count: int) -> list[Hole]:
    """`count` ends of lines cut out at random places; none where the model's family has no FIM format."""
    tokenizer = load_tokenizer(model_dir, config.vocab_size)
    try:
        fim = load_fim(config.fim, tokenizer)
    except ValueError:
        return []
    lines = [(text, start, end) for text in texts for start, end in _line_spans(text.text)]
    if not fim.orders or not lines:
        return []
    rng = random.Random(0)
    found: list[Hole] = []
    for text, start, end in rng.choices(lines, k=count):
        cut = rng.randrange(start, end - _SHORTEST_HOLE + 1)
        answer = tokenizer.encode(text.text[cut:end], dummy_prefix=False)
        prompt = FimPrompt(text.text[:cut], text.text[end:], text.path)
        encoding = fim.encode(prompt, budget_tokens=WINDOW_TOKENS)
        found.append(Hole([*encoding.ids, *answer], len(encoding.ids), encoding.stop_token_ids))
    return found


def _line_spans(text: str) -> Iterable[tuple[int, int]]:
    """Where the code of every line begins and ends, indentation left out; lines of a few characters are too short."""
    offset = 0
    for line in text.split("\n"):
        start, end = offset + len(line) - len(line.lstrip()), offset + len(line)
        if end - start > _SHORTEST_HOLE:
            yield start, end
        offset = end + 1
