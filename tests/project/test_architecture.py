"""Who may import whom (docs/DESIGN.md): kernels know tensors, the library knows models, and nothing knows the programs."""

import ast
import configparser
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"torch", "qat_kernels"}
PATCH = {"torch", "safetensors", "qat_kernels", "qat_patch"}
# Files; what they may import besides the standard library; and what else inside functions. The first match counts.
LIBRARY = (
    ("kernels/qat_kernels/triton/**/*.py", KERNELS | {"triton"}, set()),
    ("kernels/qat_kernels/fp4/*.py", KERNELS | {"triton"}, set()),
    ("kernels/qat_kernels/self_check/*.py", KERNELS | {"triton"}, set()),
    # Of others, where it is installed.
    ("kernels/qat_kernels/sageattn3.py", KERNELS, {"huggingface_hub", "kernels", "sageattn3"}),
    # The cache itself works without triton; its kernels do not.
    ("kernels/qat_kernels/decode/cache.py", KERNELS, set()),
    ("kernels/qat_kernels/decode/eager.py", KERNELS, set()),
    ("kernels/qat_kernels/decode/*.py", KERNELS | {"triton"}, set()),
    ("kernels/qat_kernels/**/*.py", KERNELS, set()),
    # Imported only once transformers is: a test below makes sure.
    ("qat_patch/hosts/transformers/cache.py", PATCH | {"transformers"}, set()),
    ("qat_patch/checkpoint/quantizer.py", PATCH | {"transformers"}, set()),
    ("qat_patch/hosts/transformers/*.py", PATCH, {"transformers"}),
    ("qat_patch/hosts/diffusers/*.py", PATCH, {"diffusers"}),
    # Imported only once peft has put adapters into a model.
    ("qat_patch/linear/merged_lora.py", PATCH | {"peft"}, set()),
    ("qat_patch/linear/compressed.py", PATCH, {"compressed_tensors"}),
    ("qat_patch/checkpoint/adapters.py", PATCH, {"diffusers", "peft"}),
    ("qat_patch/checkpoint/record.py", PATCH, {"transformers"}),
    ("qat_patch/checkpoint/export.py", PATCH, {"huggingface_hub"}),
    ("qat_patch/checkpoint/model_card.py", PATCH, {"diffusers", "huggingface_hub", "transformers"}),
    ("qat_patch/checkpoint/trust/download.py", PATCH, {"huggingface_hub"}),
    ("qat_patch/checkpoint/trust/allowed_keys.py", PATCH, {"diffusers", "transformers"}),
    ("qat_patch/checkpoint/trust/adapter_keys.py", PATCH, {"peft"}),
    ("qat_patch/checkpoint/hub.py", PATCH, {"huggingface_hub"}),
    ("qat_patch/checkpoint/load.py", PATCH, {"diffusers", "peft", "transformers"}),
    # Others' attention is timed where it is installed.
    ("qat_patch/bench/peers.py", PATCH, {"flash_attn", "flash_attn_interface", "flashinfer", "sageattention", "sageattn3"}),
    ("qat_patch/bench/harness.py", PATCH, {"triton"}),
    ("qat_patch/bench/figure_5.py", PATCH, {"matplotlib"}),
    ("qat_patch/measure/doctor.py", PATCH, {"accelerate", "diffusers", "peft", "transformers", "triton"}),
    ("qat_patch/measure/sensitivity.py", PATCH, {"matplotlib"}),
    ("qat_patch/measure/harness.py", PATCH, {"lm_eval"}),
    ("qat_patch/measure/videos.py", PATCH, {"skimage"}),
    # The programs of `qat-patch`, each imported when it runs.
    ("qat_patch/commands/prepare_wan_data.py", PATCH | {"diffusers", "tqdm"}, set()),
    ("qat_patch/commands/wan_clips.py", PATCH | {"av", "diffusers", "numpy", "PIL"}, set()),
    ("qat_patch/commands/*.py", PATCH, {"diffusers", "huggingface_hub", "transformers"}),
    ("qat_patch/**/*.py", PATCH, set()),
)
# Rooms: a package, or a module that stands beside packages. What each may know of the others of its library; no room may
# know itself by way of another. `*` stands for all that are named above it.
ROOMS = {
    "qat_kernels": {
        "qat_kernels.spec": set(),
        "qat_kernels.mask": set(),
        "qat_kernels.transforms": set(),
        "qat_kernels.nvfp4": {"spec", "transforms"},
        "qat_kernels.smoothing": {"spec"},
        "qat_kernels.reference": {"spec", "mask", "nvfp4", "smoothing"},
        "qat_kernels.varlen": {"spec", "mask", "reference"},
        "qat_kernels.ran": set(),
        "qat_kernels.verdicts": {"spec"},
        "qat_kernels.arguments": {"spec", "mask", "varlen", "verdicts"},
        "qat_kernels.triton": {"spec", "mask", "smoothing", "reference", "varlen"},
        "qat_kernels.fp4": {"spec", "mask", "varlen", "triton"},
        "qat_kernels.sageattn3": {"spec", "mask", "varlen", "triton"},
        "qat_kernels.self_check": {"spec", "mask", "reference", "varlen", "verdicts", "triton", "fp4", "sageattn3"},
        "qat_kernels.dispatch": {"spec", "verdicts", "arguments", "triton", "fp4", "sageattn3"},
        "qat_kernels.kv_only": {"spec", "nvfp4", "ran", "varlen", "dispatch", "derivatives"},
        "qat_kernels.ops": {"spec", "mask", "ran", "reference", "varlen", "arguments", "dispatch", "sageattn3"},
        "qat_kernels.derivatives": {"spec", "mask", "transforms", "arguments", "ops"},
        "qat_kernels.api": {
            "spec",
            "mask",
            "transforms",
            "varlen",
            "verdicts",
            "arguments",
            "dispatch",
            "kv_only",
            "ops",
            "derivatives",
        },
        "qat_kernels.decode": {
            "spec",
            "ran",
            "nvfp4",
            "reference",
            "verdicts",
            "arguments",
            "dispatch",
            "transforms",
            "api",
            "triton",
        },
    },
    "qat_patch": {
        "qat_patch.version": set(),
        "qat_patch.versions": set(),
        "qat_patch.config_reader": set(),
        "qat_patch.config": {"config_reader"},
        "qat_patch.layer": set(),
        "qat_patch.metadata": {"config", "config_reader", "layer"},
        "qat_patch.hosts": {"config", "layer", "metadata"},
        "qat_patch.first_call": {"layer", "hosts"},
        "qat_patch.plan": {"versions", "config", "layer", "hosts", "first_call"},
        "qat_patch.self_check": {"version"},
        "qat_patch.implementation": {"plan", "self_check"},
        "qat_patch.handle": {"config", "layer", "plan", "self_check", "implementation"},
        "qat_patch.patch": {"config", "hosts", "plan", "implementation", "handle"},
        "qat_patch.linear": {"config", "config_reader", "hosts"},
        "qat_patch.servers": {"layer", "handle", "linear"},
        "qat_patch.serving": {"metadata", "handle", "linear", "servers"},
        "qat_patch.measure": {"version", "versions", "config", "layer", "self_check", "handle", "patch", "servers"},
        "qat_patch.checkpoint": {
            *("version", "config", "layer", "metadata", "hosts", "handle", "patch", "linear"),
            *("servers", "serving"),
        },
        "qat_patch.bench": set(),
        "qat_patch.commands": {"bench", "config", "metadata", "handle", "patch", "measure", "checkpoint", "self_check"},
        "qat_patch.cli": {"commands"},
        "qat_patch.__main__": {"cli"},
    },
    "qat_recipes": {
        "qat_recipes.callback": set(),
        "qat_recipes.command_line": set(),
        "qat_recipes.lora": set(),
        "qat_recipes.memory": set(),
        "qat_recipes.training": {"command_line", "lora", "memory"},
        "qat_recipes.data": {"command_line"},
        "qat_recipes.tasks": {"command_line", "training", "data", "memory"},
    },
}
# Where the packages and the programs stand, and the top-level names that each may know of ours.
KERNEL_FILES, PATCH_FILES = "kernels/qat_kernels/**/*.py", "qat_patch/**/*.py"
PROGRAMS = {
    "recipes": {"qat_kernels", "qat_patch", "qat_recipes"},
    "scripts": {"qat_kernels", "qat_patch", "qat_recipes", "scripts"},
    "tests": {"examples", "qat_kernels", "qat_patch", "qat_recipes", "scripts", "support", "tests"},
}
OURS = {"examples", "qat_kernels", "qat_patch", "qat_recipes", "recipes", "scripts", "support", "tests"}
HOSTS = ("accelerate", "datasets", "diffusers", "huggingface_hub", "peft", "transformers")
MOST_FILES = 16


class Import(NamedTuple):
    name: str
    """The imported module, in full; of `from package import name`, package.name."""
    line: int
    lazy: bool
    """Inside a function or under `if TYPE_CHECKING`: not run when the file is imported."""

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import statement of a module of `package`, and every `import_module("name")` and `__import__("name")`."""
    found = []

    def walk(node: ast.AST, lazy: bool) -> None:
        names = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                parts = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
                module = ".".join([*parts, *([node.module] if node.module else [])])
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Call(func=ast.Name(id=call) | ast.Attribute(attr=call), args=[ast.Constant(value=str(name)), *_]):
                names = [name] if call in ("import_module", "__import__") else []
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                lazy = True
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                lazy = True
        found.extend(Import(name, node.lineno, lazy) for name in names)
        for child in ast.iter_child_nodes(node):
            walk(child, lazy)

    walk(ast.parse(source), lazy=False)
    return found


def module_of(file: str) -> str:
    """The name by which a file is imported."""
    name = re.sub(r"^(kernels|recipes|tests(?=/support))/", "", file).removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def imports_in(file: str) -> list[Import]:
    module = module_of(file)
    package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
    found = imports_of((ROOT / file).read_text(encoding="utf-8"), package)
    return [i for i in found if i.top not in sys.stdlib_module_names]


def files_matching(*patterns: str) -> list[str]:
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


LIBRARY_FILES = files_matching(KERNEL_FILES, PATCH_FILES)
PROGRAM_FILES = files_matching(*(f"{folder}/**/*.py" for folder in PROGRAMS))
MODULES = {module_of(file): file for file in [*LIBRARY_FILES, *PROGRAM_FILES]}
PRIVATE = re.compile(r"_[a-z]")


def modules_imported_by(file: str) -> set[str]:
    """Our modules that a file names, wherever it imports them."""
    found = set()
    for i in imports_in(file):
        for name in (i.name, i.name.rpartition(".")[0]):
            if name in MODULES:
                found.add(name)
                break
    return found - {module_of(file)}


def room_of(module: str) -> str:
    """The part of a library that a module belongs to: the name up to the second part."""
    return ".".join(module.split(".")[:2])


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("file", LIBRARY_FILES)
def test_library_imports_only_what_its_layer_may_know(file):
    _, always, lazily = next(rule for rule in LIBRARY if file in files_matching(rule[0]))
    wrong = [i for i in imports_in(file) if i.top not in (always | lazily if i.lazy else always)]
    assert wrong == [], f"{file} may import {sorted(always)}, and inside functions {sorted(lazily)}"


@pytest.mark.parametrize("file", PROGRAM_FILES)
def test_nothing_imports_programs(file):
    known = PROGRAMS[file.split("/")[0]]
    entries = {Path(name).stem for name in files_matching("recipes/*.py")}
    if file.startswith("tests/"):
        known = known | entries
    wrong = [i for i in imports_in(file) if i.top in (OURS | entries) - known]
    assert wrong == [], f"{file} may import of ours {sorted(known)}"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and for type checking count."""
    graph = {module: modules_imported_by(file) for module, file in MODULES.items()}
    # A package's __init__ gathers what is in it; whoever imports a module of a package does not mean its __init__.
    for package in ("qat_kernels", "qat_patch"):
        for imported in graph.values():
            imported.discard(package)
    assert circle(graph) == []


@pytest.mark.parametrize("library", ROOMS)
def test_rooms_know_only_those_that_they_may(library):
    files = {module: file for module, file in MODULES.items() if module.startswith(library + ".")}
    assert {room_of(module) for module in files} == set(ROOMS[library]), "every room is named above"
    wrong = []
    for module, file in files.items():
        assert library not in modules_imported_by(file), f"{file} imports what gathers all rooms"
        allowed = {f"{library}.{name}" for name in ROOMS[library][room_of(module)]} | {room_of(module)}
        wrong += [
            (module, name)
            for name in modules_imported_by(file)
            if name.startswith(library + ".") and room_of(name) not in allowed
        ]
    assert wrong == []
    assert circle({room: {f"{library}.{name}" for name in known} for room, known in ROOMS[library].items()}) == []


def test_rooms_of_the_scripts_form_no_circle():
    graph = defaultdict(set)
    for module, file in MODULES.items():
        if module.startswith("scripts."):
            folder = module.rpartition(".")[0]
            graph[folder] |= {name.rpartition(".")[0] for name in modules_imported_by(file) if name.startswith("scripts.")} - {
                folder
            }
    assert circle(graph) == []


def test_nothing_private_is_imported_from_another_room():
    wrong = []
    for module, file in MODULES.items():
        for i in imports_in(file):
            source, _, name = i.name.rpartition(".")
            if i.top in OURS and PRIVATE.match(name) and source.rpartition(".")[0] != module.rpartition(".")[0]:
                wrong.append((file, i.name))
    assert wrong == []


def test_no_source_loads_modules_by_strings_or_edits_the_path():
    loads = re.compile(r"sys\.path\b(?!_)\s*(\+?=|\[|\.(append|insert|extend))|\bimport_module\(|\b__import__\(")
    sources = [file for file in MODULES.values() if not file.startswith("tests/")]
    assert [file for file in sources if loads.search((ROOT / file).read_text(encoding="utf-8"))] == []


def test_no_folder_of_source_holds_more_files_than_can_be_seen_at_once():
    count = defaultdict(int)
    for file in MODULES.values():
        count[Path(file).parent.as_posix()] += not file.endswith("__init__.py")
    assert {folder: number for folder, number in count.items() if number > MOST_FILES} == {}


def test_no_product_code_imports_the_baselines():
    """They are for experiments: what others do, and what is known to be worse."""
    own = {"scripts/evidence/attention/baselines.py", "scripts/evidence/attention/dense.py"}
    assert own < set(PROGRAM_FILES)
    recipes = [file for file in PROGRAM_FILES if file.startswith("recipes/")]
    for file in {*LIBRARY_FILES, *recipes}:
        assert not re.search(r"\bbaselines\b|import dense\b|\.dense\b", (ROOT / file).read_text(encoding="utf-8")), file


def test_setup_cfg_declares_what_is_imported():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    requirements = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    declared = {normalized(re.match(r"[\w.-]+", line)[0]) for line in requirements.split("\n") if line}
    ours = OURS | {Path(name).stem for name in files_matching("recipes/*.py")}
    imported = {i.top for file in LIBRARY_FILES + PROGRAM_FILES for i in imports_in(file)} - ours
    # Attention of others, and the library that loads it from the Hub: found where they are.
    imported -= {"flash_attn", "flash_attn_interface", "flashinfer", "kernels", "sageattention", "sageattn3"}
    installed = packages_distributions()
    assert {name for name in imported if not declared & {normalized(n) for n in installed.get(name, [name])}} == set()


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_design_lists_every_file():
    """The tree in docs/DESIGN.md: each file with one line, and nothing that is not there."""
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    tree = text.split("<!-- files -->")[1].split("```")[1]
    listed, folders = {}, []
    for line in filter(str.strip, tree.splitlines()):
        indent = (len(line) - len(line.lstrip())) // 4
        name, *words = line.split()
        folders[indent:] = [name]
        if not name.endswith("/"):
            listed["".join(folders)] = words
    expected = {file for file in MODULES.values() if not file.endswith("__init__.py") and not file.startswith("tests/")}
    assert set(listed) == expected
    assert [file for file, words in listed.items() if len(words) < 3] == []


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b, c as d
from e.f import g
from .h import i
if TYPE_CHECKING:
    import j
try:
    import k
except ImportError:
    k = importlib.import_module("l.m")
class N:
    import o
    def p(self):
        from q import r
        return lambda: __import__("s")
"""
    assert [(i.top, i.lazy) for i in imports_of(source, "own")] == [
        ("a", False),
        ("c", False),
        ("e", False),
        ("own", False),
        ("j", True),
        ("k", False),
        ("l", False),
        ("o", False),
        ("q", True),
        ("s", True),
    ]
    assert [i.name for i in imports_of("from ..x import y\nfrom . import z", "a.b")] == ["a.x.y", "a.b.z"]


def run_in_fresh_process(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_run_without_triton_and_host_libraries(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({("triton", *HOSTS)}))  # None: an import raises ModuleNotFoundError
import torch
import qat_kernels
q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
for impl in ("auto", "eager"):
    grads = torch.autograd.grad(qat_kernels.attention(q, k, v, causal=True, impl=impl).square().sum(), (q, k, v))
    print(all(bool(g.isfinite().all() and g.any()) for g in grads))
"""
    assert run_in_fresh_process(code, tmp_path).split() == ["True", "True"]


def test_importing_the_library_imports_no_host_library(tmp_path):
    code = f"import sys, qat_kernels, qat_patch; print([name for name in {HOSTS} if name in sys.modules])"
    assert run_in_fresh_process(code, tmp_path) == "[]\n"
