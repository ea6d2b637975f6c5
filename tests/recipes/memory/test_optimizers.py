"""Optimizers by name: what they move, what checkpoints hold of them, what is refused; and activations in the CPU's memory."""

import shutil
from types import SimpleNamespace

import pytest
import torch

import finetune_qwen3
from qat_recipes.memory import activations
from qat_recipes.memory.optimizers import check_optimizer, check_state, make_adamw
from qat_recipes.training import step as step_module
from support.runs.qwen3_runs import settings as qwen3_settings
from support.runs.runs import assert_same_run, log, run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OPTIONS = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": False}
# Matrices of 4,096 values and more have moments of a byte.
RUN = {"steps": 4, "batch_size": 1, "learning_rate": 1e-3, "seed": 3, "data.sequence_length": 64, "data.train.blocks": 4}
RUN |= {"checkpoint_every": 2, "data.eval.path": ..., "eval_every": 0}


def moved(name, steps=20):
    """A matrix after some steps towards the identity, and its optimizer."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = make_adamw(name, [weight], **OPTIONS)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - torch.eye(64)).square().sum().backward()
        optimizer.step()
    return weight.detach(), optimizer


def test_8_bits_move_weights_like_float32():
    pytest.importorskip("bitsandbytes")
    exact, _ = moved("adamw")
    rounded, optimizer = moved("adamw_8bit")
    start, _ = moved("adamw", steps=0)
    assert 0 < (rounded - exact).norm() / (exact - start).norm() < 0.1
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def finetune(inputs, folder, **changes):
    run(finetune_qwen3, qwen3_settings(inputs, folder, **RUN | changes))
    return log(folder)


def test_a_run_with_8_bits_resumes_bit_for_bit(inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = finetune(inputs, tmp_path / "whole", optimizer="adamw_8bit")
    plain = finetune(inputs, tmp_path / "plain")
    assert whole[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05) and whole[-1]["loss"] != plain[-1]["loss"]
    sizes = [(tmp_path / name / "checkpoint-2/optimizer.bin").stat().st_size for name in ("whole", "plain")]
    assert sizes[0] < 0.6 * sizes[1]
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-4"))
    finetune(inputs, tmp_path / "run", optimizer="adamw_8bit", resume="latest")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_states_that_do_not_fit():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    adamw = torch.optim.AdamW([weight])
    moments = {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
    check_state(adamw, {"state": {0: {"step": torch.tensor(1.0), **moments}}})
    for wrong in (moments, {"step": torch.tensor(1.0), **moments, "exp_avg": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match=r"expected a step and two moments of shape \(2, 3\) for parameter 0"):
            check_state(adamw, {"state": {0: wrong}})
    pytest.importorskip("bitsandbytes")
    small = make_adamw("adamw_8bit", [weight], **OPTIONS)
    weight.grad = torch.ones(2, 3)
    small.step()
    good = small.state_dict()["state"][0]
    check_state(small, {"state": {0: good}})
    (name,) = good.keys() - {"step"}
    for wrong in (
        good | {"step": torch.tensor(1.0)},
        good | {name: good[name] | {"state1": torch.zeros(6)}},
        good | {name: good[name] | {"more": torch.zeros(6)}},
        good | {name: []},
        good | {"more": 0},
        {"step": 1},
        {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)},
    ):
        with pytest.raises(ValueError, match=r"expected a step and two moments of shape \(2, 3\) for parameter 0"):
            check_state(small, {"state": {0: wrong}})


def test_what_is_not_known_to_work_is_refused(inputs, tmp_path):
    for name in ("paged_adamw", "paged_adamw_8bit"):
        with pytest.raises(ValueError, match=f"settings.optimizer: {name} moves states out of the memory of a GPU"):
            finetune(inputs, tmp_path / "run", optimizer=name)
    for changes, message in (
        ({"optimizer": "sgd"}, "settings.optimizer: expected adamw or adamw_8bit or paged_adamw or paged_adamw_8bit, got 'sgd'"),
        ({"optimizer": "adamw_8bit", "fused_optimizer": "true"}, "fused_optimizer: expected false with optimizer=adamw_8bit"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(inputs, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    gpu = torch.device("cuda")
    check_optimizer("paged_adamw", gpu, is_sharded=False)
    check_optimizer("adamw", gpu, is_sharded=True)
    with pytest.raises(ValueError, match="expected adamw where weights are sharded over processes, got paged_adamw"):
        check_optimizer("paged_adamw", gpu, is_sharded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit", "adamw_8bit"])
def test_on_a_gpu(name):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    for weight, kind in zip(weights, ("adamw", name), strict=True):
        optimizer = make_adamw(kind, [weight], **OPTIONS)
        for _ in range(10):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0.02)


@pytest.mark.gpu
def test_activations_wait_in_the_memory_of_the_cpu(inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    changes = {"model.gradient_checkpointing": "true"}
    plain = finetune(inputs, tmp_path / "plain", **changes)
    waiting, move = [], activations._to_cpu
    monkeypatch.setattr(activations, "_to_cpu", lambda x: waiting.append(move(x)[1].is_pinned()) or move(x))
    offloaded = finetune(inputs, tmp_path / "offloaded", offload_activations="true", **changes)
    assert [record.get("loss") for record in offloaded] == [record.get("loss") for record in plain]
    assert any(waiting)


def test_offloaded_tensors_keep_their_layout():
    a, b = torch.randn(3, 5), torch.randn(3, 4, requires_grad=True)
    with activations.activations_on_cpu():
        product = a.t() @ b
    back = product.grad_fn._saved_self
    assert back.stride() == a.t().stride() != a.stride()
    assert torch.equal(back, a.t()) and back.data_ptr() != a.data_ptr()


def test_activations_wait_where_a_step_is_made(inputs, tmp_path, monkeypatch):
    """As on a GPU, but not in pinned memory: every tensor that the backward pass needs goes through, and the losses stay."""
    plain = finetune(inputs, tmp_path / "plain", **{"model.gradient_checkpointing": "true"})
    moved, move = [], activations._to_cpu
    monkeypatch.setattr(activations, "_to_cpu", lambda x: moved.append(x.shape) or move(x))

    # Settings that would be refused here.
    make = step_module.Stepper.__init__

    def offloading(self, **named):
        values = vars(named["settings"]) | {"offload_activations": True, "processes_a_sample": 1}
        make(self, **named | {"settings": SimpleNamespace(**values)})

    monkeypatch.setattr(step_module.Stepper, "__init__", offloading)
    offloaded = finetune(inputs, tmp_path / "offloaded", **{"model.gradient_checkpointing": "true"})
    assert [record.get("loss") for record in offloaded] == [record.get("loss") for record in plain]
    hidden = torch.Size((1, 64, 64))
    layers = 2
    assert len([shape for shape in moved if shape == hidden]) >= layers * RUN["steps"]
