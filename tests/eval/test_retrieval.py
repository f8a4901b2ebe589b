"""Cross-file context: what BM25 finds by its formula, in CrossCodeEval's words, and never from the case's own file."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_infer.eval.cases import Case
from megatron_infer.eval.tasks.retrieval import (
    Chunk,
    dataset_context,
    format_context,
    read_source_tree,
    retrieve,
    split,
    with_context,
)
from megatron_infer.text.fim import FimPrompt


def source(*names: str) -> str:
    """A file of ten lines per name: one piece each."""
    return "\n".join(f"def {name}_{i}(value): return {name}(value, {i})" for name in names for i in range(10))


FILES = {
    "pkg/main.py": source("main"),
    "pkg/near.py": source("alpha", "beta", "gamma"),
    "pkg/deep/far.py": source("delta", "epsilon"),
    "other.py": source("zeta"),
}


def okapi(query: list[str], documents: list[list[str]]) -> list[float]:
    """BM25, k1 1.5 and b 0.75; a word in more than half of the documents weighs a quarter of the mean idf."""
    average = sum(map(len, documents)) / len(documents)
    holds = Counter(word for document in documents for word in set(document))
    idf = {word: math.log(len(documents) - n + 0.5) - math.log(n + 0.5) for word, n in holds.items()}
    floor = 0.25 * sum(idf.values()) / len(idf)
    idf = {word: value if value >= 0 else floor for word, value in idf.items()}
    scores = []
    for document in documents:
        counts, norm = Counter(document), 1.5 * (1 - 0.75 + 0.75 * len(document) / average)
        scores.append(sum(idf.get(word, 0) * counts[word] * 2.5 / (counts[word] + norm) for word in query))
    return scores


def test_the_piece_after_the_best_match_by_the_formula_comes_first() -> None:
    prefix = "unrelated_line\n" * 30 + "\n" + "\n".join(f"gamma(value, {i}) or beta(value)" for i in range(10))
    others = [path for path in FILES if path != "pkg/main.py"]
    chunks = [chunk for path in others for chunk in split(path, FILES[path])]
    query = re.findall(r"\w+", "\n".join(prefix.split("\n")[-10:]))
    scores = okapi(query, [re.findall(r"\w+", chunk.text) for chunk in chunks])
    best = chunks[max(range(len(chunks)), key=scores.__getitem__)]
    following = next((c for c in chunks if (c.path, c.index) == (best.path, best.index + 1)), best)
    assert retrieve(prefix, "pkg/main.py", FILES, top_k=1) == [following]


def test_a_match_brings_what_follows_it_or_itself_at_the_end_of_a_file() -> None:
    alpha, beta, gamma = split("pkg/near.py", FILES["pkg/near.py"])
    assert retrieve("alpha(alpha, alpha)", "pkg/main.py", FILES, top_k=1) == [beta]
    assert retrieve("gamma(gamma, gamma)", "pkg/main.py", FILES, top_k=1) == [gamma]
    assert alpha.index == 0 and gamma.index == 2


def test_the_query_is_the_last_ten_lines_that_are_not_blank() -> None:
    ten = "\n\n".join(["delta(delta)"] * 10)
    assert retrieve("alpha(alpha)\n" * 50 + ten, "pkg/main.py", FILES) == retrieve(ten, "pkg/main.py", FILES)
    assert retrieve(" \n", "pkg/main.py", FILES) == []


def test_no_piece_comes_twice_and_none_from_the_files_own_text() -> None:
    found = retrieve("main(value) alpha beta", "pkg/main.py", FILES, top_k=50)
    assert len({chunk.text for chunk in found}) == len(found) > 3
    assert all(chunk.path != "pkg/main.py" for chunk in found)
    assert len(retrieve("main(value)", "pkg/main.py", FILES)) == 3
    assert retrieve("main(value)", "pkg/main.py", {"pkg/main.py": FILES["pkg/main.py"]}) == []


def test_near_files_come_first_when_there_are_too_many_pieces() -> None:
    """Of more than 1,000 pieces those of the nearest files are looked through, by directories left and entered."""
    files = {"a/b/own.py": "x", "far.py": source("needle"), "a/b/near.py": source(*(f"hay{i}" for i in range(1000)))}
    assert {chunk.path for chunk in retrieve("needle(needle)", "a/b/own.py", files)} == {"a/b/near.py"}
    files["a/b/near.py"] = source("hay")
    assert retrieve("needle(needle)", "a/b/own.py", files)[0].path == "far.py"


def test_pieces_are_ten_lines_that_are_not_blank() -> None:
    text = "\n\n".join(f"line {i}" for i in range(23)) + "\n" + "}\n" * 7 + "}\n" * 10 + "last\n"
    pieces = list(split("f.py", text))
    assert [len(piece.text.split("\n")) for piece in pieces] == [10, 10, 10, 1], "a piece of braces alone is left out"
    assert [piece.index for piece in pieces] == [0, 1, 2, 3]
    assert pieces[0].text == "\n".join(f"line {i}" for i in range(10))


def test_the_block_reads_as_the_benchmarks_own() -> None:
    chunks = [Chunk("b/c.java", "int x;\n  int y;\n"), Chunk("d.java", "z")]
    assert format_context(chunks, "java") == (
        "// Here are some relevant code fragments from other files of the repo:\n\n"
        "// the below code fragment can be found in:\n// b/c.java\n// int x;\n//   int y;\n\n"
        "// the below code fragment can be found in:\n// d.java\n// z\n\n"
    )
    assert format_context(chunks, "python").startswith("# Here are some relevant code fragments")
    assert format_context([], "java") == ""


def test_a_benchmarks_own_pieces_are_taken_as_they_come() -> None:
    pieces = [{"retrieved_chunk": f"x{i}", "filename": f"f{i}.py", "score": -i} for i in range(5)]
    row = {"crossfile_context": {"text": "# text\n", "list": pieces}}
    assert dataset_context(row, "python") == "# text\n"
    assert dataset_context(row, "python", 2) == format_context([Chunk("f0.py", "x0"), Chunk("f1.py", "x1")], "python")
    for nothing in ({}, "", None):
        assert dataset_context({"crossfile_context": nothing}, "python", 3) == ""
    for wrong in ("text", {"list": [{"filename": "a"}]}, {"list": ["a"]}, [1]):
        with pytest.raises(ValueError, match="crossfile_context must hold"):
            dataset_context({"crossfile_context": wrong}, "python", 3)
    with pytest.raises(KeyError, match="crossfile_context"):
        dataset_context({}, "python", 3)


def test_context_is_put_before_the_prefix_of_a_case_in_the_tree_only() -> None:
    case = Case("c", FimPrompt("alpha(alpha", ")\n", "pkg/main.py"), "x", "python")
    augmented = with_context(case, FILES)
    chunks = retrieve("alpha(alpha", "pkg/main.py", FILES)
    assert augmented.prompt == FimPrompt(format_context(chunks, "python") + "alpha(alpha", ")\n", "pkg/main.py")
    assert (augmented.task_id, augmented.reference) == ("c", "x")
    with pytest.raises(ValueError, match=r"'main.py', which is not in the source tree"):
        with_context(Case("c", FimPrompt("x", "", "main.py"), "x", "python"), FILES)


def test_a_source_tree_is_the_files_of_one_language(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    for name, text in (("a.ts", "a"), ("pkg/b.tsx", "é"), ("c.py", "c"), ("d.txt", "d")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "link.ts").symlink_to(tmp_path / "a.ts")
    (tmp_path / "e.ts").write_bytes(b"\xff")
    assert read_source_tree(tmp_path, "typescript") == {"a.ts": "a", "e.ts": "\ufffd", "pkg/b.tsx": "é"}
    assert read_source_tree(tmp_path, "python") == {"c.py": "c"}
    with pytest.raises(ValueError, match="no java file below"):
        read_source_tree(tmp_path, "java")
