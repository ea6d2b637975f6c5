"""Which versions CI repeats tests with: the Makefile, setup.cfg, the table of the FP4 kernel and the documents agree."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def repeated(package: str) -> list[str]:
    """The versions that `make test-versions` repeats the tests of a package with, major and minor, the oldest first."""
    (line,) = re.findall(r"^VERSIONS := (.*)$", read("Makefile"), re.M)
    found = [re.fullmatch(rf"{package}-(\d+\.\d+)\.\d+", version) for version in line.split()]
    return sorted((match[1] for match in found if match), key=lambda version: [int(part) for part in version.split(".")])


@pytest.mark.parametrize("package", ["triton", "transformers"])
def test_the_oldest_version_of_the_range_is_tested(package):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    requirements = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    (bound,) = set(re.findall(rf"^{package}>=(\d+\.\d+)", requirements, re.M))
    assert repeated(package)[0] == bound


def test_ci_runs_the_commands_of_the_readme():
    commands = [line for line in read(".ci/run").splitlines() if line.startswith("make")]
    assert commands == ["make check test", "make test-versions"]  # as written: no TORCH=
    assert "make test " in read("README.md")


def test_the_documents_say_which_versions_were_tested():
    (line,) = re.findall(r"^VERSIONS := (.*)$", read("Makefile"), re.M)
    rows = dict(re.findall(r"^\| (Triton|Transformers) \| (.*) \|$", read("CONTRIBUTING.md"), re.M))
    for each in line.split():
        package, version = each.split("-")
        assert version in rows[package.capitalize()].split(" | ")


def test_every_triton_that_is_tested_is_in_the_table_and_in_the_documents():
    from qat_kernels.fp4 import launch as fp4_launch

    known = {f"{major}.{minor}" for (major, minor), *_ in fp4_launch.ON_FP4_UNITS}
    assert set(repeated("triton")) <= known
    rows = re.findall(r"^\| (\d+\.\d+) \| ([\w ,]+) \|", read("docs/INFERENCE.md"), re.M)
    table = {
        version: {f"sm_{each.arch}" for each in fp4_launch.ON_FP4_UNITS if each.triton == triton}
        for version, triton in ((version, tuple(map(int, version.split(".")))) for version in known)
    }
    assert {version: set(archs.split(", ")) for version, archs in rows} == table
