"""A small SentencePiece tokenizer laid out like aiXcoder-7B's: bytes at ids 3 to 258, control pieces at 260 to 266."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

PIECES = sp_pb2.ModelProto.SentencePiece
PAD = 259
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

CORPUS = (
    "# the file path is: src/tools/sort.py\n# the code file is written by Python\n"
    "def quick_sort(values):\n    if len(values) <= 1:\n        return values\n    pivot = values[0]\n"
    "    left = [v for v in values[1:] if v < pivot]\n    right = [v for v in values[1:] if v >= pivot]\n"
    "    return quick_sort(left) + [pivot] + quick_sort(right)\n\n"
    "class Stack:\n    def __init__(self, items=None):\n        self.items = list(items or ())\n\n"
    "    def push(self, item):\n        self.items.append(item)\n        return self\n\n"
    "    def pop(self):\n        if not self.items:\n            raise IndexError('pop from an empty stack')\n"
    "        return self.items.pop()\n\n"
    "// the file path is: main.cpp\n// the code file is written by C++\n"
    "int main(int argc, char** argv) {\n  for (int i = 0; i < argc; ++i) { std::cout << argv[i]; }\n  return 0;\n}\n"
    "import os, sys, json\nfrom pathlib import Path\nwith open(path, encoding='utf-8') as f:\n    data = json.load(f)\n"
    "while True:\n    try:\n        x = y * 2 + 3 - 4 / 5 % 6\n    except ValueError as error:\n        print(error)\n"
    "assert a == b and c != d, f'{a} is not {b}' ; _ = lambda x: x ** 2 & ~7 | 8 ^ 9 ; @property ; \"text\"\n"
    "\\ ` ? $\n"
    "<s> </s> <unk> <AIX-SPAN-PRE> <AIX-SPAN-MIDDLE> <AIX-SPAN-POST> <AIX-END-TURN>\n"
    "Zürich, café, naïve, 快速排序算法\n"
)


def build_tiny_tokenizer(directory: Path, extra_pieces: tuple[str, ...] = ()) -> Path:
    """Write `tokenizer.model` (about 500 pieces) into `directory` and return its path.

    Control pieces are user-defined symbols, the type a careless loader would parse out of user text. `extra_pieces` are
    added as ordinary pieces that merge before all others.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=496,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    proto = sp_pb2.ModelProto.FromString(model.getvalue())
    ordinary = list(proto.pieces)[PAD:]
    del proto.pieces[PAD:]
    for name in CONTROL_PIECES:
        proto.pieces.add(piece=name, score=0.0, type=PIECES.USER_DEFINED)
    proto.pieces.extend(ordinary)
    known = {piece.piece for piece in proto.pieces}
    for name in (name for name in extra_pieces if name not in known):
        proto.pieces.add(piece=name, score=1.0, type=PIECES.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "tokenizer.model"
    target.write_bytes(proto.SerializeToString())
    return target
