"""The recipe for language models and the loop: learning, resuming to the last bit, and what is refused with nothing changed."""

import json
import os
import shutil
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import checkpoints
import evaluate_qwen3
import finetune_qwen3
from loop import train
from qat_patch import files, get_handle, load_checkpoint, patch_model, transformers_adapter
from runs import (
    SHARDED,
    assert_same_run,
    command_line,
    log,
    reset_accelerate,
    run,
    run_in_two_processes,
    run_until_killed,
    weights,
)
from task import Task
from text_data import ShuffledBatches
from tiny_qwen3 import VOCAB, tiny_qwen3, token_ids
from tiny_recipe import write_inputs
from training_settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "finetune_qwen3.py"
# Three batches an epoch and two a step: every second step spans two epochs, and checkpoint-2 lies inside one.
RUN = {
    "steps": 6,
    "batch_size": 2,
    "accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "seed": 3,
    "eval_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
    "data.sequence_length": 64,
    "data.train.blocks": 7,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "model", "data.train.path": inputs / "train.jsonl", "data.eval.path": inputs / "eval.txt"}
    return RUN | {"output_dir": output_dir} | places | changes


def finetune(inputs, output_dir, **changes):
    return run(finetune_qwen3, settings(inputs, output_dir, **changes))


# Without held-out text, checkpoints and the like: steps only.
BARE = {"data.eval.path": ..., "eval_every": 0, "checkpoint_every": 0, "keep_checkpoints": "null", "warmup_steps": 0, "steps": 2}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    """A run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        output_dir = tmp_path_factory.mktemp("reference") / "run"
        finetune(inputs, output_dir)
    return output_dir


def content(folder):
    """Every file below the folder with its content and time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_run_learns_logs_and_exports(reference, inputs):
    records = log(reference)
    assert [record["step"] for record in records] == list(range(7))
    assert [record["step"] for record in records if "eval_loss_fp4" in record] == [0, 3, 6]
    assert records[-1]["eval_loss_fp4"] < records[0]["eval_loss_fp4"] - 0.5
    assert records[-1]["eval_loss_fp4"] != records[-1]["eval_loss_original"]
    assert [record["tokens"] for record in records[1:]] == [step * 4 * 64 for step in range(1, 7)]
    assert [record["learning_rate"] for record in records[1:]] == [0.0] + [1e-3] * 5
    timed = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    assert timed["tokens_per_second"] > 0 and 0.05 < timed["peak_memory_gib"] < 64

    measured = evaluate_qwen3.main(
        [f"model={reference / 'export'}", f"text.path={inputs / 'eval.txt'}", "sequence_length=64", "batch_size=2"]
    )
    assert measured == {name: value for name, value in records[-1].items() if name.startswith("eval_")}
    assert set(measured) == {"eval_loss_original", "eval_loss_fp4", "eval_kl_between"} and measured["eval_kl_between"] > 1e-4
    card = (reference / "export" / "README.md").read_text()
    assert "| learning_rate | 0.001 |" in card and f"| eval_loss_fp4_after | {measured['eval_loss_fp4']:.6g} |" in card
    assert str(reference) not in card
    assert len(get_handle(load_checkpoint(reference / "export")).patched) == 2


def test_a_killed_run_goes_on_bit_for_bit(reference, inputs, tmp_path):
    run_until_killed(finetune_qwen3, settings(inputs, tmp_path / "run"), "checkpoint-4")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4.incomplete"]
    assert [record["step"] for record in log(tmp_path / "run")] == [0, 1, 2, 3, 4]

    finetune(inputs, tmp_path / "run", resume="latest")
    assert_same_run(tmp_path / "run", reference)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_documents_of_a_block_do_not_see_each_other(inputs, tmp_path, monkeypatch):
    """Every call of 4-bit attention in training knows where they start; and the runs above resume with such blocks."""
    seen, attention = [], transformers_adapter.attention

    def spy(q, k, v, **kwargs):
        if torch.is_grad_enabled():  # not the export's reference input
            seen.append(kwargs["cu_seqlens_q"])
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(transformers_adapter, "attention", spy)
    changes = {"steps": 1, "accumulation_steps": 1, "batch_size": 7, "model.gradient_checkpointing": "true"}
    finetune(inputs, tmp_path / "run", **BARE | changes)
    assert len(seen) == 2 * 2  # layers, each run again in the backward pass
    texts = [json.loads(line)["text"] for line in (inputs / "train.jsonl").read_text().splitlines()]
    borders = {*accumulate(len(text) + 1 for text in texts)} & set(range(7 * 64)) | set(range(0, 7 * 64, 64))
    assert len(borders) > 7 + 8
    # blocks are shuffled: the lengths of their pieces are what does not change
    lengths = sorted(b - a for a, b in pairwise(sorted(borders | {7 * 64})))
    for cu_seqlens in seen:
        assert sorted(cu_seqlens.diff().tolist()) == lengths


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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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
        (lambda run: None, {"data.train.blocks": 6, "qat.spec.pv": "bf16"}, "data.train.blocks was 7 and is 6; qat.spec.pv was"),
        (lambda run: None, {"schedule": "linear", "steps": 7}, "schedule was 'constant' and is 'linear'; steps was 6 and is 7"),
        (lambda run: None, {"steps": 5}, "checkpoint-6 has seen 6 steps already, got 5"),
        (lambda run: None, {"resume": "null"}, "holds a run"),
        (lambda run: (run / "export").mkdir(), {}, "is finished"),
    ],
)
def test_what_cannot_go_on_is_refused_and_left_alone(reference, inputs, tmp_path, harm, changes, message):
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
    (tmp_path / "checkpoint-6/checkpoint.json").write_text(json.dumps(files.sealed(manifest)))
    with pytest.raises(ValueError, match="checkpoint-6 needs 2 processes, and there are 1"):
        finetune(inputs, tmp_path / "run", resume=tmp_path / "checkpoint-6")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_data_and_launches_that_do_not_fit_are_refused(inputs, tmp_path, monkeypatch):
    for changes, message in (
        ({"batch_size": 8}, "there are 7 samples to train on, and batch_size is 8"),
        ({"data.sequence_length": 10**6, "data.train.blocks": ...}, "do not fill one block of 1000000 tokens"),
        ({"qat.include": "['*.9.*']"}, r"the pattern '\*\.9\.\*' matches no attention module"),
        ({"report_to": "[nowhere]"}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(inputs, tmp_path / "run", **changes)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match="report_to: tensorboard cannot be used here"):
        finetune(inputs, tmp_path / "run", report_to="[tensorboard]")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="accelerate launch asks for bf16, the settings for mixed_precision=no"):
        finetune(inputs, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulation_equals_a_larger_batch(inputs, tmp_path):
    changes = BARE | {"data.train.path": inputs / "train.txt"} | {"data.train.blocks": 8, "steps": 3}
    finetune(inputs, tmp_path / "two", **changes, batch_size=2, accumulation_steps=2)
    finetune(inputs, tmp_path / "four", **changes, batch_size=4, accumulation_steps=1)
    for two, four in zip(log(tmp_path / "two"), log(tmp_path / "four"), strict=True):
        assert two["loss"] == pytest.approx(four["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)
        assert two["tokens"] == four["tokens"]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_equal_a_larger_batch(inputs, tmp_path, sharded):
    changes = BARE | {"data.train.path": inputs / "train.txt", "data.train.blocks": 8, "steps": 4}
    changes |= {"data.eval.path": inputs / "eval.txt", "data.eval.blocks": 4, "eval_every": 4, "checkpoint_every": 2}
    if sharded:
        changes["mixed_precision"] = "bf16"
    tolerance = 2e-2 if sharded else 1e-3
    finetune(inputs, tmp_path / "one", **changes, batch_size=2)

    program = [str(RECIPE)]
    if sharded:
        (tmp_path / "sharded.py").write_text(SHARDED)
        program = [str(tmp_path / "sharded.py"), str(RECIPE.parent), "finetune_qwen3"]
    for name, resume in (("two", "null"), ("resumed", tmp_path / "two" / "checkpoint-2"))[: 1 + sharded]:
        arguments = command_line(settings(inputs, tmp_path / name, **changes, batch_size=1, resume=resume))
        run_in_two_processes([*program, *arguments])

    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for a, b in zip(one, two, strict=True):
        # Small differences of large numbers, and codes that flip.
        assert a.pop("eval_kl_between", 0) == pytest.approx(b.pop("eval_kl_between", 0), rel=0.5)
        assert a == pytest.approx(b, rel=tolerance)
    if sharded:
        assert_same_run(tmp_path / "two", tmp_path / "resumed")
        assert torch.tensor(two[-1]["eval_loss_fp4"]).bfloat16().item() != two[-1]["eval_loss_fp4"]
    state = checkpoints.check(tmp_path / "two" / "checkpoint-4")
    assert (state["processes"], state["tokens"]) == (2, 4 * 2 * 2 * 64)
    assert (tmp_path / "two" / "checkpoint-4" / "model.safetensors").exists() is not sharded
    measured = evaluate_qwen3.main(
        [f"model={tmp_path}/two/export", f"text.path={inputs}/eval.txt", "text.blocks=4", "sequence_length=64"]
    )
    del measured["eval_kl_between"]
    assert measured == pytest.approx({name: two[-1][name] for name in measured}, rel=tolerance)


def test_the_launch_configs_are_ones_of_accelerate():
    ddp, fsdp2 = (
        load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml")) for name in ("ddp", "fsdp2")
    )
    assert (ddp.distributed_type, ddp.num_processes) == ("MULTI_GPU", 8)
    assert (fsdp2.distributed_type, fsdp2.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    options = launch_command_parser()._option_string_actions
    assert all(f"--{name}" in options for name in fsdp2.fsdp_config)


def test_accelerate_launch_runs_the_recipe_and_reports(inputs, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", str(RECIPE)]
    arguments = command_line(settings(inputs, tmp_path / "run", **BARE, report_to="[tensorboard]"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 0.001" in done.stdout and "patched  model.layers.1.self_attn" in done.stdout
    assert "2/2" in done.stderr and "tokens/s" in done.stderr
    assert any(path.stat().st_size for path in (tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_the_control_run_trains_through_original_attention(inputs, tmp_path, monkeypatch):
    finetune(inputs, tmp_path / "fp4", **BARE)

    attention = transformers_adapter.attention

    def refuse(*args, **kwargs):
        # An export is tried out in 4 bits whatever it was trained through.
        assert not torch.is_grad_enabled(), "4-bit attention ran"
        return attention(*args, **kwargs)

    monkeypatch.setattr(transformers_adapter, "attention", refuse)
    with pytest.raises(AssertionError, match="4-bit attention ran"):
        finetune(inputs, tmp_path / "spy", **BARE)
    finetune(inputs, tmp_path / "control", **BARE, attention="original")
    # The backward pass runs the forward pass again: through original attention, too.
    finetune(inputs, tmp_path / "checkpointing", **BARE, attention="original", **{"model.gradient_checkpointing": "true"})
    assert_same_run(tmp_path / "control", tmp_path / "checkpointing")
    losses = [log(tmp_path / name)[0]["loss"] for name in ("control", "fp4")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_gradients_are_clipped_once_a_step(inputs, tmp_path, monkeypatch):
    # Plain gradient descent moves by learning rate times gradient; Adam would hide the clipping.
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **options: torch.optim.SGD(parameters, lr))
    calls, clip = [], Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: calls.append(args) or clip(*args))
    start = weights(inputs / "model")
    for name, limit in (("clipped", 0.5), ("free", "null")):
        calls.clear()
        finetune(inputs, tmp_path / name, **BARE | {"steps": 1}, learning_rate=0.1, max_grad_norm=limit)
        end, (record,) = weights(tmp_path / name / "export"), log(tmp_path / name)
        moved = sum((end[key].double() - start[key].double()).square().sum() for key in start).sqrt().item()
        assert record["grad_norm"] > 1 and len(calls) == 1
        assert moved == pytest.approx(0.1 * (0.5 if limit == 0.5 else record["grad_norm"]), rel=1e-3)


def test_mixed_precision_keeps_float32_weights(inputs, tmp_path, monkeypatch):
    dtypes, attention = set(), transformers_adapter.attention
    monkeypatch.setattr(transformers_adapter, "attention", lambda q, k, v, **kw: dtypes.add(q.dtype) or attention(q, k, v, **kw))
    finetune(
        inputs, tmp_path / "run", **BARE | {"checkpoint_every": 2}, mixed_precision="bf16", **{"model.export_dtype": "bfloat16"}
    )
    assert dtypes == {torch.bfloat16}
    saved = tmp_path / "run" / "checkpoint-2"
    assert {tensor.dtype for tensor in weights(saved).values()} == {torch.float32}
    moments = torch.load(saved / "optimizer.bin")["state"][0]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / "export").values()} == {torch.bfloat16}


def test_training_goes_on_from_an_export(reference, inputs, tmp_path):
    finetune(inputs, tmp_path / "run", **BARE, **{"model.path": reference / "export", "qat.spec.pv": "bf16"})
    assert log(tmp_path / "run")[0]["loss"] < log(reference)[1]["loss"] - 0.5
    handle = get_handle(load_checkpoint(tmp_path / "run" / "export"))
    assert {layer.spec.pv for layer in handle.patched.values()} == {"bf16"}


class NoisyTask(Task):
    """Any model, any objective: this one draws random numbers in every step, as diffusion does."""

    eval_batch_size, distance_name = 2, "error"

    def __init__(self, settings, broken):
        self.model = tiny_qwen3(num_hidden_layers=1)
        self.handle, self.objective = patch_model(self.model), self
        self.train_data = TensorDataset(token_ids(9, 16))
        self.eval_data = TensorDataset(token_ids(3, 16, seed=5))
        self.settings, self.calls, self.broken = settings, 0, broken

    def inputs(self, batch):
        (ids,) = batch
        return ids, torch.randn(*ids.shape, VOCAB)

    def outputs(self, model, inputs):
        is_step = model.training and torch.is_grad_enabled()
        self.calls += is_step
        self.is_broken = is_step and self.calls in self.broken
        return model(inputs[0], use_cache=False).logits

    def loss(self, outputs, inputs):
        error = (outputs - inputs[1]).square().mean()
        return error * (float("nan") if self.is_broken else 1)

    def distance(self, outputs, teacher_outputs):
        return (outputs - teacher_outputs).square().mean()

    def after_step(self, step):
        return {}

    def batches(self, start, stop):
        return ShuffledBatches(len(self.train_data), self.settings.batch_size, self.settings.seed, start, stop)

    def tokens(self, batch):
        return batch[0].numel()

    def export(self, folder, training, metrics, weights):
        folder.mkdir()


def noisy(output_dir, broken=(), **changes):
    values = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "eval_every": 1, "checkpoint_every": 2}
    values = TrainingSettings(output_dir=str(output_dir), **values | changes)
    try:
        train(values, lambda accelerator: NoisyTask(values, broken))
    finally:
        reset_accelerate()
    return log(output_dir)


def test_random_numbers_go_on_too_and_measuring_takes_none(tmp_path):
    whole = noisy(tmp_path / "whole")
    assert noisy(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2")) == whole
    seldom = noisy(tmp_path / "seldom", eval_every=4)
    assert [record.get("loss") for record in seldom] == [record.get("loss") for record in whole]
    # Unlike that of training, the noise of measuring is always the same.
    assert whole[0]["eval_loss_fp4"] == pytest.approx(whole[0]["eval_loss_original"], rel=1e-3)
    assert whole[1]["loss"] != noisy(tmp_path / "other", seed=1)[1]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_batches_saved(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"step 3: .*nan.*batches are in (.*)\. The newest complete.* is .*checkpoint-2"
    ) as stop:
        noisy(run, broken={3})
    assert list(checkpoints.steps_in(run)) == [2]
    assert not (run / "export").exists()
    (file,) = (run / "nonfinite").iterdir()
    assert str(file) in str(stop.value)
    order = list(ShuffledBatches(9, 2, 0, 0, 4))[2]
    assert torch.equal(load_file(file)["0.0"], token_ids(9, 16)[order])
    # The cause removed, it goes on as if nothing had happened.
    assert noisy(run, resume="latest") == noisy(tmp_path / "whole")


def test_so_many_steps_are_skipped_and_change_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="step 4: .*max_skipped_steps is 1"):
        noisy(run, broken={2, 4}, max_skipped_steps=1)
    records = log(run)
    assert [record.get("skipped_steps") for record in records] == [None, None, 1, None]
    assert "loss" not in records[2] and records[2]["eval_loss_fp4"] == records[1]["eval_loss_fp4"]
    noisy(tmp_path / "one", steps=1, checkpoint_every=1)
    before, after = weights(tmp_path / "one" / "checkpoint-1"), weights(run / "checkpoint-2")
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The count goes on too, and the limit may be raised. Calls are counted from the resumed step on.
    with pytest.raises(FloatingPointError, match="step 4: .*max_skipped_steps is 1"):
        noisy(run, broken={2}, max_skipped_steps=1, resume="latest")
    assert noisy(run, broken={2}, max_skipped_steps=2, resume="latest")[-1]["skipped_steps"] == 2


def test_batches_are_shuffled_by_epoch_and_can_start_anywhere():
    whole = list(ShuffledBatches(samples=7, batch_size=2, seed=0, start=0, stop=9))
    assert len(whole) == 9 and all(len(batch) == 2 for batch in whole)
    epochs = [[index for batch in whole[first : first + 3] for index in batch] for first in (0, 3, 6)]
    assert all(len(set(epoch)) == 6 and set(epoch) <= set(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for start in range(9):
        assert list(ShuffledBatches(7, 2, 0, start, 9)) == whole[start:]
    assert list(ShuffledBatches(7, 2, 1, 0, 9)) != whole
