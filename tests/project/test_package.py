"""What a user installs: the wheel and the source distribution, each in an environment that holds nothing else of ours."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_OF = {
    "qat_kernels": ROOT / "kernels" / "qat_kernels",
    "qat_patch": ROOT / "qat_patch",
    "qat_recipes": ROOT / "recipes" / "qat_recipes",
}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; a failure shows all of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(packages: dict[str, Path]) -> set[str]:
    """Every file of the packages in the given folders, by its path in an installation."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def literal_version() -> str:
    """`__version__` as setuptools must find it: a literal, so that no build has to import the package, and torch with it."""
    for node in ast.parse((ROOT / "qat_patch" / "version.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__version__"]:
            return ast.literal_eval(node.value)
    raise AssertionError("qat_patch/version.py assigns no __version__")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it.

    They are built in a copy: a `build/` or `*.egg-info` left in the checkout can stand in for what the configuration forgot.
    """
    folder = tmp_path_factory.mktemp("distributions")
    no_source = (".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*no_source))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_and_imports_in_an_empty_environment(kind, distributions, tmp_path):
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # torch and the build backend come from the environment of the tests. Python searches a folder that a .pth file names but
    # does not read that folder's own .pth files, so the editable installation there stays unseen; the first check makes sure.
    (site / "environment_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    names = ("torch", *SOURCE_OF)
    found = f"from importlib.util import find_spec as find; print([name for name in {names} if find(name)])"
    assert run(python, "-I", "-c", found, cwd=tmp_path) == "['torch']\n"

    # --ignore-installed: pip, too, sees the environment of the tests, and must not touch the installation of ours there.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--ignore-installed")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", distributions[kind], cwd=tmp_path)
    imported = "import qat_kernels as k, qat_patch as p, qat_recipes as r; print(*[x.__file__ for x in (k, p, r)], p.__version__)"
    assert run(python, "-I", "-c", imported, cwd=tmp_path).split() == [
        *(str(site / name / "__init__.py") for name in SOURCE_OF),
        literal_version(),
    ]
    (tmp_path / "empty").mkdir()
    assert "usage: qat-patch" in run(tmp_path / "env" / "bin" / "qat-patch", "--help", cwd=tmp_path / "empty")
    assert "served here by" in run(tmp_path / "env" / "bin" / "qat-patch", "servers", cwd=tmp_path / "empty")
    assert files_of({name: site / name for name in SOURCE_OF}) == files_of(SOURCE_OF)


def test_wheel_holds_our_packages_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    about = f"qat_patch-{literal_version()}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files_of(SOURCE_OF)
    assert about + "licenses/LICENSE" in names


def test_wheel_carries_its_types_and_no_programs(distributions):
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    assert {f"{package}/py.typed" for package in SOURCE_OF} <= names
    assert not any(name.startswith(("scripts/", "tests/", "recipes/", "kernels/", "examples/")) for name in names)


def test_source_distribution_is_the_whole_project(distributions):
    """What can be tested and read in a clone can be tested and read in it: README's links lead somewhere."""
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = re.findall(r"\]\(([\w./]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    expected = {"README.md", "LICENSE", "Makefile", "setup.cfg", "pyproject.toml", "tests/conftest.py", *linked}
    assert {path for path in expected if path not in names} == set()
    assert len(linked) > 15
    assert not any(name.startswith((".git/", ".venv/", "outputs/", "build/")) for name in names)


def test_kernels_is_a_source_root_and_no_package():
    assert {path.name for path in (ROOT / "kernels").iterdir()} - {"__pycache__"} == {"README.md", "qat_kernels"}


def test_setup_cfg_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    modules = {Path(name) for name in files_of(SOURCE_OF) if name.endswith(".py")}
    assert set(setup["options"]["packages"].split()) == {".".join(module.parent.parts) for module in modules}
    assert {module.parent / "__init__.py" for module in modules} <= modules
