"""An audit hook watches a process load 200 exports that strangers have changed: it reads them, and does nothing else."""

import json
import os
import subprocess
import sys

import pytest

from qat_patch import export_checkpoint, patch_model
from support.models.exports import add_lora
from support.models.tiny_wan import tiny_pipeline, tiny_transformer


@pytest.fixture(scope="module")
def all_kinds(originals, tmp_path_factory):
    """Exports of every kind: those of `originals`, a pipeline, and adapters of a Wan transformer."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("single", "sharded", "wan", "adapters", "base"):
        (folder / name).symlink_to(originals / name)
    pipeline = tiny_pipeline(i2v=True, layers=1)
    patch_model(pipeline)
    export_checkpoint(pipeline, folder / "pipeline")
    base = tiny_transformer(layers=1)
    base.save_pretrained(folder / "wan_base")
    patch_model(add_lora(base))
    export_checkpoint(base, folder / "wan_adapters", merge_adapters=False, base_model=str(folder / "wan_base"))
    return folder


def watch(originals, scratch, number):
    (scratch / "evil.py").write_text("import os; os.system('true')")
    command = [sys.executable, "-m", "support.models.hostile_configs", str(originals), str(scratch), str(number)]
    environment = os.environ | {
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hook_sees_code_that_runs(all_kinds, tmp_path):
    report = watch(all_kinds, tmp_path, 0)
    assert {"open", "os.system"} == {event for _, event, _ in report["done"]} and report["imported"] == ["evil"]


def test_loading_opens_nothing_else_imports_nothing_and_starts_nothing(all_kinds, tmp_path):
    report = watch(all_kinds, tmp_path, 204)
    assert (report["done"], report["imported"]) == ([], [])
    # Most are refused, and not all: what changes nothing loads.
    assert 5 <= report["loaded"] <= 100
