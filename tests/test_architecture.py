"""Who may import whom (docs/DESIGN.md): kernels know tensors, the library knows models, and nothing knows the programs."""

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"torch", "qat_kernels"}
PATCH = {"torch", "safetensors", "qat_kernels", "qat_patch"}
# Files; what they may import besides the standard library; and what else inside functions. The first match counts.
LIBRARY = (
    ("kernels/qat_kernels/_[a-z]*.py", KERNELS | {"triton"}, set()),
    ("kernels/qat_kernels/**/*.py", KERNELS, set()),
    ("qat_patch/transformers_adapter.py", PATCH, {"transformers"}),
    ("qat_patch/diffusers_adapter.py", PATCH, {"diffusers"}),
    ("qat_patch/context_parallel.py", PATCH, {"diffusers"}),
    # Imported only once transformers is: the last test below makes sure.
    ("qat_patch/quantizer.py", PATCH | {"transformers"}, set()),
    ("qat_patch/cache.py", PATCH | {"transformers"}, set()),
    ("qat_patch/card.py", PATCH, {"huggingface_hub"}),
    ("qat_patch/hub.py", PATCH, {"huggingface_hub"}),
    ("qat_patch/load.py", PATCH, {"diffusers", "peft", "transformers"}),
    ("qat_patch/sensitivity.py", PATCH, {"matplotlib"}),
    ("qat_patch/sensitivity_command.py", PATCH, {"diffusers", "transformers"}),
    ("qat_patch/**/*.py", PATCH, set()),
)
# Folders of programs and tests; and the folders whose modules theirs may import.
PROGRAMS = {
    "recipes": {"recipes"},
    "scripts": {"scripts"},
    "scripts/evidence": {"recipes", "scripts", "scripts/evidence"},
    "tests": {"recipes", "scripts", "scripts/evidence", "tests"},
}
HOSTS = ("accelerate", "datasets", "diffusers", "huggingface_hub", "peft", "transformers")


class Import(NamedTuple):
    top: str
    """The first part of the imported name; of a relative import, the package of the file."""
    line: int
    lazy: bool
    """Inside a function or under `if TYPE_CHECKING`: not run when the file is imported."""


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import statement, and every `import_module("name")` and `__import__("name")`."""
    found = []

    def walk(node: ast.AST, lazy: bool) -> None:
        names = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [package if node.level else node.module]
            case ast.Call(func=ast.Name(id=call) | ast.Attribute(attr=call), args=[ast.Constant(value=str(name)), *_]):
                names = [name] if call in ("import_module", "__import__") else []
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                lazy = True
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                lazy = True
        found.extend(Import(name.split(".")[0], node.lineno, lazy) for name in names)
        for child in ast.iter_child_nodes(node):
            walk(child, lazy)

    walk(ast.parse(source), lazy=False)
    return found


def imports_in(file: str) -> list[Import]:
    package = file.removeprefix("kernels/").split("/")[0]
    return [i for i in imports_of((ROOT / file).read_text(encoding="utf-8"), package) if i.top not in sys.stdlib_module_names]


def files_matching(*patterns: str) -> list[str]:
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def modules_in(folders: set[str]) -> set[str]:
    """Names by which the modules of the folders can be imported."""
    return folders | {Path(file).stem for folder in folders for file in files_matching(f"{folder}/*.py")}


LIBRARY_FILES = files_matching(*(pattern for pattern, _, _ in LIBRARY))
PROGRAM_FILES = files_matching(*(f"{folder}/*.py" for folder in PROGRAMS))


@pytest.mark.parametrize("file", LIBRARY_FILES)
def test_library_imports_only_what_its_layer_may_know(file):
    _, always, lazily = next(rule for rule in LIBRARY if file in files_matching(rule[0]))
    wrong = [i for i in imports_in(file) if i.top not in (always | lazily if i.lazy else always)]
    assert wrong == [], f"{file} may import {sorted(always)}, and inside functions {sorted(lazily)}"


@pytest.mark.parametrize("file", PROGRAM_FILES)
def test_nothing_imports_programs(file):
    folders = PROGRAMS[file.rpartition("/")[0]]
    wrong = [i for i in imports_in(file) if i.top in modules_in(set(PROGRAMS)) - modules_in(folders)]
    assert wrong == [], f"{file} may import no other programs than those in {sorted(folders)}"


def test_no_product_code_imports_the_baselines():
    """They are for experiments: what others do, and what is known to be worse."""
    own = {"kernels/qat_kernels/baselines.py", "kernels/qat_kernels/dense.py"}
    assert own < set(LIBRARY_FILES)
    recipes = [file for file in PROGRAM_FILES if file.startswith("recipes/")]
    for file in {*LIBRARY_FILES, *recipes} - own:
        assert not re.search(r"\bbaselines\b|import dense|\.dense\b", (ROOT / file).read_text(encoding="utf-8")), file


def test_setup_cfg_declares_what_is_imported():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    requirements = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    declared = {normalized(re.match(r"[\w.-]+", line)[0]) for line in requirements.split("\n") if line}
    ours = {"qat_kernels", "qat_patch"} | modules_in(set(PROGRAMS))
    imported = {i.top for file in LIBRARY_FILES + PROGRAM_FILES for i in imports_in(file)} - ours
    imported -= {"flashinfer", "sageattention", "sageattn3"}  # which scripts/bench_peers.py finds where they are
    installed = packages_distributions()
    assert {name for name in imported if not declared & {normalized(n) for n in installed.get(name, [name])}} == set()


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


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
