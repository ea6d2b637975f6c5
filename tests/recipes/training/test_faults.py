"""Faults while a run is saved: killed at any file operation, a full disk, damage. A finished checkpoint is never lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from qat_recipes.training import checkpoints
from support.runs.runs import RECIPES, flip, reset_accelerate

ROOT = RECIPES.parent
# A run with two checkpoints writes the third one. It is killed at its first file operation, and from a fresh start at its
# second, and so on, until it gets through. A forked child needs no new imports, so all of it takes seconds.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from qat_recipes.training import checkpoints

torch.set_num_threads(1)
folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)

def save(output_dir, step):
    log = output_dir / "metrics.jsonl"
    log.write_text(f"step {step}\\n")
    checkpoints.save(accelerator, output_dir, step, {"step": step}, attach=[log], keep=2)

def operation(event, args):
    # What touches the file system, of Python; torch and safetensors write without telling it.
    return event == "open" or event.startswith(("os.", "shutil."))

for number in range(1000):
    output_dir = folder / str(number)
    output_dir.mkdir()
    save(output_dir, 1)
    save(output_dir, 2)
    child = os.fork()
    if child == 0:
        count = -1
        def kill(event, args):
            global count
            if operation(event, args):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        save(output_dir, 3)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    # What a resumed run does next.
    shutil.copytree(output_dir, output_dir / "as-it-was-left")
    save(output_dir, 4)
print(number)
"""


def states(output_dir):
    """Of all that looks like a checkpoint; raises if any is not one."""
    return [checkpoints.check(folder)["step"] for folder in checkpoints.steps_in(output_dir).values()]


def test_killed_at_any_file_operation_no_finished_checkpoint_is_lost(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert 30 < count < 400
    left = [states(tmp_path / str(number) / "as-it-was-left") for number in range(count)]
    # Until it has its name the new one is not there; the oldest goes when it is.
    assert [list(x) for x in dict.fromkeys(map(tuple, left))] == [[1, 2], [1, 2, 3], [2, 3]]
    for number in range(count):
        went_on = tmp_path / str(number)
        assert states(went_on) == [max(left[number]), 4]
        assert not list(went_on.glob("*.incomplete"))
    assert states(tmp_path / str(count)) == [2, 3]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with checkpoints 1 and 2, and how to write the third."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator()
    model = torch.nn.Linear(3, 3)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    log = tmp_path / "metrics.jsonl"

    def save(step):
        log.write_text(f"step {step}\n")
        checkpoints.save(accelerator, tmp_path, step, {"step": step}, attach=[log], keep=2)

    save(1)
    save(2)
    yield save
    reset_accelerate()


WRITES = {
    "weights": "accelerate.utils.other.safe_save_file",
    "optimizer and random states": "torch.save",
    "log": "shutil.copyfile",
    "manifest": "pathlib.Path.write_text",
    "sync": "os.fsync",
    "name": "pathlib.Path.rename",
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_stops_the_run_and_leaves_what_was_there(run, tmp_path, monkeypatch, what):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    log = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        if what == "manifest":
            write = Path.write_text
            patch.setattr(Path, "write_text", lambda path, *a, **k: write(path, *a, **k) if path == log else full())
        else:
            patch.setattr(WRITES[what], full)
        with pytest.raises(
            RuntimeError, match=r"writing .*checkpoint-3 failed: .*No space left[^\n]*\n.* checkpoint is .*checkpoint-2"
        ):
            run(3)
    assert states(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*.incomplete"))
    run(3)
    assert states(tmp_path) == [2, 3]


def test_a_disk_that_is_really_full(run, tmp_path):
    """The operating system refuses to write more than this many bytes into a file."""
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
from accelerate import Accelerator
from qat_recipes.training import checkpoints
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(300, 300)
accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(accelerator, Path({str(tmp_path)!r}), 3, {{}}, attach=[], keep=2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "checkpoint-3 failed" in done.stderr and "Make room, and go on with resume=latest" in done.stderr
    assert states(tmp_path) == [1, 2] and not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "metrics.jsonl", "checkpoint.json"]
)
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_damage_is_found_and_the_newest_good_checkpoint_named(run, tmp_path, name, harm):
    harm(tmp_path / "checkpoint-2" / name)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is (damaged|incomplete).*resume=.*checkpoint-1 is complete; remove what is newer"
    ):
        checkpoints.check(checkpoints.find(tmp_path, "latest"))
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-1"
    # A third one that is whole is the newest good one, and the damaged one is never taken instead.
    run(3)
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-3"
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
    with pytest.raises(ValueError, match="there is no other beside it"):
        checkpoints.check(tmp_path / "checkpoint-2")


def test_every_bit_of_the_manifest_counts(run, tmp_path):
    file = tmp_path / "checkpoint-2" / "checkpoint.json"
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match="checkpoint-2 "):
            checkpoints.check(tmp_path / "checkpoint-2")
    file.write_bytes(data)
    assert checkpoints.check(tmp_path / "checkpoint-2") == {"step": 2}
    assert json.loads(data)["format_version"] == 4
