"""Cross-file context as CrossCodeEval builds it: BM25 over pieces of a repository's other files, as a comment block.

Either a benchmark brings its retrieved pieces along, or they are found here in a source tree. Knows no task and no
model. The ranking is the rank_bm25 package's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rank_bm25 import BM25Okapi  # type: ignore[import-untyped]

from megatron_infer.eval import syntax
from megatron_infer.eval.cases import Case, Row
from megatron_infer.eval.tasks.fields import language_named
from megatron_infer.eval.tasks.postprocess import comment_mark

CHUNK_LINES = 10
QUERY_LINES = 10
MAX_CHUNKS = 1000
TOP_K = 3
"""Pieces that aiXcoder's CrossCodeEval figures used; the benchmark's own files bring five."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file, blank ones left out. index: which of the file's chunks it is, from 0."""

    path: str
    text: str
    index: int = 0


def with_context(case: Case, files: Mapping[str, str], top_k: int = TOP_K) -> Case:
    """The case with pieces of other files, retrieved for its prefix, as a comment block before that prefix.

    Args:
        files: every source text of the repository by path, relative to its root with forward slashes; the case's own
            file is among them, under the path of the case's prompt.
    Raises ValueError: `files` does not have the case's file; its text would then be retrieved under another name.
    """
    if case.prompt.path not in files:
        raise ValueError(
            f"case {case.task_id!r} is in {case.prompt.path!r}, which is not in the source tree; give the tree's root "
            "from which the paths of the cases count, or leave the retrieval out"
        )
    chunks = retrieve(case.prompt.prefix, case.prompt.path, files, top_k)
    prefix = format_context(chunks, case.language) + case.prompt.prefix
    return replace(case, prompt=replace(case.prompt, prefix=prefix))


def dataset_context(row: Row, language: str, top_k: int | None = None) -> str:
    """The comment block of a CrossCodeEval row: its first `top_k` pieces, or its text as it stands (None).

    A row for which nothing was found has an empty `crossfile_context`, and gets an empty block.
    Raises KeyError if the row has no such field at all, ValueError if it is not as CrossCodeEval writes it.
    """
    context: Any = row["crossfile_context"] or {}
    try:
        if top_k is None:
            return str(context.get("text", ""))
        chunks = [Chunk(piece["filename"], piece["retrieved_chunk"]) for piece in context.get("list", ())[:top_k]]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            "crossfile_context must hold text and list, with filename and retrieved_chunk in each item"
        ) from None
    return format_context(chunks, language)


def retrieve(prefix: str, path: str, files: Mapping[str, str], top_k: int = TOP_K) -> list[Chunk]:
    """The pieces of other files that likely matter at the end of `prefix`, the best first.

    The last ten lines before the cursor are looked up in pieces of ten lines of the other files, near files first, at
    most 1,000; what is returned is the piece that follows each found one in its file, where there is one. Equal
    scores are ordered as there. Source: CrossCodeEval, prompt_builder/augment_with_cfc.py, with the settings
    of run.sh for "rg1". Words are those of `\\w+`; the original runs NLTK's tokenizer first, which splits contractions.
    """
    chunks = [chunk for other in _by_distance(path, files) for chunk in split(other, files[other])][:MAX_CHUNKS]
    query = "\n".join(_filled_lines(prefix)[-QUERY_LINES:])
    if not chunks or not query:
        return []
    scores = BM25Okapi([_WORD.findall(chunk.text) for chunk in chunks]).get_scores(_WORD.findall(query))
    ranked = sorted(
        zip(scores, chunks, strict=True), key=lambda pair: (pair[0], f"{pair[1].path}|{pair[1].index}"), reverse=True
    )
    places = {(chunk.path, chunk.index): chunk for chunk in chunks}
    found: dict[str, Chunk] = {}
    for _, chunk in ranked:
        following = places.get((chunk.path, chunk.index + 1), chunk)
        found.setdefault(following.text, following)
        if len(found) == top_k:
            break
    return list(found.values())


def split(path: str, text: str) -> Iterator[Chunk]:
    """A file in pieces of ten lines that are not blank. A piece without any word is left out and not counted."""
    lines = _filled_lines(text)
    pieces = ("\n".join(lines[start : start + CHUNK_LINES]) for start in range(0, len(lines), CHUNK_LINES))
    for index, piece in enumerate(piece for piece in pieces if _WORD.search(piece)):
        yield Chunk(path, piece, index)


def format_context(chunks: Sequence[Chunk], language: str) -> str:
    """Pieces as the comment block of CrossCodeEval's `crossfile_context.text`; empty for no pieces."""
    if not chunks:
        return ""
    mark = comment_mark(language)
    block = f"{mark} Here are some relevant code fragments from other files of the repo:\n\n"
    for chunk in chunks:
        lines = (f"{mark} {line}" for line in chunk.text.strip("\n").splitlines())
        block += f"{mark} the below code fragment can be found in:\n{mark} {chunk.path}\n" + "\n".join(lines) + "\n\n"
    return block


def read_source_tree(root: str | Path, language: str) -> dict[str, str]:
    """The texts of a language's files below `root`, by path relative to it with forward slashes; links are skipped.

    Raises ValueError if `root` is no directory or has no such file.
    """
    top = Path(root)
    files = {
        path.relative_to(top).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(top.rglob("*"))
        if language_named(syntax.language_of(path)) == language and path.is_file() and not path.is_symlink()
    }
    if not files:
        raise ValueError(f"there is no {language} file below {root}; give the root of a source tree")
    return files


def _filled_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _by_distance(path: str, files: Mapping[str, str]) -> list[str]:
    """The other files, by the number of directories to leave and enter on the way to them, then by path."""
    own = PurePosixPath(path).parts

    def distance(other: str) -> int:
        parts = PurePosixPath(other).parts
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, parts, strict=False)))
        return len(own) + len(parts) - 2 * shared - 2

    return sorted((other for other in files if other != path), key=lambda other: (distance(other), other))
