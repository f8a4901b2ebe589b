"""Corpus, tokenizer and fill-in-the-middle samples of the demo checkpoint (see train_demo.py).

The text is CPython's standard library as installed beside the running interpreter (PSF licence). Prompts are laid out
exactly as the engine lays them out for aiXcoder: comment header, guarded suffix, SPM or PSM order.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import hashlib
import io
import itertools
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

BOS, EOS, PAD = 1, 2, 259
PRE, MIDDLE, POST = 260, 261, 262
CONTROL_PIECES = (
    "<pad>",
    "▁<AIX-SPAN-PRE>",
    "▁<AIX-SPAN-MIDDLE>",
    "▁<AIX-SPAN-POST>",
    "▁<AIX-END-TURN>",
    "▁<AIX-SYSTEM>",
    "▁<AIX-USER>",
    "▁<AIX-ASSISTANT>",
)
GUARD = "☺"  # encoded in front of a text and cut off again: the text then gets no dummy space
SKIPPED = (
    "/test", "/idle_test/", "site-packages/", "/encodings/", "/pydoc_data/", "/config-", "__phello__", "_sysconfigdata",
    "/turtledemo/",
)  # fmt: skip
EXPRESSIONS = (
    ast.Call, ast.BinOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.ListComp, ast.GeneratorExp, ast.Dict, ast.List,
    ast.Tuple, ast.IfExp, ast.Attribute, ast.JoinedStr,
)  # fmt: skip
PLAIN_SHARE, SPM_SHARE = 0.25, 0.7
HOLE_SHARES = {"tail": 0.30, "line": 0.18, "statement": 0.16, "expression": 0.16, "arguments": 0.10, "block": 0.10}


@dataclass(frozen=True)
class SourceFile:
    path: str
    text: str
    held_out: bool


def read_corpus(limit: int | None = None) -> list[SourceFile]:
    """Every usable standard-library file but the tests, or the first `limit` with at least one of them held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if any(part in "/" + path for part in SKIPPED) or not 400 < file.stat().st_size < 300_000:
            continue
        text = _usable_text(file)
        if text is not None:
            # 5 % of the files are held out, by a hash of the path.
            held_out = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0
            files.append(SourceFile(path, text, held_out))
        if limit and len(files) >= limit and any(f.held_out for f in files):
            break
    return files


def _usable_text(file: Path) -> str | None:
    """Text of a file that parses and is mostly ASCII without very long lines, else None."""
    try:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    tabular = sum(ord(c) > 127 for c in text) > 0.02 * len(text) or max(map(len, text.split("\n"))) > 500
    return None if tabular else text


def train_tokenizer(files: list[SourceFile], vocab_size: int, target: Path) -> None:
    """SentencePiece BPE on the training files, then aiXcoder's control pieces put at ids 259 to 266."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_tokenizer_lines(files), model_writer=model, model_type="bpe", byte_fallback=True,
        vocab_size=vocab_size - len(CONTROL_PIECES), character_coverage=0.9999, split_digits=True,
        split_by_unicode_script=False, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", add_dummy_prefix=False, num_threads=2, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    ordinary = list(proto.pieces)[PAD:]
    del proto.pieces[PAD:]
    for name in CONTROL_PIECES:
        proto.pieces.add(piece=name, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL)
    proto.pieces.extend(ordinary)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    target.write_bytes(proto.SerializeToString())


def _tokenizer_lines(files: list[SourceFile]) -> Iterator[str]:
    """Indentation and the code after it as separate sentences, so that no piece spans both."""
    for file in files:
        if file.held_out:
            continue
        for line in file.text.split("\n"):
            code = line.lstrip(" ")
            if code:
                yield code
                if len(code) < len(line):
                    yield line[: len(line) - len(code)]


class Holes:
    """The places of one file where a piece of text may be cut out, by kind, as character offsets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.line_starts = [0]
        for line in text.split("\n")[:-1]:
            self.line_starts.append(self.line_starts[-1] + len(line) + 1)
        self.spans: dict[str, list[tuple[int, int]]] = {kind: [] for kind in HOLE_SHARES}
        for start in self.line_starts:
            end = self.line_end(start)
            start += len(text[start:end]) - len(text[start:end].lstrip())
            if end - start >= 4:
                self.spans["line"].append((start, end))
        self.spans["tail"] = self.spans["line"]
        for node in ast.walk(ast.parse(text)):
            self._add_node(node)

    def line_end(self, offset: int) -> int:
        end = self.text.find("\n", offset)
        return len(self.text) if end < 0 else end

    def _offset(self, line: int, byte_column: int) -> int:
        start = self.line_starts[line - 1]
        chunk = self.text[start : start + byte_column]
        if not chunk.isascii():
            chunk = self.text[start : self.line_end(start)].encode()[:byte_column].decode()
        return start + len(chunk)

    def _add(self, kind: str, first: ast.AST, last: ast.AST, longest: int) -> None:
        start = self._offset(first.lineno, first.col_offset)
        end = self._offset(last.end_lineno, last.end_col_offset)
        if 4 <= end - start <= longest:
            self.spans[kind].append((start, end))

    def _add_node(self, node: ast.AST) -> None:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and body and not isinstance(node, ast.Module):
                self._add("block", body[0], body[-1], 900)
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            self._add("statement", node, node, 500)
        elif isinstance(node, EXPRESSIONS) and node.lineno == node.end_lineno:
            self._add("expression", node, node, 120)
        if isinstance(node, ast.Call) and node.args and not node.keywords:
            self._add("arguments", node.args[0], node.args[-1], 160)

    def draw(self, rng: random.Random, kind: str | None = None) -> tuple[int, int] | None:
        kind = kind or rng.choices(list(HOLE_SHARES), list(HOLE_SHARES.values()))[0]
        if not self.spans[kind]:
            return None
        start, end = rng.choice(self.spans[kind])
        if kind == "tail":
            start = rng.randrange(start, end - 2)
        return start, end


class Samples:
    """Draws training and evaluation samples; every call cuts new holes and new windows."""

    def __init__(self, files: list[SourceFile], tokenizer: Path) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        self.files = files
        self.holes = [Holes(file.text) for file in files]
        self.guard_length = len(self.sp.encode(GUARD))
        self.cumulative = list(itertools.accumulate(len(file.text) for file in files))

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def encode_guarded(self, text: str) -> list[int]:
        return self.sp.encode(GUARD + text)[self.guard_length :]

    def decode(self, ids: list[int]) -> str:
        """Text of ids that follow other text: a leading space is kept."""
        return self.sp.decode(self.sp.encode(GUARD) + ids)[len(GUARD) :]

    def header(self, file: SourceFile) -> str:
        return f"# the file path is: {file.path}\n# the code file is written by Python\n"

    def draw_file(self, rng: random.Random) -> int:
        return bisect.bisect_left(self.cumulative, rng.random() * self.cumulative[-1])

    def draw(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """(context, middle) of one training sample of at most `length` ids; a plain sample is all context."""
        while True:
            index = self.draw_file(rng)
            if rng.random() < PLAIN_SHARE:
                return self.plain(index, rng, length), []
            hole = self.holes[index].draw(rng)
            sample = hole and self.fim(index, hole, rng, length, spm=rng.random() < SPM_SHARE)
            if sample:
                return sample

    def plain(self, index: int, rng: random.Random, length: int, start: int | None = None) -> list[int]:
        file, holes = self.files[index], self.holes[index]
        if start is None:
            start = 0 if rng.random() < 0.25 else rng.choice(holes.line_starts[: -len(holes.line_starts) // 8 or None])
        text = self.header(file) + file.text[start : start + 8 * length]
        ids = [BOS, *self.encode(text)]
        if start + 8 * length >= len(file.text):
            ids.append(EOS)
        return ids[:length]

    def fim(
        self, index: int, hole: tuple[int, int], rng: random.Random, length: int, spm: bool
    ) -> tuple[list[int], list[int]] | None:
        """(prompt, middle + EOS) around one hole, or None where the middle is too long for the window."""
        file, (start, end) = self.files[index], hole
        middle = [*self.encode_guarded(file.text[start:end]), EOS]
        header = self.header(file)
        room = length - len(middle) - len(self.encode(header)) - 4
        if room < length // 2:
            return None
        suffix_room = int(room * rng.uniform(0.05, 0.5))
        suffix = self._head(file.text[end : end + 8 * suffix_room], suffix_room)
        prefix = self._tail(header, file.text[:start], length - len(middle) - len(suffix) - 4)
        if prefix is None:
            return None
        if spm:
            return [BOS, PRE, POST, *suffix, MIDDLE, *prefix], middle
        return [BOS, PRE, *prefix, POST, *suffix, MIDDLE], middle

    def _head(self, text: str, room: int) -> list[int]:
        """The first whole lines of `text` that fit into `room` ids."""
        text = text[: 8 * room]
        while len(ids := self.encode_guarded(text)) > room:
            text = text[: max(text.rfind("\n", 0, int(len(text) * room / len(ids))) + 1, 0)]
        return ids

    def _tail(self, header: str, text: str, room: int) -> list[int] | None:
        """Header and the last whole lines of `text` that fit into `room` ids."""
        if len(text) > 6 * room:
            text = text[text.find("\n", len(text) - 6 * room) + 1 :]
        while len(ids := self.encode(header + text)) > room:
            cut = text.find("\n", int(len(text) * (1 - 0.97 * room / len(ids))))
            if cut < 0:
                return None
            text = text[cut + 1 :]
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the corpus as OUT/train/ and OUT/held_out/.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for file in read_corpus():
        target = out / ("held_out" if file.held_out else "train") / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.text, encoding="utf-8")


if __name__ == "__main__":
    main()
