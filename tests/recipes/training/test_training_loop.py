"""The loop with any task: random numbers, and losses that are not finite."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from qat_patch import patch_model
from qat_recipes.data.text import ShuffledBatches
from qat_recipes.training import checkpoints
from qat_recipes.training.loop import train
from qat_recipes.training.settings import TrainingSettings
from qat_recipes.training.task import Task
from support.models.tiny_qwen3 import VOCAB, tiny_qwen3, token_ids
from support.runs.runs import log, reset_accelerate, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class NoisyTask(Task):
    """Any model, any objective: this one draws random numbers in every step, as diffusion does."""

    eval_batch_size, distance_name = 2, "error"

    def __init__(self, settings, broken):
        self.model = tiny_qwen3(num_hidden_layers=1)
        self.handle, self.objective = patch_model(self.model), self
        self.train_data = TensorDataset(token_ids(9, 16))
        self.eval_data = {"": TensorDataset(token_ids(3, 16, seed=5))}
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


def test_random_numbers_continue_too_and_measuring_draws_none(tmp_path):
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


def test_skipped_steps_are_limited_and_change_nothing(tmp_path):
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
