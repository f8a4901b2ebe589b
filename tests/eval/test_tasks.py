"""Each benchmark's fields, prompt, settings, cuts and output row are its own harness's; a wrong line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_infer.eval.cases import Case, Task, read_cases
from megatron_infer.eval.score.metrics import METRICS
from megatron_infer.eval.tasks import postprocess
from megatron_infer.eval.tasks.registry import TASKS, generic_task, task
from megatron_infer.text.fim import FimFormat, FimPrompt, load_fim, load_preset
from megatron_infer.text.tokenizer import load_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "demo"

INFILLING = {
    "task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "double", "prompt": "def double(x):\n",
    "suffix": "\n    return y\n", "canonical_solution": "    y = 2 * x",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip
SANTACODER = {
    "name": "HumanEval_0", "language": "py", "prompt": "def f(x):\n", "suffix": "    return y\n",
    "canonical_solution": "    y = x\n", "tests": "",
}  # fmt: skip
SAFIM = {
    "task_id": "block_completion_000001", "lang": "python",
    "prompt": "for i in x:\n    # TODO: Your code here\nprint(1)\n",
    "eval_prompt": "for i in x:\n    {{completion}}\nprint(1)\n", "ground_truth": "print(i)", "unit_tests": "[]",
}  # fmt: skip
CROSSCODEEVAL = {
    "prompt": "import b\n\nx = b.", "groundtruth": "call(1)", "right_context": "\nprint(x)\n",
    "metadata": {"task_id": "project_cc_python/62", "repository": "r", "file": "pkg/a.py"},
    "crossfile_context": {
        "text": "# all five\n\n",
        "list": [
            {"retrieved_chunk": f"def f{i}():\n    pass", "filename": f"b{i}.py", "score": 9 - i} for i in range(5)
        ],
    },
}  # fmt: skip
REPOEVAL = {
    "prompt": "import b\n\nx = 1", "metadata": {
        "task_id": "pytorch_rl/7", "ground_truth": "y = b.call(x)", "fpath_tuple": ["pytorch_rl", "a.py"], "line_no": 3,
    },
}  # fmt: skip
FIM_EVAL = {
    "task_id": "python_1", "task_type": "method_body", "pre_mask_code": "def f():\n", "post_mask_code": "\n",
    "canonical_solution": "    return 1",
}  # fmt: skip
HUMANEVAL = {**INFILLING, "task_id": "HumanEval/0", "canonical_solution": "    y = 2 * x\n    return y\n"}
MBPP = {
    "task_id": 11, "text": "Double a number.", "code": "def double(x): return 2 * x", "test_setup_code": "two = 2",
    "test_list": ["assert double(two) == 4", "assert double(0) == 0"],
}  # fmt: skip
FIM = {"prefix": "a = ", "suffix": "\n", "path": "src/m.rs", "reference": "1", "scenario": "single_line"}

ROWS: dict[str, dict[str, Any]] = {
    "humaneval-infilling": INFILLING, "santacoder-fim": SANTACODER, "safim": SAFIM, "crosscodeeval": CROSSCODEEVAL,
    "fim-eval": {**FIM_EVAL, "language": "python"}, "humaneval": HUMANEVAL, "mbpp": MBPP, "fim": FIM,
    "repoeval": REPOEVAL, "text": {"task_id": "t", "text": "x = 1\n", "path": "a.py"},
}  # fmt: skip
IDS = {
    "humaneval-infilling-single-line": "SingleLineInfilling/HumanEval/0/L0",
    "humaneval-infilling-multi-line": "MultiLineInfilling/HumanEval/0/L0_L1",
    "humaneval-infilling-random-span": "RandomSpanInfilling/HumanEval/0/1",
    "humaneval-infilling-random-span-light": "RandomSpanInfillingLight/HumanEval/0/1",
    "safim-block": "block_completion_000001", "safim-control": "control_completion_000001",
    "safim-api": "api_completion_000001",
}  # fmt: skip


def row_for(name: str) -> dict[str, Any]:
    row = ROWS[max((key for key in ROWS if name.startswith(key)), key=len)]
    return {**row, "task_id": IDS[name]} if name in IDS else row


@pytest.fixture(scope="module")
def aixcoder() -> FimFormat:
    return load_fim(None, load_tokenizer(DEMO))


def passes(each: Task, case: Case, completion: str) -> bool:
    """Runs a program of this file's own; the model's code is never run like this."""
    assert each.program is not None
    try:
        exec(compile(each.program(case, completion), "program", "exec"), {})
    except Exception:
        return False
    return True


# ---- all tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_reads_its_row_and_names_what_it_needs(name: str) -> None:
    each = task(name)
    assert each.name == name and each.about
    case = each.read(row_for(name))
    assert case.task_id and case.row == row_for(name) and (case.prompt.prefix or case.reference)
    assert all(metric in METRICS for metric in each.metrics)
    finished = each.finish(case, "x = 1\n")
    output = each.predict(case, finished)
    assert output["task_id"] == case.task_id and finished in output.values()
    json.dumps(output)


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_field_is_refused_by_line_and_name(name: str, tmp_path: Path) -> None:
    row = dict(row_for(name))
    field = next(f for f in ("prompt", "prefix", "pre_mask_code", "text") if f in row)
    del row[field]
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row_for(name)) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    missing = "prompt" if name == "mbpp" else field
    with pytest.raises(ValueError, match=rf"line 2: no field '{missing}', which task '{name}' reads"):
        read_cases(file, task(name))


@pytest.mark.parametrize("name", TASKS)
def test_a_field_of_the_wrong_kind_is_refused(name: str) -> None:
    row = {**row_for(name)}
    row |= {f: 7 for f in ("prompt", "prefix", "pre_mask_code", "text") if f in row}
    with pytest.raises(ValueError, match="must be text, not int"):
        task(name).read(row)


def test_an_unknown_task_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no task 'safim'; known are fim, humaneval-infilling-single-line, .*mbpp"):
        task("safim")


def test_every_task_of_the_field_is_there() -> None:
    infilling = [f"humaneval-infilling-{kind}" for kind in ("single-line", "multi-line", "random-span")]
    others = ["santacoder-fim", "safim-block", "safim-control", "safim-api", "crosscodeeval", "crosscodeeval-bm25"]
    nl2code = ["fim-eval", "humaneval", "mbpp", "fim", "humaneval-infilling-random-span-light"]
    assert not {*infilling, *others, *nl2code} - TASKS.keys()


# ---- prompts as token ids ------------------------------------------------------------------------------------------


def test_an_empty_suffix_is_still_a_hole_where_a_hole_is_asked_for(aixcoder: FimFormat) -> None:
    roles = {name: aixcoder._ids[name][0] for name in ("pre", "post", "middle")}
    for name in TASKS.keys() - {"text"}:
        each = task(name)
        row = {**row_for(name), "suffix": "", "post_mask_code": "", "right_context": ""}
        row["prompt"] = row.get("prompt", "").removesuffix("\nprint(1)\n")  # SAFIM's hole is marked in the prompt
        case = each.read(row)
        assert case.prompt.suffix == ""
        ids = aixcoder.encode(case.prompt, options=each.options).ids
        framed = [role for i in ids for role, token in roles.items() if i == token]
        if name.startswith(("crosscodeeval-left", "mbpp", "repoeval")) or name == "humaneval" or name == "text":
            assert framed == []
        elif each.options.order == "psm":
            assert framed == ["pre", "post", "middle"] and ids[-1] == roles["middle"]
        else:
            assert framed == ["pre", "post", "middle"] and ids[-1] != roles["middle"], "the family's own order is SPM"


def test_header_lines_are_those_of_the_published_settings(aixcoder: FimFormat) -> None:
    def header(name: str) -> str:
        case = task(name).read(row_for(name))
        return aixcoder.header(case.prompt.path, task(name).options.header)

    assert header("fim-eval") == header("fim-eval-python") == "# the code file is written by Python\n"
    assert header("crosscodeeval") == "# the file path is: pkg/a.py\n# the code file is written by Python\n"
    assert header("fim") == "// the file path is: src/m.rs\n// the code file is written by Rust\n"
    for name in ("humaneval-infilling-single-line", "santacoder-fim", "safim-api", "crosscodeeval-left", "humaneval"):
        assert header(name) == ""


# ---- one by one ----------------------------------------------------------------------------------------------------


def test_generic_rows_fall_back_on_path_and_content() -> None:
    case = task("fim").read(FIM)
    assert (case.language, case.reference, case.scenario) == ("rust", "1", "single_line")
    assert case.task_id.startswith("sha256-")
    assert task("fim").read({**FIM, "reference": "2", "more": 1}).task_id == case.task_id
    changed = [{"prefix": "b"}, {"suffix": ""}, {"path": "m.rs"}]
    assert case.task_id not in {task("fim").read({**FIM, **change}).task_id for change in changed}
    bare = task("fim").read({"prefix": "a", "suffix": "b", "reference": None, "task_id": 3})
    assert (bare.task_id, bare.language, bare.reference, bare.scenario) == ("3", "", None, "")


def test_two_rows_without_an_id_and_with_the_same_hole_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(FIM) + "\n" + json.dumps(FIM) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: task_id 'sha256-.*' stands in line 1 already"):
        read_cases(file, task("fim"))


def test_generic_fields_can_be_named_and_are_then_needed() -> None:
    mapped = generic_task(
        prefix_field="before", suffix_field="after", path_field="file", id_field="key", reference_field="middle",
        language_field="lang", scenario_field="kind",
    )  # fmt: skip
    row = {"before": "a", "after": "b", "file": "x.py", "key": "k", "middle": "m", "lang": "C#", "kind": "line"}
    case = mapped.read(row)
    assert case.prompt == FimPrompt("a", "b", "x.py")
    assert (case.task_id, case.reference, case.language, case.scenario) == ("k", "m", "csharp", "line")
    for field in row:
        with pytest.raises(KeyError, match=field):
            mapped.read({name: value for name, value in row.items() if name != field})


def test_infilling_programs_join_prompt_completion_suffix_and_test() -> None:
    for name in ("single-line", "multi-line", "random-span", "random-span-light"):
        each = task(f"humaneval-infilling-{name}")
        case = each.read(row_for(each.name))
        assert case.prompt == FimPrompt(INFILLING["prompt"], INFILLING["suffix"]) and case.scenario == name
        assert case.cluster == "HumanEval/0"
        expected = "".join(INFILLING[f] for f in ("prompt", "canonical_solution", "suffix"))
        assert each.program is not None and case.reference is not None
        assert each.program(case, case.reference) == f"{expected}\n{INFILLING['test']}\ncheck(double)"
        assert passes(each, case, case.reference)
        assert not passes(each, case, "    y = 3 * x")


def test_humaneval_stops_where_the_paper_stops() -> None:
    each = task("humaneval")
    case = each.read(HUMANEVAL)
    assert case.prompt == FimPrompt(HUMANEVAL["prompt"]), "no suffix, no path"
    for stop in ("\nclass A:", "\ndef g():", "\n# more", "\nif __name__:", "\nprint(1)"):
        finished = each.finish(case, "    return 2 * x" + stop)
        assert finished == "    return 2 * x"
        assert any(stop.startswith(text) for text in each.sampling.stop)
    assert passes(each, case, "    return 2 * x") and not passes(each, case, "    return x")


def test_mbpp_asks_with_a_docstring_and_one_test_and_runs_all() -> None:
    each = task("mbpp")
    case = each.read(MBPP)
    assert case.task_id == "11"
    assert case.prompt.prefix == '"""\nDouble a number.\nassert double(two) == 4\n"""\n'
    assert passes(each, case, "def double(x):\n    return 2 * x\n")
    assert not passes(each, case, "def double(x):\n    return 4\n"), "the second test fails"
    sanitized = {
        "task_id": 2,
        "prompt": "Root.",
        "test_imports": ["import math"],
        "test_list": ["assert r(4) == math.sqrt(4)"],
    }
    assert passes(each, each.read(sanitized), "def r(x):\n    return x ** 0.5\n")
    assert each.finish(case, 'def f(): pass\n"""\nmore') == "def f(): pass"
    with pytest.raises(ValueError, match="list of at least one"):
        each.read({**MBPP, "test_list": []})


def test_santacoder_rows_are_named_by_language_and_name() -> None:
    each = task("santacoder-fim")
    case = each.read({**SANTACODER, "name": "humaneval-HumanEval_75.json-L24"})
    assert (case.task_id, case.cluster) == (
        "python/humaneval-HumanEval_75.json-L24",
        "python/humaneval-HumanEval_75.json",
    )
    assert each.predict(case, "y") == {"task_id": case.task_id, "completion": "y", "language": "python"}
    assert {each.read({**SANTACODER, "language": name}).language for name in ("js", "java")} == {"javascript", "java"}
    nameless = {name: value for name, value in SANTACODER.items() if name != "name"}
    first, second = (each.read({**nameless, "suffix": suffix}).task_id for suffix in ("a", "b"))
    assert first.startswith("python/sha256-") and first != second


def test_data_of_another_task_is_refused() -> None:
    """The fields of these are the same; only their ids tell."""
    for name, row in (
        ("humaneval-infilling-single-line", row_for("humaneval-infilling-multi-line")),
        ("humaneval-infilling-random-span", row_for("humaneval-infilling-random-span-light")),
        ("humaneval", row_for("humaneval-infilling-single-line")),
        ("safim-block", row_for("safim-api")),
    ):
        with pytest.raises(ValueError, match=rf"is of the task '.*', not of '{name}'; check --data"):
            task(name).read(row)
    assert task("humaneval-infilling-multi-line").read({**INFILLING, "task_id": "mine/1"}).task_id == "mine/1"
    assert task("fim").read({**FIM, "task_id": "HumanEval/1"}).task_id == "HumanEval/1"


def test_safim_prompts_are_split_at_the_placeholder_of_their_language() -> None:
    case = task("safim-block").read(SAFIM)
    assert case.prompt == FimPrompt("for i in x:\n    ", "\nprint(1)\n")
    java = {**SAFIM, "task_id": IDS["safim-api"], "lang": "java", "prompt": "f(/* TODO: Your code here */);"}
    assert task("safim-api").read(java).prompt == FimPrompt("f(", ");")
    for wrong in ({"prompt": "no hole"}, {"eval_prompt": "{{completion}}{{completion}}"}, {"lang": "rust"}):
        with pytest.raises(ValueError, match=r"once|must be one of"):
            task("safim-block").read({**SAFIM, **wrong})
    sampling = task("safim-control").sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.2, 0.95, 128)


def test_fim_eval_takes_the_language_from_the_task_or_the_row() -> None:
    case = task("fim-eval-cpp").read(FIM_EVAL)
    assert case.prompt == FimPrompt("def f():\n", "\n", "test.cpp")
    assert (case.language, case.scenario) == ("cpp", "method_body")
    assert task("fim-eval").read({**FIM_EVAL, "language": "cplus"}).language == "cpp"
    with pytest.raises(ValueError, match="name the task fim-eval-python"):
        task("fim-eval").read(FIM_EVAL)
    options, preset = task("fim-eval").options, load_preset("fim-eval")
    assert (options.order, options.prefix_tokens, options.suffix_tokens) == ("psm", 7936, 7936)
    assert options.header == preset.header == "language"
    assert task("fim-eval").finish(case, "    return 1</s>x") == "    return 1"
    assert task("fim-eval").predict(case, "y") == {"task_id": "python_1", "prediction": "y"}


def test_crosscodeeval_prompts_with_and_without_context() -> None:
    prefix, suffix, path = CROSSCODEEVAL["prompt"], CROSSCODEEVAL["right_context"], "pkg/a.py"
    three = "# Here are some relevant code fragments from other files of the repo:\n\n" + "".join(
        f"# the below code fragment can be found in:\n# b{i}.py\n# def f{i}():\n#     pass\n\n" for i in range(3)
    )
    expected = {
        "crosscodeeval": FimPrompt(prefix, suffix, path),
        "crosscodeeval-bm25": FimPrompt(three + prefix, suffix, path),
        "crosscodeeval-left": FimPrompt(prefix, "", path),
        "crosscodeeval-left-bm25": FimPrompt("# all five\n\n" + prefix, "", path),
    }
    for name, prompt in expected.items():
        case = task(name).read(CROSSCODEEVAL)
        assert case.prompt == prompt
        assert (case.task_id, case.language, case.reference) == ("project_cc_python/62", "python", "call(1)")
        assert task(name).finish(case, "call(1)\ny = 2\n") == "call(1)"
        assert task(name).predict(case, "call(1)") == {"task_id": "project_cc_python/62", "pred": "call(1)"}
    for file, language in (("A.java", "java"), ("a.ts", "typescript"), ("a.tsx", "typescript"), ("A.cs", "csharp")):
        row = {**CROSSCODEEVAL, "metadata": {"task_id": "1", "file": file}}
        assert task("crosscodeeval").read(row).language == language
    with pytest.raises(ValueError, match="none of CrossCodeEval's languages"):
        task("crosscodeeval").read({**CROSSCODEEVAL, "metadata": {"task_id": "1", "file": "a.go"}})
    with pytest.raises(ValueError, match="must be an object"):
        task("crosscodeeval").read({**CROSSCODEEVAL, "metadata": "x"})


def test_repoeval_goes_on_below_its_prompt() -> None:
    for kind in ("line", "api"):
        case = task(f"repoeval-{kind}").read(REPOEVAL)
        assert case.prompt == FimPrompt("import b\n\nx = 1\n") and case.reference == "y = b.call(x)"
        assert (case.task_id, case.scenario, case.cluster) == ("pytorch_rl/7", kind, "pytorch_rl/a.py")
        assert (task(f"repoeval-{kind}").sampling.max_new_tokens, case.language) == (100, "python")
    with pytest.raises(ValueError, match="must be an object"):
        task("repoeval-line").read({**REPOEVAL, "metadata": []})


# ---- post-processing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "statement"),
    [
        ("b\nc = d\n", "b"),
        ("f(\n    1,\n    2)\ny = 3\n", "f(\n    1,\n    2)"),
        ("f(1)  \nz", "f(1)"),
        ("f(1)", "f(1)"),
        ("f(1) ", "f(1) "),
        ("f(\n", "f(\n"),
        ("\nb\n", "\nb"),
        ("", ""),
    ],
)
def test_a_python_statement_ends_with_the_first_line_that_parses(completion: str, statement: str) -> None:
    """A break right at the start ends nothing, whether or not the prompt parses."""
    assert postprocess.crosscodeeval_statement("python", "a = ", completion) == statement
    assert postprocess.crosscodeeval_statement_bug_compatible("python", "a = ", completion) == statement


def test_a_python_statement_is_the_shortest_prefix_by_trying_all() -> None:
    prompt, completion = "if a:\n    b = [", "1,\n    2]; c = '''\n'''\nd = 3\ne = 4\n"
    tried = []
    for end in range(1, len(completion)):
        try:
            compile(prompt + completion[:end], "x", "exec")
        except SyntaxError:
            continue
        if completion[end] == "\n":
            tried.append(completion[:end].rstrip())
    assert postprocess.crosscodeeval_statement("python", prompt, completion) == tried[0]


def test_a_statement_of_braces_ends_with_the_first_mark_except_where_the_published_one_does_not() -> None:
    for completion, meant, published in (
        ("a(); b();", "a();", "a();"),
        ("if (x) { y }", "if (x) {", "if (x) {"),
        ("a()", "a()", "a()"),
        ("; rest", ";", "; rest"),
        ("}\n}", "}", "}\n}"),
        ("", "", ""),
    ):
        assert postprocess.crosscodeeval_statement("java", "", completion) == meant
        assert postprocess.crosscodeeval_statement_bug_compatible("java", "", completion) == published


def test_line_comments_are_removed_outside_strings_only() -> None:
    assert postprocess.remove_line_comments('a = \'#\' + "\\"#"  # c\nb  # d', "python") == 'a = \'#\' + "\\"#"  \nb  '
    assert postprocess.remove_line_comments("a // b\nc", "python") == "a // b\nc"
    assert postprocess.remove_line_comments('x = "//"; // c\n#y `//`', "typescript") == 'x = "//"; \n#y `//`'
    assert postprocess.remove_line_comments_bug_compatible('x = "//"; // c\n#y\nz') == 'x = "\n\nz'


BLOCKS = {
    "python": ("for i in x:\n    ", "\nprint(1)\n", "a = i\n    print(a)\n", "print(2)\n"),
    "java": ("class A { void f() { while (x) { ", " } } }", "a = 1;\nif (b) { c(); }\n", "}\nd();\n"),
    "cpp": ("int main() { while (x) { ", " } return 0; }", "a = 1;\nif (b) { c(); }\n", "}\nd();\n"),
    "csharp": ("class A { void F() { while (x) { ", " } } }", "a = 1;\nif (b) { C(); }\n", "}\nD();\n"),
}


@pytest.mark.parametrize("language", BLOCKS)
def test_a_block_is_cut_before_what_leaves_it(language: str) -> None:
    before, after, block, beyond = BLOCKS[language]
    cut = postprocess.truncate_line_until_block
    assert cut(language, before, after, block) == block
    assert cut(language, before, after, block + beyond) == block
    assert cut(language, before, after, block + "((\n") == block, "a syntax error is no block"
    assert cut(language, before, after, "") == ""


def test_a_block_in_a_file_that_does_not_parse_stays_whole() -> None:
    assert postprocess.truncate_line_until_block("java", "class { (", ")", "x;\n}\n") == "x;\n}\n"


def test_control_and_call_end_with_their_parenthesis() -> None:
    assert postprocess.truncate_control("python", "\n  x > 1:\n    y\n") == "  x > 1:"
    assert postprocess.truncate_control("python", " \n") == ""
    assert postprocess.truncate_control("java", "f(a) && b) { c(); }") == "f(a) && b"
    assert postprocess.truncate_control("cpp", "f(a)") == "f(a)"
    assert postprocess.truncate_api_call("np.ones((n, n)).sum()\nx") == "np.ones((n, n))"
    assert postprocess.truncate_api_call("a) + b(c)") == "a)"
    assert postprocess.truncate_api_call("name\nother") == "name\nother"


def test_a_text_is_cut_at_its_earliest_stop() -> None:
    assert postprocess.cut_at("a\nif b\ndef c", ("\ndef", "\nif")) == "a"
    assert postprocess.cut_at("abc", ("x",)) == postprocess.cut_at("abc", ()) == "abc"
