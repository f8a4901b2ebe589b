"""Prompt layouts, built a second time by hand; header lines byte for byte; cuts that stay while one types."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_infer import languages
from megatron_infer.languages import load_languages
from megatron_infer.text import fim as fim_module
from megatron_infer.text.fim import (
    FimFormat,
    FimOptions,
    FimPrompt,
    load_fim,
    load_preset,
)
from megatron_infer.text.fim_cut import cut_at_step, plan_cut
from megatron_infer.text.fim_prompt import MAX_PROMPT_BYTES, language_of
from megatron_infer.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_tokenizer import CORPUS, build_tiny_tokenizer

BOS, PRE, MIDDLE, POST, END_TURN, PAD = 1, 260, 261, 262, 263, 259
PREFIX, SUFFIX, PATH = "def quick_sort(values):\n    ", "\n    return values\n", "src/sort.py"
HEADER = "# the file path is: src/sort.py\n# the code file is written by Python\n"
TEMPLATES = json.loads(Path(fim_module.__file__).with_name("fim_templates.json").read_text(encoding="utf-8"))
NO_HEADER = ".json .toml .xml .ipynb .proto .el .lisp .fs .vb .gradle .txt .m .v .R .mjs .cjs .pyi"
TEXT = CORPUS.split("<s>")[0]  # the rest holds markers, which raw SentencePiece parses
FRAMED = FimOptions(frame_empty_suffix=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("sp")).parent)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(build_tiny_tokenizer(tmp_path_factory.mktemp("raw_sp"))))


@pytest.fixture(scope="session")
def aixcoder(tokenizer: Tokenizer) -> FimFormat:
    return load_fim("aixcoder", tokenizer)


def bare(raw: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Upstream's way to encode a suffix: a sacrificial character takes the dummy space."""
    return raw.encode("☺" + text)[len(raw.encode("☺")) :]


# ---- aiXcoder's layouts ---------------------------------------------------------------------------------------------


def test_spm_is_the_default_order(aixcoder: FimFormat, raw) -> None:
    expected = [BOS, PRE, POST, *bare(raw, SUFFIX), MIDDLE, *raw.encode(HEADER + PREFIX)]
    prompt = FimPrompt(PREFIX, SUFFIX, PATH)
    assert aixcoder.encode(prompt).ids == expected
    assert aixcoder.encode(prompt, options=FimOptions(order="spm")).ids == expected
    assert aixcoder.orders == ("spm", "psm")


def test_psm_order(aixcoder: FimFormat, raw) -> None:
    expected = [BOS, PRE, *raw.encode(HEADER + PREFIX), POST, *bare(raw, SUFFIX), MIDDLE]
    assert aixcoder.encode(FimPrompt(PREFIX, SUFFIX, PATH), options=FimOptions(order="psm")).ids == expected


def test_empty_suffix_is_plain_text_unless_asked_otherwise(aixcoder: FimFormat, raw) -> None:
    text = raw.encode(HEADER + PREFIX)
    prompt = FimPrompt(PREFIX, path=PATH)
    assert aixcoder.encode(prompt).ids == [BOS, *text]
    assert aixcoder.encode(prompt, options=FimOptions(order="psm")).ids == [BOS, *text]
    assert aixcoder.encode(prompt, options=FRAMED).ids == [BOS, PRE, POST, MIDDLE, *text]
    assert aixcoder.encode(prompt, options=replace(FRAMED, order="psm")).ids == [
        BOS,
        PRE,
        *text,
        POST,
        MIDDLE,
    ]


def test_empty_prefix_works(aixcoder: FimFormat, raw) -> None:
    suffix = bare(raw, SUFFIX)
    assert aixcoder.encode(FimPrompt("", SUFFIX)).ids == [BOS, PRE, POST, *suffix, MIDDLE]
    assert aixcoder.encode(FimPrompt("", SUFFIX), options=FimOptions(order="psm")).ids == [
        BOS,
        PRE,
        POST,
        *suffix,
        MIDDLE,
    ]
    with_header = [BOS, PRE, POST, *suffix, MIDDLE, *raw.encode(HEADER)]
    assert aixcoder.encode(FimPrompt("", SUFFIX, PATH)).ids == with_header
    assert aixcoder.encode(FimPrompt("", "", PATH)).ids == [BOS, *raw.encode(HEADER)]


@pytest.mark.parametrize("options", [FimOptions(), FRAMED])
def test_an_empty_prompt_is_refused(aixcoder: FimFormat, options: FimOptions) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; give it"):
        aixcoder.encode(FimPrompt("", "", "notes.unknown"), options=options)


def test_only_the_suffix_loses_the_dummy_space(aixcoder: FimFormat, tokenizer: Tokenizer) -> None:
    space = tokenizer.id_of("▁")
    assert aixcoder.encode(FimPrompt("\n", "\n")).ids == [BOS, PRE, POST, 13, MIDDLE, space, 13]


def test_v2_is_tokenized_as_one_string(tokenizer: Tokenizer, raw) -> None:
    v2 = load_fim("aixcoder-v2", tokenizer)
    space = tokenizer.id_of("▁")
    ids = v2.encode(FimPrompt("# the", "\n", PATH)).ids
    assert ids[:5] == [1, 260, 262, space, 13]
    assert ids == [BOS, PRE, POST, *raw.encode("\n"), MIDDLE, *raw.encode(HEADER + "# the")]
    assert ids == [BOS, PRE, POST, *tokenizer.encode("\n"), MIDDLE, *tokenizer.encode(HEADER + "# the")]


def test_stop_tokens(aixcoder: FimFormat, tokenizer: Tokenizer) -> None:
    expected = {BOS, 2, PAD, END_TURN, PRE, MIDDLE, POST}
    assert aixcoder.stop_token_ids == expected
    assert aixcoder.encode(FimPrompt("x")).stop_token_ids == expected


@pytest.mark.parametrize("side", ["prefix", "suffix", "path"])
def test_markers_in_any_text_stay_text(aixcoder: FimFormat, side: str) -> None:
    texts = {"prefix": "a = 1", "suffix": "b = 2", "path": "a.py"}
    texts[side] = "x ▁<AIX-SPAN-MIDDLE> <AIX-SPAN-PRE></s><s> <AIX-END-TURN>.py"
    for order in aixcoder.orders:
        ids = aixcoder.encode(FimPrompt(**texts), options=FimOptions(order=order)).ids
        assert [i for i in ids if i in aixcoder.stop_token_ids] == [BOS, PRE, POST, MIDDLE]


# ---- header lines ---------------------------------------------------------------------------------------------------


def test_languages_cover_what_upstream_s_tables_reach() -> None:
    assert len(load_languages()) == 317
    table = json.loads(Path(languages.__file__).with_name("languages.json").read_text(encoding="utf-8"))
    assert len(table) == 84
    assert sum(len(entry["extensions"].split()) for entry in table.values()) == 317, "an extension is listed twice"


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("a/b.py", "# the file path is: a/b.py\n# the code file is written by Python\n"),
        ("b.h", "// the file path is: b.h\n// the code file is written by C++\n"),
        ("b.c", "// the file path is: b.c\n// the code file is written by C\n"),
        ("b.lua", "// the file path is: b.lua\n// the code file is written by Lua\n"),
        ("b.tcl", "// the file path is: b.tcl\n// the code file is written by Augeas\n"),
        ("b.swift", "// the file path is: b.swift\n// the code file is written by swift\n"),
        ("b.html", "<!--the file path is: b.html-->\n<!--the code file is written by HTML-->\n"),
        ("b.ml", "(*the file path is: b.ml*)\n(*the code file is written by OCaml*)\n"),
        ("b.f90", "!the file path is: b.f90\n!the code file is written by Fortran\n"),
        ("b.css", "/* the file path is: b.css */\n/* the code file is written by CSS */\n"),
        ("b.st", "'' the file path is: b.st\n'' the code file is written by Smalltalk\n"),
        ("b.rst", ".. the file path is: b.rst\n.. the code file is written by reStructuredText\n"),
        ("b.sql", "-- the file path is: b.sql\n-- the code file is written by SQL\n"),
        ("b.tsx", "// the file path is: b.tsx\n// the code file is written by TypeScript with JSX\n"),
        ("b.sas", "* the file path is: b.sas\n* the code file is written by SAS\n"),
    ],
)
def test_header_lines_byte_for_byte(aixcoder: FimFormat, path: str, lines: str) -> None:
    assert aixcoder.header(path) == lines
    assert aixcoder.header(path, "language") == lines.split("\n")[1] + "\n"
    assert aixcoder.header(path, "none") == ""


@pytest.mark.parametrize(
    "path",
    [
        *(f"b{extension}" for extension in NO_HEADER.split()),
        "",
        "a",
        "Makefile",
        "Dockerfile",
        "b.c++",
        "b.PY",
        "b.py.",
        "py",
        "b.x-py",
        "b.sml",
        "a.py/b",
    ],
)
def test_no_header_at_all_for_other_paths(aixcoder: FimFormat, path: str) -> None:
    assert aixcoder.header(path) == ""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.py", "Python"), ("A.PY", "Python"), ("src\\a.pyi", "Python"), ("b.ipynb", "Python"), ("a.C", "C++"),
        ("a.c", "C"), ("a.H++", "C++"), ("Dockerfile", "Dockerfile"), ("/srv/v1.2/Makefile", "Makefile"),
        ("x/CMakeLists.txt", "CMake"), ("build.gradle", "Groovy"), ("a.mjs", "JavaScript"), ("A.JS", "JavaScript"),
        ("~/.bashrc", "Shell"), ("notes.txt", ""), ("py", ""), ("", ""), ("a.py/b", ""),
    ],
)  # fmt: skip
def test_the_rules_of_endings_know_more_files_than_header_lines(aixcoder: FimFormat, path: str, name: str) -> None:
    assert language_of(FimPrompt("x", path=path)) == name
    if path not in ("a.py", "a.C", "a.c"):
        assert aixcoder.header(path) == "", "upstream has no header line for it"


# ---- presets --------------------------------------------------------------------------------------------------------


def test_fim_eval_preset_layout(aixcoder: FimFormat, raw) -> None:
    preset = load_preset("fim-eval")
    assert (preset.prefix_tokens, preset.suffix_tokens) == (7936, 7936)
    ids = aixcoder.encode(FimPrompt(PREFIX, SUFFIX, "test.py"), options=preset).ids
    text = raw.encode("# the code file is written by Python\n" + PREFIX)
    assert ids == [BOS, PRE, *text, POST, *bare(raw, SUFFIX), MIDDLE]


def test_side_limits_decode_and_encode_again(aixcoder: FimFormat, raw) -> None:
    options = FimOptions(order="psm", header="language", prefix_tokens=20, suffix_tokens=15)
    encoding = aixcoder.encode(FimPrompt(TEXT, TEXT, "test.py"), options=options)
    ids = raw.encode(TEXT)
    # raw.decode takes one leading space for the dummy prefix, as the reference harness' decode does.
    prefix, suffix = raw.decode(ids[-20:]), raw.decode(ids[:15])
    text = raw.encode("# the code file is written by Python\n" + prefix)
    assert encoding.ids == [BOS, PRE, *text, POST, *bare(raw, suffix), MIDDLE]
    assert encoding.dropped_prefix_tokens == len(ids) - 20
    assert encoding.dropped_suffix_tokens == len(ids) - 15


def test_explicit_order_beats_the_preset_s(aixcoder: FimFormat) -> None:
    ids = aixcoder.encode(FimPrompt(PREFIX, SUFFIX, PATH), options=replace(load_preset("fim-eval"), order="spm")).ids
    assert ids[:3] == [BOS, PRE, POST]


def test_unknown_presets_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no preset 'x'; known are fim-eval"):
        load_preset("x")
    with pytest.raises(ValueError, match="header must be one of full, language, none"):
        FimOptions(header="path")
    with pytest.raises(ValueError, match="prefix_tokens must be at least 1"):
        FimOptions(prefix_tokens=0)


# ---- budget ---------------------------------------------------------------------------------------------------------


def step_of(room: int) -> int:
    return room // 8 // 64 * 64 if room // 8 >= 64 else max(1, room // 8)


@given(prefix=st.integers(0, 5000), suffix=st.integers(0, 5000), room=st.integers(1, 4000), line=st.integers(1, 200))
@settings(max_examples=500, deadline=None)
def test_cuts_fit_and_waste_little(prefix: int, suffix: int, room: int, line: int) -> None:
    least = plan_cut(prefix, suffix, room)
    drop_p, drop_s = (
        cut_at_step(drop, side, room, lambda i: i % line == 0)
        for drop, side in zip(least, (prefix, suffix), strict=True)
    )
    kept_p, kept_s, eighth = prefix - drop_p, suffix - drop_s, max(1, room // 8)
    assert min(drop_p, drop_s, kept_p, kept_s) >= 0
    assert kept_p + kept_s <= room
    if prefix + suffix <= room:
        assert drop_p == drop_s == 0
    else:
        assert kept_p + kept_s > room - 2 * eighth, "more was cut than steps explain"
    quarter = room // 4
    assert drop_p == 0 or kept_p > room - quarter - eighth, "the prefix did not get its three quarters"
    assert drop_s == 0 or kept_s > quarter - eighth, "the suffix did not get its quarter"
    for drop in (drop_p, drop_s):
        step = max(1, room // 12)
        fits = [i for i in range(drop // step * step, drop // step * step + step // 2 + 1) if i and i % line == 0]
        assert drop in (0, prefix, suffix) or drop == (fits or [drop // step * step])[0], "not at a line's end"


@given(start=st.integers(0, 3000), suffix=st.integers(0, 3000), room=st.integers(64, 3000), line=st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_one_more_token_rarely_moves_a_cut(start: int, suffix: int, room: int, line: int) -> None:
    grown = 400
    plans = []
    for n in range(start, start + grown):
        least = plan_cut(n, suffix, room)
        sides = zip(least, (n, suffix), strict=True)
        plans.append(tuple(cut_at_step(drop, side, room, lambda i: i % line == 0) for drop, side in sides))
    moves = sum(a != b for a, b in pairwise(plans))
    # Each side moves at most once per step; both move only around the point where the prefix outgrows its share.
    assert moves <= grown // max(1, room // 12) + 3


def test_prompts_within_the_budget_are_whole(aixcoder: FimFormat) -> None:
    prompt = FimPrompt(PREFIX, SUFFIX, PATH)
    whole = aixcoder.encode(prompt)
    assert aixcoder.encode(prompt, budget_tokens=len(whole.ids)) == whole
    cut = aixcoder.encode(prompt, budget_tokens=len(whole.ids) - 1)
    assert len(cut.ids) < len(whole.ids)
    assert cut.dropped_prefix_tokens + cut.dropped_suffix_tokens > 0


@pytest.mark.parametrize("order", ["spm", "psm"])
def test_a_cut_prompt_keeps_header_and_the_text_around_the_cursor(aixcoder: FimFormat, raw, order: str) -> None:
    encoding = aixcoder.encode(FimPrompt(TEXT, TEXT, PATH), options=FimOptions(order=order), budget_tokens=300)
    head, body, suffix = raw.encode(HEADER), bare(raw, TEXT), bare(raw, TEXT)
    prefix_ids = head + body[encoding.dropped_prefix_tokens :]
    suffix_ids = suffix[: len(suffix) - encoding.dropped_suffix_tokens]
    if order == "spm":
        assert encoding.ids == [BOS, PRE, POST, *suffix_ids, MIDDLE, *prefix_ids]
    else:
        assert encoding.ids == [BOS, PRE, *prefix_ids, POST, *suffix_ids, MIDDLE]
    assert 300 - 2 * step_of(300) < len(encoding.ids) <= 300


def test_without_header_the_prefix_is_cut_at_its_own_ids(aixcoder: FimFormat, raw) -> None:
    encoding = aixcoder.encode(FimPrompt(TEXT), budget_tokens=100)
    assert encoding.ids[1:] == raw.encode(TEXT)[-len(encoding.ids) + 1 :]
    assert 100 - step_of(99) < len(encoding.ids) <= 100


@given(typed=st.text("abc x=(\n", min_size=1, max_size=60), budget=st.integers(150, 700), suffixes=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_a_keystroke_keeps_the_token_chain(aixcoder: FimFormat, typed: str, budget: int, suffixes: int) -> None:
    """Until a cut moves, prompt n+1 begins with prompt n, but for the tokens of the line that is being typed."""
    text, suffix = TEXT, "\n" + TEXT[: 300 * suffixes]
    encodings = [
        aixcoder.encode(FimPrompt(text + typed[:n], suffix, PATH), budget_tokens=budget) for n in range(len(typed) + 1)
    ]
    moves = 0
    for before, after in pairwise(encodings):
        assert len(after.ids) <= budget
        drops = [(e.dropped_prefix_tokens, e.dropped_suffix_tokens) for e in (before, after)]
        if drops[0] != drops[1]:
            moves += 1
            continue
        shared = next((i for i, (a, b) in enumerate(zip(before.ids, after.ids, strict=False)) if a != b), None)
        assert shared is None or shared >= len(before.ids) - 6
    grown = len(encodings[-1].ids) + sum(drops[1]) - len(encodings[0].ids)
    assert moves <= 2 + max(0, grown + 200) // step_of(budget - 60)


@given(budget=st.integers(100, 300), typed=st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_text_far_from_the_cursor_costs_nothing(tokenizer: Tokenizer, budget: int, typed: int) -> None:
    fim = load_fim("aixcoder", tokenizer)
    prefix, suffix = TEXT * 100, TEXT * 100
    seen: list[int] = []
    encode = tokenizer.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda text, **kw: (seen.append(len(text)), encode(text, **kw))[1])
        before = fim.encode(FimPrompt(prefix, suffix, PATH), budget_tokens=budget)
        after = fim.encode(FimPrompt(prefix + "a" * typed, suffix, PATH), budget_tokens=budget)
    assert max(seen) <= 2 * 32 * budget + len(HEADER)
    for encoding in (before, after):
        assert budget - 2 * step_of(budget) < len(encoding.ids) <= budget
        assert encoding.ids[:3] == [BOS, PRE, POST]
        assert encoding.dropped_prefix_tokens > len(prefix) // 32 - 2 * budget
        assert encoding.dropped_suffix_tokens > len(suffix) // 32 - 2 * budget
    middle = [encoding.ids.index(MIDDLE) for encoding in (before, after)]
    assert before.ids[: middle[0]] == after.ids[: middle[1]], "the suffix moved although only the prefix grew"
    assert tokenizer.decode(after.ids).endswith("a" * typed if typed < budget // 2 else "a")


def test_a_budget_below_the_fixed_part_is_refused(aixcoder: FimFormat) -> None:
    with pytest.raises(ValueError, match=r"alone exceeds its budget by \d+ tokens; raise the budget"):
        aixcoder.encode(FimPrompt(TEXT, SUFFIX, "long/" * 40 + "a.py"), budget_tokens=40)


def common_head(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("where", ["begin", "middle", "end"])
@pytest.mark.parametrize(
    ("family", "order", "suffix_mark"),
    [
        ("aixcoder", "spm", None),
        ("aixcoder", "psm", "▁<AIX-SPAN-POST>"),
        ("qwen2.5-coder", "spm", None),
        ("qwen2.5-coder", "psm", "<|fim_suffix|>"),
        ("codestral", "spm", None),
        ("mellum", "spm", None),
    ],
)
def test_a_typing_trace_is_laid_out_anew_only_in_coarse_steps(
    tmp_path: Path, tokenizer: Tokenizer, family: str, order: str, suffix_mark: str | None, where: str
) -> None:
    """200 keystrokes in a file much longer than the context: each prompt begins as the last one, but for a few tokens.

    With the prefix first, that holds up to the suffix, which stands behind what is typed.
    """
    used = tokenizer if family == "aixcoder" else family_tokenizer(tmp_path, family)
    fim, budget, typed = load_fim(family, used), 900, TEXT[300:500]
    prefix = TEXT if where == "begin" else TEXT * 40
    suffix = TEXT[:100] if where == "end" else TEXT * 40
    files = () if family == "aixcoder" else OTHERS
    prompts = [
        fim.encode(
            FimPrompt(prefix + typed[:n], suffix, PATH, files),
            budget_tokens=budget,
            options=FimOptions(order=order),
        ).ids
        for n in range(len(typed) + 1)
    ]
    moves = 0
    for before, after in pairwise(prompts):
        assert budget * 3 // 4 - 8 < len(after) <= budget
        end = len(before) if suffix_mark is None else before.index(used.id_of(suffix_mark))
        moves += common_head(before, after) < end - 8
    assert moves <= 3 + len(used.encode(typed)) // (budget // 16)


# ---- families -------------------------------------------------------------------------------------------------------

EXPECTED_LAYOUTS = {
    ("deepseek-coder", "psm"): "<s> <｜fim▁begin｜> P <｜fim▁hole｜> S <｜fim▁end｜>",
    ("qwen2.5-coder", "psm"): "<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|>",
    ("qwen2.5-coder", "spm"): "<|fim_prefix|> <|fim_suffix|> S <|fim_middle|> P",
    ("starcoder", "psm"): "<fim_prefix> P <fim_suffix> S <fim_middle>",
    ("starcoder", "spm"): "<fim_prefix> <fim_suffix> S <fim_middle> P",
    ("granite", "psm"): "<fim_prefix> P <fim_suffix> S <fim_middle>",
    ("granite", "spm"): "<fim_prefix> <fim_suffix> S <fim_middle> P",
    ("mellum", "spm"): "<fim_suffix> S <fim_prefix> P <fim_middle>",
    ("codestral", "spm"): "<s> [SUFFIX] S [PREFIX] P",
    ("seed-coder", "spm"): "<[fim-suffix]> S <[fim-prefix]> P <[fim-middle]>",
}


def byte_level_tokenizer(directory: Path, pieces: list[str], *, adds_bos: bool = False) -> Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS.split("\n"), trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tok.add_special_tokens(["<s>", "</s>", *pieces])
    tok.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": adds_bos}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


SHARED = {"aixcoder-v2": "aixcoder", "granite": "starcoder", "mellum": "starcoder"}
"""Families whose tokens another one has too."""


def family_tokenizer(directory: Path, family: str) -> Tokenizer:
    data = TEMPLATES["families"][family]
    return byte_level_tokenizer(directory, [*data["tokens"].values(), *data["stop"]])


@pytest.mark.parametrize(("family", "order"), list(EXPECTED_LAYOUTS))
def test_layouts_of_byte_level_families(tmp_path: Path, family: str, order: str) -> None:
    tokenizer = family_tokenizer(tmp_path, family)
    fim = load_fim(family, tokenizer)
    texts = {"P": tokenizer.encode(PREFIX), "S": tokenizer.encode(SUFFIX)}
    expected = [i for w in EXPECTED_LAYOUTS[family, order].split() for i in texts.get(w, [tokenizer.id_of(w)])]
    assert fim.encode(FimPrompt(PREFIX, SUFFIX, PATH), options=FimOptions(order=order)).ids == expected
    known = [o for f, o in EXPECTED_LAYOUTS if f == family]
    assert fim.orders == tuple(known)
    assert (fim.encode(FimPrompt(PREFIX, SUFFIX, PATH)).ids == expected) == (order == known[0])
    assert fim.interactive.order == ("spm" if "spm" in known else None)
    data = TEMPLATES["families"][family]
    assert fim.stop_token_ids == {tokenizer.id_of(p) for p in ("<s>", "</s>", *data["tokens"].values(), *data["stop"])}


def test_layouts_of_codellama(tmp_path: Path) -> None:
    raw = sentencepiece.SentencePieceProcessor(
        model_file=str(build_tiny_tokenizer(tmp_path, extra_pieces=("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")))
    )
    tokenizer = load_tokenizer(tmp_path)
    fim = load_fim("codellama", tokenizer)
    pre, suf, mid, eot = (raw.piece_to_id(p) for p in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    prompt = FimPrompt(PREFIX, SUFFIX, PATH)
    prefix, suffix = raw.encode(PREFIX), bare(raw, SUFFIX)
    assert fim.encode(prompt).ids == [BOS, pre, *prefix, suf, *suffix, mid]
    assert fim.encode(prompt, options=FimOptions(order="spm")).ids == [BOS, pre, suf, *suffix, mid, *prefix]
    assert eot in fim.stop_token_ids


def test_codestral_frames_an_empty_suffix(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "codestral")
    ids = load_fim("codestral", tokenizer).encode(FimPrompt("x = ")).ids
    expected = ["<s>", "[SUFFIX]", "[PREFIX]"]
    assert ids == [*map(tokenizer.id_of, expected), *tokenizer.encode("x = ")]


def test_the_none_family_takes_a_prefix_only(tokenizer: Tokenizer, raw) -> None:
    fim = load_fim("none", tokenizer)
    assert fim.encode(FimPrompt(PREFIX, path=PATH)).ids == [BOS, *raw.encode(PREFIX)]
    assert fim.stop_token_ids == {BOS, 2, PAD}
    with pytest.raises(ValueError, match="'none' cannot take a suffix"):
        fim.encode(FimPrompt(PREFIX, SUFFIX))
    with pytest.raises(ValueError, match="has no order 'spm'; it has none"):
        fim.encode(FimPrompt(PREFIX), options=FimOptions(order="spm"))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_seed_coder_starts_with_bos_where_its_tokenizer_does(tmp_path: Path, adds_bos: bool) -> None:
    pieces = list(TEMPLATES["families"]["seed-coder"]["tokens"].values())
    tokenizer = byte_level_tokenizer(tmp_path, pieces, adds_bos=adds_bos)
    ids = load_fim("seed-coder", tokenizer).encode(FimPrompt("a", "b")).ids
    assert (ids[0] == tokenizer.bos_id) == adds_bos


@pytest.mark.parametrize("family", [f for f in TEMPLATES["families"] if f not in ("none", *SHARED)])
def test_families_are_found_by_their_pieces(tmp_path: Path, family: str, caplog) -> None:
    caplog.set_level("INFO", "megatron_infer")
    assert load_fim(None, family_tokenizer(tmp_path, family)).name == family
    (note,) = [record for record in caplog.records if "FIM family" in record.message]
    assert f"FIM family: {family}, by the tokenizer's control tokens" in note.message
    assert "--fim or fim=... names another" in note.message


@pytest.mark.parametrize("family", SHARED)
def test_where_several_families_have_the_tokens_the_log_names_them(tmp_path: Path, family: str, caplog) -> None:
    caplog.set_level("INFO", "megatron_infer")
    tokenizer = family_tokenizer(tmp_path, family)
    assert load_fim(None, tokenizer).name == SHARED[family]
    assert f"it has those of {'granite, ' * (family == 'mellum')}{family} too" in caplog.text
    caplog.clear()
    assert load_fim(family, tokenizer).name == family
    assert not caplog.records, "nothing was guessed"


def test_detection_explains_what_it_looked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert load_fim(None, tokenizer).name == "aixcoder"
    with pytest.raises(ValueError, match=r'<\|fim_prefix\|>.*use fim="none"'):
        load_fim(None, byte_level_tokenizer(tmp_path, ["<|fim_prefix|>"]))


def test_a_wrong_family_is_refused_by_its_missing_pieces(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lacks <fim_prefix>, <fim_suffix>, <fim_middle>, so it is not"):
        load_fim("granite", tokenizer)
    with pytest.raises(ValueError, match="no FIM family 'x'; known are aixcoder"):
        load_fim("x", tokenizer)


def test_an_unknown_order_is_refused(aixcoder: FimFormat) -> None:
    with pytest.raises(ValueError, match="order must be one of None, spm, psm; got 'mps'"):
        FimOptions(order="mps")


# ---- other files ----------------------------------------------------------------------------------------------------

OTHERS = (("a.py", "x = 1\n"), ("b.py", "repo_name"))


def test_qwen_repository_layout(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "qwen2.5-coder")
    fim = load_fim(None, tokenizer)
    repo, sep = tokenizer.id_of("<|repo_name|>"), tokenizer.id_of("<|file_sep|>")
    # "{content}\n<|file_sep|>", as Qwen's own examples: a file's last line break stays, and one follows.
    before = [repo, *tokenizer.encode("demo\n"), sep, *tokenizer.encode("a.py\nx = 1\n\n")]
    before += [sep, *tokenizer.encode("b.py\nrepo_name\n"), sep]
    for options in (FimOptions(), FimOptions(order="spm")):
        ids = fim.encode(FimPrompt("p", "s", "c.py", extra_files=OTHERS, repository="demo"), options=options).ids
        plain = fim.encode(FimPrompt("p", "s", "c.py"), options=options).ids
        assert ids == [*before, *tokenizer.encode("c.py\n"), *plain]
    ids = fim.encode(FimPrompt("p", "", "c.py", extra_files=OTHERS, repository="demo")).ids
    assert ids == [*before, *tokenizer.encode("c.py\np")], "without a suffix, text goes on"
    with pytest.raises(ValueError, match="alone exceeds its budget"):
        fim.encode(FimPrompt("p", "s", "c.py", extra_files=OTHERS), budget_tokens=20)


def test_codestral_lists_other_files_before_the_prefix(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "codestral")
    fim = load_fim(None, tokenizer)
    text = "+++++ a.py\nx = 1\n\n+++++ b.py\nrepo_name\n\n+++++ c.py\np"
    encoding = fim.encode(FimPrompt("p", "s", "c.py", OTHERS))
    assert encoding.ids == fim.encode(FimPrompt(text, "s")).ids
    assert encoding.stop == ("\n+++++ ", "+++++ ")
    assert fim.encode(FimPrompt("p", "s", "c.py")).stop == ()


def test_deepseek_lists_other_files_as_its_readme_does(tmp_path: Path) -> None:
    tokenizer = family_tokenizer(tmp_path, "deepseek-coder")
    fim = load_fim(None, tokenizer)
    files = (("utils.py", "import torch\n"), ("model.py", "import torch.nn\n"))
    text = "#utils.py\nimport torch\n\n\n# model.py\nimport torch.nn\n\n\n# main.py\n"
    prompt = FimPrompt("from utils", "\n", "main.py", files)
    bos, *framed = fim.encode(FimPrompt("from utils", "\n", "main.py")).ids
    assert fim.encode(prompt).ids == [bos, *tokenizer.encode(text), *framed]
    assert fim.encode(replace(prompt, suffix="")).ids == [bos, *tokenizer.encode(text + "from utils")]


def test_mellum_names_files_before_the_suffix(tmp_path: Path) -> None:
    """The example of its model card."""
    tokenizer = family_tokenizer(tmp_path, "mellum")
    name = tokenizer.id_of("<filename>")
    files = (("utils.py", "def multiply(x, y):\n    return x * y\n"), ("config.py", "DEBUG = True"))
    prompt = FimPrompt("def f():\n", "\nprint(f())", "example.py", files)
    texts = ["utils.py\ndef multiply(x, y):\n    return x * y\n", "config.py\nDEBUG = True\n", "example.py\n"]
    before = [i for text in texts for i in (name, *tokenizer.encode(text))]
    fim = load_fim("mellum", tokenizer)
    assert fim.encode(prompt).ids == before + fim.encode(replace(prompt, extra_files=())).ids


@pytest.mark.parametrize("family", ["aixcoder", "aixcoder-v2"])
def test_families_without_a_format_for_other_files_say_so(tokenizer: Tokenizer, family: str) -> None:
    with pytest.raises(ValueError, match=f"no format for extra_files is documented for the FIM family '{family}'"):
        load_fim(family, tokenizer).encode(FimPrompt("p", "s", "c.py", OTHERS))


def test_other_files_need_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give path too"):
        load_fim(None, family_tokenizer(tmp_path, "qwen2.5-coder")).encode(FimPrompt("p", "s", "", OTHERS))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix": None}, "prefix must be a string, not NoneType"),
        ({"prefix": "a", "suffix": b"x"}, "suffix must be a string, not bytes"),
        ({"prefix": "a", "path": "x\ny.py"}, "line break"),
        ({"prefix": "a", "extra_files": (("a.py",),)}, "pairs of strings"),
        ({"prefix": "a", "extra_files": (("a\r.py", ""),)}, "line break"),
    ],
)
def test_bad_prompts_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FimPrompt(**fields)  # type: ignore[arg-type]


def test_extra_files_may_be_lists() -> None:
    assert FimPrompt("a", extra_files=[["a.py", "x"]]).extra_files == (("a.py", "x"),)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["prefix", "suffix", "path"])
def test_lone_surrogates_are_named_with_their_field(aixcoder: FimFormat, side: str) -> None:
    texts = {"prefix": "a", "suffix": "b", "path": "c.py", side: "ab\udcff.py"}
    with pytest.raises(ValueError, match=rf"^{side} has a lone surrogate \(U\+DCFF\) at position 2"):
        aixcoder.encode(FimPrompt(**texts))


def test_huge_prompts_are_refused_before_they_are_tokenized(tokenizer: Tokenizer, monkeypatch) -> None:
    fim = load_fim("aixcoder", tokenizer)
    half = "é" * (MAX_PROMPT_BYTES // 4)
    monkeypatch.setattr(type(tokenizer), "_encode", lambda *_: pytest.fail("tokenized all the same"))
    with pytest.raises(ValueError, match="8388609 bytes of text, and 8388608 are allowed"):
        fim.encode(FimPrompt(half, half + "x"))


# ---- the bundled checkpoint -----------------------------------------------------------------------------------------


def test_the_demo_checkpoint_s_tokenizer_is_laid_out_like_aixcoder_s() -> None:
    path = Path(__file__).resolve().parents[2] / "demo" / "tokenizer.model"
    fim, raw = load_fim(None, load_tokenizer(path.parent)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert fim.name == "aixcoder"
    text = raw.encode(HEADER + PREFIX)
    expected = [BOS, PRE, POST, *bare(raw, SUFFIX), MIDDLE, *text]
    assert fim.encode(FimPrompt(PREFIX, SUFFIX, PATH)).ids == expected
    assert fim.stop_token_ids == {BOS, 2, PAD, END_TURN, PRE, MIDDLE, POST}
