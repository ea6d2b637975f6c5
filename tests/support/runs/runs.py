"""Runs of the recipes in tests: one after the other in this process, and what they left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from qat_patch.checkpoint import integrity
from qat_patch.checkpoint.manifest import MANIFEST, weight_files

RECIPES = Path(__file__).parents[3] / "recipes"
TIMED = ("tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gib")
# SIGKILL in the middle of writing a checkpoint, when everything is written but its name.
KILL = """
import importlib, os, signal, sys
recipe, checkpoint = (sys.argv.pop(1) for _ in range(2))
from qat_patch.checkpoint import integrity
sync = integrity.sync
integrity.sync = lambda path, **kw: os.kill(os.getpid(), signal.SIGKILL) if checkpoint in str(path) else sync(path, **kw)
importlib.import_module(recipe).main()
"""
# Accelerate shards over GPUs only. Told that these CPUs are such, it does the same over gloo.
SHARDED = """
import importlib, sys
recipe = sys.argv.pop(1)
import accelerate.state
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

start = accelerate.state.AcceleratorState.__init__

def start_sharded(self, *args, **kwargs):
    first = not self._shared_state
    start(self, *args, **kwargs)
    if first:
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=True,
        )
        accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

accelerate.state.AcceleratorState.__init__ = start_sharded
# Diffusers asks for the accelerators of this machine.
torch._C._get_accelerator = lambda: torch.device("cpu")
torch.accelerator.device_count = lambda: 1
importlib.import_module(recipe).main()
"""


def command_line(settings):
    """Settings by dotted name as arguments; `...` leaves one out."""
    return [f"{name}={value}" for name, value in settings.items() if value is not ...]


def reset_accelerate():
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(recipe, settings):
    """One run of a recipe, which is its module in recipes/; what it returns."""
    try:
        return recipe.main(command_line(settings))
    finally:
        reset_accelerate()


def uninterrupted_runs(finetune, kinds, folder):
    """A run in `folder` for each kind, by `finetune(output_dir, **settings)`. Returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for kind, changes in kinds.items():
            finetune(folder / kind, **changes)
    return folder


def run_until_killed(recipe, settings, checkpoint):
    """The same in a process of its own that is killed while it writes `checkpoint`."""
    arguments = [recipe.__name__, checkpoint, *command_line(settings)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    killed = subprocess.run([sys.executable, "-c", KILL, *arguments], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()


def run_in_two_processes(program):
    """A program and its arguments, under torchrun. One that hangs fails after five minutes."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    # Its logs would stay in the system's folder for temporary files.
    with tempfile.TemporaryDirectory() as logs:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--log-dir={logs}"]
        done = subprocess.run([*torchrun, *program], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def log(output_dir):
    """metrics.jsonl without what differs from machine to machine."""
    records = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]


def weights(folder):
    (file,) = weight_files(folder)
    return load_file(file)


def assert_same_run(one, other):
    assert log(one) == log(other)
    a, b = weights(one / "export"), weights(other / "export")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip(path):
    """Damage a file: one bit, in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reseal(folder, **changes):
    """Make an export that was changed look as if it had been exported so. `changes` are of its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    if "files" not in changes:
        manifest["files"] = {name: x for name, x in integrity.fingerprints(folder).items() if name not in (MANIFEST, "README.md")}
    manifest.pop("sha256", None)
    (folder / MANIFEST).write_text(json.dumps(integrity.sealed(manifest)))
