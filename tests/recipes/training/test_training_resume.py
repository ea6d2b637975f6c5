"""Resuming to the last bit. What cannot be resumed is refused, and nothing changes."""

import json
import shutil

import pytest

import finetune_qwen3
from qat_patch.checkpoint import integrity
from qat_recipes.training import checkpoints
from support.runs.qwen3_runs import finetune, settings
from support.runs.runs import assert_same_run, flip, log, run_until_killed

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_killed_run_resumes_bit_for_bit(reference, inputs, tmp_path):
    run_until_killed(finetune_qwen3, settings(inputs, tmp_path / "run"), "checkpoint-4")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4.incomplete"]
    assert [record["step"] for record in log(tmp_path / "run")] == [0, 1, 2, 3, 4]

    finetune(inputs, tmp_path / "run", resume="latest")
    assert_same_run(tmp_path / "run", reference)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_only_the_newest_checkpoints_are_kept(reference, inputs, tmp_path):
    assert list(checkpoints.steps_in(reference)) == [4, 6]
    finetune(inputs, tmp_path / "run", resume=reference / "checkpoint-4", checkpoint_every=1, keep_checkpoints=1)
    assert list(checkpoints.steps_in(tmp_path / "run")) == [6]
    assert_same_run(tmp_path / "run", reference)


def test_a_run_with_constant_learning_rate_can_be_made_longer(reference, inputs, tmp_path):
    finetune(inputs, tmp_path / "run", resume=reference / "checkpoint-6", steps=7)
    records = log(tmp_path / "run")
    assert records[:7] == log(reference)
    assert records[7]["step"] == 7 and "eval_loss_fp4" in records[7]


def content(folder):
    """Every file below the folder with its content and time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "changes", "message"),
    [
        (lambda run: None, {"resume": "checkpoint-9"}, "checkpoint-9 does not exist"),
        (lambda run: [shutil.rmtree(path) for path in run.glob("checkpoint-*")], {}, "there is no checkpoint in"),
        (lambda run: truncate(run / "checkpoint-6/model.safetensors"), {}, r"model.safetensors has \d+ bytes.*checkpoint-4"),
        (lambda run: flip(run / "checkpoint-6/optimizer.bin"), {}, "the content of optimizer.bin has changed"),
        (lambda run: (run / "checkpoint-6/random_states_0.pkl").unlink(), {}, "random_states_0.pkl is missing"),
        (lambda run: (run / "checkpoint-6/checkpoint.json").unlink(), {}, "has no checkpoint.json"),
        (lambda run: truncate(run / "checkpoint-6/checkpoint.json"), {}, "checkpoint.json cannot be read"),
        (lambda run: None, {"resume": "checkpoint-4"}, "holds newer checkpoints than"),
        (lambda run: None, {"learning_rate": 2e-3}, r"learning_rate was 0\.001 and is 0\.002"),
        (
            lambda run: None,
            {"data.train.blocks": 6, "qat.spec.preset": "nvfp4_qk"},
            "data.train.blocks was 7 and is 6; qat.spec.preset was",
        ),
        (lambda run: None, {"schedule": "linear", "steps": 7}, "schedule was 'constant' and is 'linear'; steps was 6 and is 7"),
        (lambda run: None, {"steps": 5}, "checkpoint-6 has seen 6 steps already, got 5"),
        (lambda run: None, {"resume": "null"}, "holds a run"),
        (lambda run: (run / "export").mkdir(), {}, "is finished"),
    ],
)
def test_what_cannot_be_continued_is_refused_and_left_alone(reference, inputs, tmp_path, harm, changes, message):
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns("export"))
    harm(run)
    before = content(tmp_path)
    if "checkpoint" in changes.get("resume", ""):
        changes = changes | {"resume": run / changes["resume"]}
    with pytest.raises(ValueError, match=message):
        finetune(inputs, run, **{"resume": "latest"} | changes)
    assert content(tmp_path) == before


def test_a_checkpoint_of_more_processes_is_refused(reference, inputs, tmp_path):
    shutil.copytree(reference / "checkpoint-6", tmp_path / "checkpoint-6")
    manifest = json.loads((tmp_path / "checkpoint-6/checkpoint.json").read_text())
    manifest["state"]["processes"] = 2
    del manifest["sha256"]
    (tmp_path / "checkpoint-6/checkpoint.json").write_text(json.dumps(integrity.sealed(manifest)))
    with pytest.raises(ValueError, match="checkpoint-6 needs 2 processes, and there are 1"):
        finetune(inputs, tmp_path / "run", resume=tmp_path / "checkpoint-6")
    assert not (tmp_path / "run").exists()
