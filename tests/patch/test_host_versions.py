"""Which versions of other packages are supported: one table, the same as in setup.cfg, asked before anything is patched."""

import configparser
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qat_patch import get_handle, patch_model
from qat_patch.measure.doctor import report
from qat_patch.versions import SUPPORTED, check_version, is_supported
from support.models.tiny_qwen3 import tiny_qwen3


def test_supported_versions_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    required = [Requirement(line) for text in lines for line in text.splitlines() if line and not line.startswith("#")]
    for package, bounds in SUPPORTED.items():
        found = {requirement.specifier for requirement in required if requirement.name == package}
        assert found == {SpecifierSet(",".join(bounds))}, package


@pytest.mark.parametrize(
    "version", ["0.41.9", "0.42", "0.42.0", "0.42.1.post1", "0.42.7+cu130", "0.43.0", "0.43", "0.100", "1.0"]
)
def test_the_range_means_what_pip_means_by_it(version):
    assert is_supported("diffusers", version) == (version in SpecifierSet(",".join(SUPPORTED["diffusers"])))
    assert is_supported("numpy", version)


def test_what_is_not_supported_is_refused_before_anything_changes(monkeypatch):
    for version in ("5.16.2", "6.0.0", "6.1.dev0"):
        model = tiny_qwen3()
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["transformers"], "__version__", version)  # transformers puts a second module there
            message = (
                f"patch_model: expected transformers 5.17 or later, below 6, got {version}; install one of those: pip install"
            )
            with pytest.raises(ValueError, match=message):
                patch_model(model)
            assert f"{version}  NOT SUPPORTED: expected >=5.17,<6" in report()
        assert get_handle(model) is None and model.config._attn_implementation == "sdpa"
    check_version("patch_model", SimpleNamespace(__name__="torch", __version__="2.13.0+cpu"))


def test_doctor_says_what_is_imported_and_not_what_pip_noted():
    with mock.patch("torch.__version__", "2.99.0+own"), mock.patch("importlib.metadata.version", lambda name: "1.2.3"):
        text = report()
    assert "torch        2.99.0+own" in text and "1.2.3" not in text
    assert f"transformers {sys.modules['transformers'].__version__}" in text
    with mock.patch.dict("sys.modules", {"peft": None}), mock.patch("importlib.util.find_spec", lambda name: object()):
        assert "peft         BROKEN: the import fails with ModuleNotFoundError" in report()
