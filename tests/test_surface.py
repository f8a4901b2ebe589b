"""The shape of the codebase: who may import whom, the public names, the README's tree, the `kernels/` name."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_infer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_infer"

LAYERS: list[tuple[str, ...]] = [
    ("checks", "world", "files", "languages"),
    ("ending", "gguf_header", "hub"),
    ("quantization", "rope_scaling", "text.tokenizer_files", "text.gguf_tokenizer"),
    ("model_config", "sampling_params", "text.tokenizer"),
    ("config", "text.text_stream", "text.fim_prompt", "text.fim_cut"),
    ("text.fim", "text.healing"),
    ("engine.step", "engine.logits", "engine.request", "cache.block_pool"),
    ("engine.block_table", "engine.shared_prefill", "engine.drafter"),
    ("engine.plan",),
    ("engine.scheduler",),
    ("ops", "tensor_parallel.rendezvous"),
    ("kernels", "tensor_parallel.backend"),
    ("profile",),
    ("ops.reference", "ops.vendor", "tensor_parallel.shared_memory", "tensor_parallel.symmetric_memory"),
    ("tensor_parallel.process_groups",),
    ("dispatch",),
    ("tensor_parallel.group",),
    ("cache.kv_cache", "model.formats", "model.rope", "model.weights"),
    ("model.manifest", "model.pieces", "model.tensor_files", "model.naming"),
    ("model.layers", "model.directory", "model.gguf_file"),
    ("model.checkpoint",),
    ("model.transformer",),
    ("engine.batch", "engine.sampler", "engine.topology", "engine.resolve"),
    ("engine.graphs", "engine.memory"),
    ("engine.runner", "engine.interrupts"),
    ("engine.worker", "engine.resolve"),
    ("engine.engine", "engine.bring_up"),
    ("engine.follower",),
    ("completion",),
    ("session",),
    ("calls",),
    ("collective",),
    ("llm",),
    ("commands.options",),
    ("commands.complete", "commands.bench", "eval", "serve"),
    ("__main__",),
]
"""Lowest first. A module may import from layers below its own, and from its own package within its layer."""

NO_TORCH = (
    "checks",
    "gguf_header",
    "text.gguf_tokenizer",
    "ending.scanner",
    "ending.hole",
    "ending.rules",
    "ending.ending",
    "quantization",
    "rope_scaling",
    "model_config",
    "sampling_params",
    "config",
    "text.tokenizer_files",
    "text.tokenizer",
    "languages",
    "text.fim_prompt",
    "text.fim_cut",
    "text.fim",
    "text.healing",
    "cache.block_pool",
    "engine.step",
    "engine.logits",
    "engine.request",
    "engine.block_table",
    "engine.shared_prefill",
    "engine.drafter",
    "engine.plan",
    "engine.scheduler",
)
MAY_IMPORT_KERNELS = (
    "dispatch",
    "tensor_parallel.group",
    "tensor_parallel.shared_memory",
    "tensor_parallel.symmetric_memory",
)
OPTIONAL_IMPORTS_INSIDE_FUNCTIONS = (
    "dispatch.select", "tensor_parallel.symmetric_memory", "eval.command", "eval.cases", "hub", "model.gguf_file",
    "__main__",
)  # fmt: skip


SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, suffixes in (
        (PACKAGE, (".py",)),
        (ROOT / "checkpoints_convert", (".py",)),
        (ROOT / "kernels", (".py", ".cpp", ".h")),
    )
    for path in folder.rglob("*")
    if path.suffix in suffixes
)


def modules() -> dict[str, ast.Module]:
    """Dotted name (without the package) -> syntax tree, for every module but the package's own __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(tree: ast.AST) -> set[str]:
    """Full dotted names of what is imported anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def own_imports(tree: ast.AST) -> set[str]:
    """Those of the package's own modules, without its name; not of its public names."""
    own = {i.removeprefix("megatron_infer.") for i in imports_of(tree) if i.startswith("megatron_infer.")}
    return own - set(megatron_infer.__all__)


def layer_of(name: str) -> int | None:
    """Layer of a dotted name: the entry that is its longest head."""
    best: tuple[int, int] | None = None
    for level, entries in enumerate(LAYERS):
        for entry in entries:
            if (name == entry or name.startswith(entry + ".")) and (best is None or len(entry) > best[0]):
                best = (len(entry), level)
    return best[1] if best else None


def test_arrows_only_go_down() -> None:
    wrong = []
    for name, tree in modules().items():
        own = layer_of(name)
        if own is None:
            assert name.count(".") == 0, f"{name} has no layer; add it to LAYERS"
            assert not imports_of(tree), f"{name}/__init__.py imports something; give it a layer"
            continue
        for imported in imports_of(tree):
            if not imported.startswith("megatron_infer."):
                continue
            target = imported.removeprefix("megatron_infer.")
            level = layer_of(target)
            same_room = name.split(".")[0] == target.split(".")[0]
            if level is not None and (level > own or (level == own and not same_room and name != target)):
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def room_of(name: str) -> str:
    """The folder of a module, or itself where it lies at the top."""
    return name.split(".")[0]


def test_no_folders_import_each_other_in_a_circle() -> None:
    """LAYERS cuts folders into modules; here a folder is one thing."""
    rooms = {room_of(name) for name in modules()} | {"kernels"}
    imported: dict[str, set[str]] = {room: set() for room in rooms}
    for name, tree in modules().items():
        targets = {
            room_of(i.removeprefix("megatron_infer.")) for i in imports_of(tree) if i.startswith("megatron_infer.")
        }
        imported[room_of(name)] |= targets & rooms - {room_of(name)}
    while free := {room for room in imported if not imported[room] & imported.keys()}:
        imported = {room: targets for room, targets in imported.items() if room not in free}
    assert not imported, {room: sorted(targets & imported.keys()) for room, targets in imported.items()}


APPLICATIONS = ("eval", "serve", "commands", "__main__")
FACADE = (
    "llm",
    "ending",
    "model_config",
    "completion",
    "text.fim",
    "text.fim_prompt",
    "languages",
    "sampling_params",
    "config",
    "checks",
    "files",
    "hub",
    "world",
    "profile",
    "kernels",
)
"""What applications may import beside each other: modules, and whole folders."""


def is_facade(name: str) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in FACADE)


def test_applications_reach_no_deeper_than_the_llm() -> None:
    wrong = []
    for name, tree in modules().items():
        if room_of(name) in APPLICATIONS:
            deep = [i for i in own_imports(tree) if room_of(i) not in APPLICATIONS and not is_facade(i)]
            wrong += [f"{name} imports {i}" for i in deep]
    assert not wrong, wrong


def test_the_lowest_layers_do_without_torch() -> None:
    trees = modules()
    for name in NO_TORCH:
        assert not [i for i in imports_of(trees[name]) if i.split(".")[0] == "torch"], name


def test_only_ops_and_the_group_import_kernels() -> None:
    for name, tree in modules().items():
        if any(i.startswith("megatron_infer.kernels") for i in imports_of(tree)):
            assert name.startswith(MAY_IMPORT_KERNELS), name


def test_imports_stand_at_the_top() -> None:
    for name, tree in modules().items():
        inner = [
            node.lineno
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not inner or name in OPTIONAL_IMPORTS_INSIDE_FUNCTIONS, f"{name}: imports at lines {inner}"


def test_nothing_unpickles_or_evaluates() -> None:
    for name, tree in modules().items():
        assert not imports_of(tree) & {"pickle", "marshal", "shelve", "dill"}, name
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec"), f"{name}:{node.lineno}"
            if called == "torch.load":
                weights_only = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert [ast.unparse(v) for v in weights_only] == ["True"], f"{name}:{node.lineno}"


def test_public_names() -> None:
    assert set(megatron_infer.__all__) == {
        "LLM",
        "Completion",
        "EngineConfig",
        "FimOptions",
        "FimPrompt",
        "SamplingParams",
        "__version__",
    }
    for name in megatron_infer.__all__:
        assert hasattr(megatron_infer, name)


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, megatron_infer\n"
        "heavy = {'transformers', 'fastapi', 'uvicorn', 'flash_attn', 'apex', 'triton', 'tests'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_kernels_folder_shadows_no_package() -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "sys.exit(0 if spec is None or 'site-packages' in str(spec.origin) or spec.origin is None else spec.origin)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.loader is None or spec.origin is None or "site-packages" in spec.origin
    probe = "from transformers.utils import is_kernels_available; import transformers; is_kernels_available()"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True)


def test_readme_tree_is_what_is_on_disk() -> None:
    """README.md names the folders; the tables below a folder's heading in two more pages name its files."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    named: list[str] = []
    for page in ("docs/structure.md", "docs/evaluation.md"):
        folder = ""
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = re.fullmatch(r"#+ `([\w/]+/)`", line)
                folder = heading[1] if heading else ""
            elif folder and (row := re.match(r"\| `([\w./]+)` \|", line)):
                named.append(folder + row[1])
    assert len(named) == len(set(named)), "named twice"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(line) for line in listing.splitlines() if (ROOT / line).exists()]
    there = {file.as_posix() for file in files} | {f"{file.parent.as_posix()}/" for file in files}
    assert not set(named) - there, "named, but not on disk"
    modules = {f.as_posix() for f in files if f.parts[0] == "megatron_infer" and f.suffix == ".py"}
    missing = {name for name in modules - set(named) if not name.endswith("__init__.py")}
    assert not missing, "add a line to docs/structure.md, or of eval to docs/evaluation.md"
    folders = {f.parts[0] for f in files if len(f.parts) > 1 and not f.parts[0].startswith(".")}
    assert not {folder for folder in folders if f"`{folder}/" not in readme}, "not in README.md"


BUDGETS = {
    "megatron_infer/eval": 5_200,
    "megatron_infer/serve": 1_800,
    "megatron_infer/data": 900,
    "megatron_infer/commands": 750,
    "megatron_infer/text": 1_250,
    "kernels": 5_600,
    "checkpoints_convert": 2_700,
    "megatron_infer": 11_800,
}
"""Lines of code by folder, without those of a folder named before it. Needing more means that something else can go."""


def num_lines(path: str) -> int:
    return (ROOT / path).read_text(encoding="utf-8").count("\n")


def test_every_room_keeps_to_its_budget() -> None:
    left, used = set(SHIPPED), {}
    for folder in BUDGETS:
        inside = {path for path in left if path.startswith(folder + "/")}
        used[folder] = sum(map(num_lines, inside))
        left -= inside
    assert not left
    assert not {folder: lines for folder, lines in used.items() if lines > BUDGETS[folder]}, used


@pytest.mark.parametrize("path", SHIPPED)
def test_files_can_be_held_in_the_head(path: str) -> None:
    assert num_lines(path) <= 350
    if path.endswith(".py"):
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert docstring, f"{path} has no docstring"
        assert docstring.count("\n") < 6
