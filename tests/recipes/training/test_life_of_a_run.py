"""A run beside others, killed early, moved, or resumed where its data or its model have changed; and clocks that stand still."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune_qwen3
import finetune_wan
from qat_patch.checkpoint.lock import LOCK, locked
from qat_recipes.training import checkpoints
from support.models.tiny_clips import write_clips
from support.models.tiny_recipe import words, write_inputs
from support.models.tiny_wan import tiny_pipeline
from support.runs.qwen3_runs import BARE, settings
from support.runs.runs import assert_same_run, command_line, run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHORT = BARE | {"steps": 3, "checkpoint_every": 2}
# SIGKILL in the first step; or a run that waits in it for a file.
IN_STEP = """
import importlib, os, signal, sys, time
from pathlib import Path
recipe, wait = (sys.argv.pop(1) for _ in range(2))
from qat_recipes.training.step import Stepper
step = Stepper.step
def stop(*args, **named):
    if not wait:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(wait + ".there").touch()
    while not Path(wait).exists():
        time.sleep(0.01)
    return step(*args, **named)
Stepper.step = stop
importlib.import_module(recipe).main()
"""


def start_in_step(values, wait=""):
    arguments = ["finetune_qwen3", str(wait), *command_line(values)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([sys.executable, "-c", IN_STEP, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run(finetune_qwen3, settings(inputs, folder, **SHORT))
    return folder


def finetune(inputs, folder, **changes):
    return run(finetune_qwen3, settings(inputs, folder, **SHORT | changes))


def test_killed_before_the_first_checkpoint(whole, inputs, tmp_path, capsys):
    process = start_in_step(settings(inputs, tmp_path / "run", **SHORT))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # Its log, torn in the middle of a line, and half a checkpoint.
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    (tmp_path / "run" / "checkpoint-2.incomplete").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoint-1.incomplete").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds a run; resume=latest starts it again, because it has saved nothing; else choose"):
        finetune(inputs, tmp_path / "run")
    finetune(inputs, tmp_path / "run", resume="latest")
    assert f"nothing has been saved in {tmp_path / 'run'}; the run starts from the beginning" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"settings.yaml", "metrics.jsonl", "checkpoint-2", "checkpoint-3", "export"}
    assert (tmp_path / "elsewhere").is_dir()


def test_killed_while_the_first_checkpoint_is_written(whole, inputs, tmp_path):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-*"))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:2]))
    finetune(inputs, tmp_path / "run", resume="latest")
    assert_same_run(tmp_path / "run", whole)


def test_latest_of_nothing_starts(whole, inputs, tmp_path):
    """So that one command is right for the first start and for every other."""
    finetune(inputs, tmp_path / "run", resume="latest")
    assert_same_run(tmp_path / "run", whole)
    with pytest.raises(ValueError, match="is finished"):
        finetune(inputs, tmp_path / "run", resume="latest")


def test_checkpoints_that_were_moved_away(whole, inputs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("export", "checkpoint-*"))
    shutil.copytree(whole / "checkpoint-2", tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"there is no checkpoint in .*its log goes to step 3 with one every 2 steps.*resume=PATH"
    ):
        finetune(inputs, folder, resume="latest")
    # As the message says.
    finetune(inputs, folder, resume=tmp_path / "elsewhere")
    assert_same_run(folder, whole)


def test_a_second_run_is_refused_while_the_first_one_runs(whole, inputs, tmp_path):
    values = settings(inputs, tmp_path / "run", **SHORT)
    first = start_in_step(values, tmp_path / "go")
    while not (tmp_path / "go.there").exists() and first.poll() is None:
        time.sleep(0.02)
    for resume in ("null", "latest"):
        with pytest.raises(
            ValueError, match=f"output_dir: .*run is in use by process {first.pid} on .*; wait until it has ended"
        ):
            finetune(inputs, tmp_path / "run", resume=resume)
    (tmp_path / "go").touch()
    _, error = first.communicate()
    assert first.returncode == 0, error
    assert_same_run(tmp_path / "run", whole)
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_changes_while_a_run_starts(inputs, tmp_path, monkeypatch):
    from qat_recipes.training import loop

    start = loop.starting_point

    def and_meanwhile(*args):
        found = start(*args)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()
        return found

    monkeypatch.setattr(loop, "starting_point", and_meanwhile)
    with pytest.raises(ValueError, match="output_dir: another run has just written to .*run; start this one again"):
        finetune(inputs, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_where_nothing_can_be_written(inputs, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(ValueError, match="output_dir: nothing can be written to .*run .*; choose another folder"):
            finetune(inputs, folder)


def test_a_clock_that_stands_still_or_goes_back(whole, inputs, tmp_path, monkeypatch):
    for name, now in (("frozen", lambda: 1.0), ("back", iter(range(10**6, 0, -1)).__next__)):
        with monkeypatch.context() as patch:
            for clock in ("perf_counter", "time", "monotonic"):
                patch.setattr(time, clock, now)
            finetune(inputs, tmp_path / name)
        assert_same_run(tmp_path / name, whole)
        assert "tokens_per_second" not in (tmp_path / name / "metrics.jsonl").read_text()


# What a resumed run is given -------------------------------------------------------------------------------------------


def replace_in(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def change_weight(folder, name, index=-1):
    """The last value of a tensor: what looks at the first ones does not see it."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[index] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


QWEN3_CHANGES = {
    "text": (lambda f: replace_in(f / "train.jsonl", "cat", "dog"), "the text of data.train changed since"),
    "held-out text": (lambda f: (f / "eval.txt").write_text(words(120, seed=9)), "the held-out text changed since"),
    "model": (lambda f: change_weight(f / "model", "model.norm.weight"), "the weights of model.path changed since"),
    "config": (lambda f: replace_in(f / "model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "the config of"),
    "tokenizer": (
        lambda f: replace_in(f / "model/tokenizer.json", '_space": false', '_space": true'),
        "the tokenizer of model.path",
    ),
}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_changed_data_is_refused_and_restored_data_is_continued(tmp_path, lora):
    write_inputs(tmp_path / "in")
    changes = SHORT | {"data.eval.path": tmp_path / "in" / "eval.txt", "eval_every": 3}
    changes |= {"lora.rank": 2, "lora.alpha": 4, "model.gradient_checkpointing": "true"} if lora else {}
    values = settings(tmp_path / "in", tmp_path / "whole", **changes)
    run(finetune_qwen3, values)
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("export", "checkpoint-3"))
    values |= {"output_dir": folder, "resume": "latest"}
    for change, message in QWEN3_CHANGES.values():
        shutil.copytree(tmp_path / "in", tmp_path / "good")
        change(tmp_path / "in")
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match=f"resume: .*{message}.*; use the same as before, or start another run"):
            run(finetune_qwen3, values)
        assert (folder / "metrics.jsonl").read_bytes() == before
        shutil.rmtree(tmp_path / "in")
        shutil.move(tmp_path / "good", tmp_path / "in")
    run(finetune_qwen3, values)
    assert_same_run(folder, tmp_path / "whole")


def test_of_wan_too(tmp_path):
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", 6)
    values = {"model.path": tmp_path / "model", "data.train": tmp_path / "clips", "data.eval_fraction": 0.3, "eval_every": 4}
    values |= {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "output_dir": tmp_path / "run"}
    values |= {"lora.rank": 2, "lora.alpha": 4, "eval_timesteps": 1}
    run(finetune_wan, values)
    for name in ("export", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    values |= {"resume": "latest"}
    clips, scheduler = tmp_path / "clips", tmp_path / "model/scheduler/scheduler_config.json"
    shift = json.loads(scheduler.read_text())["shift"]
    for change, restored, message in (
        (lambda: write_clips(clips, 7), lambda: write_clips(clips, 6), "the clips of data.train, the held-out clips changed"),
        (lambda: replace_in(clips / "index.json", "a red", "red"), lambda: write_clips(clips, 6), "the clips of data.train"),
        (
            lambda: replace_in(scheduler, f'"shift": {shift}', '"shift": 7.5'),
            lambda: replace_in(scheduler, '"shift": 7.5', f'"shift": {shift}'),
            "the noise levels of model.path changed",
        ),
        (lambda: tiny_pipeline(layers=1, seed=5).save_pretrained(tmp_path / "model"), None, "the weights of model.path changed"),
    ):
        change()
        with pytest.raises(ValueError, match=f"resume: {message}"):
            run(finetune_wan, values)
        if restored is not None:
            restored()
    assert list(checkpoints.steps_in(tmp_path / "run")) == [2]


def test_compiled_runs_resume(inputs, tmp_path):
    changes = {"compile": "eager", "model.gradient_checkpointing": "true"}
    finetune(inputs, tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-3"))
    torch.compiler.reset()
    finetune(inputs, tmp_path / "run", resume="latest", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_fails_leaves_its_folder_to_others(inputs, tmp_path):
    with pytest.raises(ValueError, match="there are 7 samples to train on"):
        finetune(inputs, tmp_path / "run", batch_size=8)
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run", "output_dir"), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        finetune(inputs, tmp_path / "run")
