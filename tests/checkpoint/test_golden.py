"""Exports that earlier versions of this package wrote, and that every later version must read or refuse with the reason."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qat_patch import verify_checkpoint
from qat_patch.checkpoint.manifest import weight_files
from qat_patch.metadata import FORMAT_VERSION
from support.runs import make_golden

CURRENT = make_golden.GOLDEN / f"format-{FORMAT_VERSION}"
NAMES = [
    "adapters",
    "language-model",
    "language-model-bfloat16",
    "language-model-sharded",
    "language-model-shifted",
    "video-model",
]


VERSIONS = [make_golden.GOLDEN / f"format-{version}" for version in (2, FORMAT_VERSION)]


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_all_are_there_and_small(version):
    assert sorted(folder.name for folder in version.iterdir()) == sorted([*NAMES, "base"])
    assert sum(file.stat().st_size for file in version.rglob("*") if file.is_file()) < 400_000


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("name", NAMES)
def test_this_version_reads_what_was_written(name, version, monkeypatch):
    monkeypatch.chdir(version)  # beside the base model
    report = verify_checkpoint(Path(name))
    # Bit for bit where processor and libraries are the same; the limits of verification elsewhere.
    assert len([line for line in report if "output" in line and ("bit-equal" in line or "within" in line)]) == 2


@pytest.fixture(scope="module")
def written_now(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "now"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        make_golden.main(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_now_is_of_the_same_form(written_now, name):
    """Otherwise FORMAT_VERSION has to rise, and new golden exports are due."""

    def keys(value):
        return {key: keys(x) for key, x in value.items()} if isinstance(value, dict) else type(value).__name__

    then, now = (json.loads((folder / name / "qat_patch.json").read_text()) for folder in (CURRENT, written_now))
    assert keys(then) == keys(now)
    for file in ("config.json", "adapter_config.json"):
        if (CURRENT / name / file).is_file():
            then, now = (json.loads((folder / name / file).read_text()) for folder in (CURRENT, written_now))
            for key in ("quantization_config", "_attention_quantization"):
                # The version of the package may be another one.
                assert (then.get(key) or {}) | {"package_version": ""} == (now.get(key) or {}) | {"package_version": ""}
    for file in weight_files(CURRENT / name):
        then, now = load_file(file), load_file(written_now / name / file.name)
        assert {key: (x.dtype, x.shape) for key, x in then.items()} == {key: (x.dtype, x.shape) for key, x in now.items()}
