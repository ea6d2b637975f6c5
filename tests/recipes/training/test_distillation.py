"""Distillation from the model's own unquantized self and adapters, on a language model."""

import copy

import peft
import pytest
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer

import evaluate_qwen3
import finetune_qwen3
from qat_patch import get_handle, load_checkpoint, patch_model
from qat_patch.hosts.transformers import attention as transformers_attention
from qat_recipes.tasks import language_modeling
from qat_recipes.tasks.language_modeling import NextToken
from qat_recipes.training import objective
from qat_recipes.training.adapters import LoraSettings, add_adapters, without_adapters
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.runs.runs import SHARDED, assert_same_run, command_line, log, run, run_in_two_processes, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
LORA = {"lora.rank": 4, "lora.alpha": 8}


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "model", "data.train.path": inputs / "train.txt", "output_dir": output_dir}
    measuring = {"data.eval.path": inputs / "eval.txt", "data.sequence_length": 64, "eval_every": 2}
    return places | measuring | {"steps": 2, "batch_size": 2, "learning_rate": 1e-3} | changes


def finetune(inputs, output_dir, **changes):
    run(finetune_qwen3, settings(inputs, output_dir, **changes))
    return log(output_dir)


def test_kl_is_that_of_the_definition(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    student.requires_grad_()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    # The gradient of KL(p || softmax(x)) is softmax(x) - p.
    gradient = ((q - p) / 10).detach()
    for tokens in (1024, 3):
        monkeypatch.setattr(language_modeling, "TOKENS_AT_ONCE", tokens)
        kl = NextToken().distance(student, teacher)
        assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(torch.autograd.grad(kl, student)[0].double(), gradient, atol=1e-6)
    assert NextToken().distance(teacher.bfloat16(), teacher.bfloat16()) == 0


@pytest.mark.parametrize("patched", [False, True])
def test_loss_and_gradients_of_packed_documents_are_those_of_the_documents(patched):
    model = tiny_qwen3(torch.float64)
    if patched:
        patch_model(model)
    documents = [token_ids(1, length, seed=length) for length in (20, 1, 43, 30, 34)]
    rows = documents[:3], documents[3:]
    batch = {
        "input_ids": torch.cat([torch.cat(row, 1) for row in rows]),
        "position_ids": torch.stack([torch.cat([torch.arange(x.shape[1]) for x in row]) for row in rows]),
    }
    inputs = NextToken().inputs(batch)
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 20, 21, 64, 94, 128]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 43
    loss = NextToken().loss(NextToken().outputs(model, inputs), inputs)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    several = [x for x in documents if x.shape[1] > 1]
    targets = [x.shape[1] - 1 for x in several]
    expected = sum(n * model(x, labels=x, use_cache=False).loss for n, x in zip(targets, several, strict=True)) / sum(targets)
    # transformers computes its loss in float32, as NextToken does
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-6 * parameter.grad.norm().item())


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_nothing_is_between_a_model_and_itself(inputs, tmp_path, lora):
    start, first, second = finetune(inputs, tmp_path / "control", **lora, attention="original", distillation=0.5)
    assert start["eval_kl_original"] == first["kl"] == 0 < start["eval_kl_fp4"]
    assert first["loss"] == pytest.approx(first["task_loss"] / 2)
    assert second["kl"] > 0 and second["eval_kl_original"] > 0


def test_a_mix_follows_both(inputs, tmp_path):
    records = {weight: finetune(inputs, tmp_path / str(weight), distillation=weight) for weight in (0, 0.25, 1)}
    assert "kl" not in records[0][1] and "eval_kl_fp4" not in records[0][0]
    for weight in (0.25, 1):
        first = records[weight][1]
        assert first["loss"] == pytest.approx((1 - weight) * first["task_loss"] + weight * first["kl"])
        assert first["task_loss"] == records[0][1]["loss"]
    last = {weight: record[-1] for weight, record in records.items()}
    assert last[0]["eval_loss_fp4"] < last[0.25]["eval_loss_fp4"] < last[1]["eval_loss_fp4"]
    assert last[1]["eval_kl_fp4"] < last[0.25]["eval_kl_fp4"]


def test_with_adapters_there_is_one_model(monkeypatch):
    """The teacher is the student with adapters off, in original attention, and leaves no trace."""
    stock = tiny_qwen3()
    model = add_adapters(copy.deepcopy(stock), LoraSettings(rank=4, alpha=8.0, dropout=0.5), ("q_proj", "v_proj"), seed=0)
    assert isinstance(model, peft.PeftModel)
    handle = patch_model(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    calls, attention = [], transformers_attention.attention
    monkeypatch.setattr(transformers_attention, "attention", lambda *args, **kw: calls.append(1) or attention(*args, **kw))
    monkeypatch.setattr(objective, "copy", None)
    teacher = objective.make_teacher(NextToken(), model, handle, Accelerator())
    model.train()
    ids = token_ids()
    inputs = NextToken().inputs({"input_ids": ids, "position_ids": torch.arange(50).expand_as(ids)})
    before = {name: x.requires_grad for name, x in model.named_parameters()}
    with torch.no_grad():
        expected = NextToken().outputs(stock, inputs)
    target = teacher(model, inputs)
    assert torch.equal(target, expected) and not target.requires_grad and not calls
    assert model.training and before == {name: x.requires_grad for name, x in model.named_parameters()}
    assert not torch.equal(NextToken().outputs(model, inputs), expected) and len(calls) == len(handle.patched)


def test_adapters_come_back_after_an_error():
    model = add_adapters(tiny_qwen3(), LoraSettings(rank=4, alpha=8.0), ("q_proj",), seed=0)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == 3
    with pytest.raises(KeyboardInterrupt), without_adapters(model):
        assert all(layer.disable_adapters for layer in layers)
        raise KeyboardInterrupt
    assert not any(layer.disable_adapters for layer in layers)


def test_adapters_resume_bit_for_bit_and_are_all_that_is_saved(inputs, tmp_path):
    changes = LORA | {"lora.dropout": 0.1, "distillation": 0.5, "steps": 4, "checkpoint_every": 2}
    changes |= {"model.gradient_checkpointing": "true"}
    finetune(inputs, tmp_path / "run", **changes)
    finetune(inputs, tmp_path / "resumed", **changes, resume=tmp_path / "run" / "checkpoint-2")
    assert_same_run(tmp_path / "run", tmp_path / "resumed")
    saved = weights(tmp_path / "run" / "checkpoint-4")
    # Two layers, four projections, two matrices each.
    assert len(saved) == 16 and all("lora" in name for name in saved)
    start, end = weights(inputs / "model"), weights(tmp_path / "run" / "export")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert start.keys() == end.keys() and changed == {name for name in start if "_proj" in name and "self_attn" in name}


def merged(start, adapters, scale, dtype):
    """Weights with adapters, all in float32: `start` as `dtype` holds it."""
    weights = {name: x.to(dtype).float() for name, x in start.items()}
    for name in [name for name in weights if "self_attn" in name and "_proj" in name]:
        a, b = (adapters[f"base_model.model.{name.replace('.weight', f'.lora_{x}.default.weight')}"] for x in "AB")
        assert a.dtype == b.dtype == torch.float32 and b.any()
        weights[name] += b @ a * scale
    return weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_weights_have_the_type_of_computation(inputs, tmp_path, dtype):
    """And what is exported is rounded no further, resumed runs are the same, and the teacher is the start."""
    changes = LORA | {"mixed_precision": "bf16", "distillation": 1, "steps": 4, "checkpoint_every": 2}
    changes |= {"lora.base_dtype": "null" if dtype == "bfloat16" else dtype}
    first, *_ = finetune(inputs, tmp_path / "run", **changes)
    assert first["eval_kl_original"] == 0 < first["eval_kl_fp4"]
    finetune(inputs, tmp_path / "resumed", **changes, resume=tmp_path / "run" / "checkpoint-2")
    assert_same_run(tmp_path / "run", tmp_path / "resumed")
    end = weights(tmp_path / "run" / "export")
    adapters = weights(tmp_path / "run" / "checkpoint-4")
    expected = merged(weights(inputs / "model"), adapters, 2.0, getattr(torch, dtype))
    assert end.keys() == expected.keys()
    for name, x in end.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-8)


def test_sharded_frozen_weights_are_bfloat16_too(inputs, tmp_path):
    changes = LORA | {"mixed_precision": "bf16", "distillation": 0.5}
    *_, one = finetune(inputs, tmp_path / "one", **changes)
    (tmp_path / "sharded.py").write_text(SHARDED)
    arguments = command_line(settings(inputs, tmp_path / "two", **changes, batch_size=1))
    run_in_two_processes([str(tmp_path / "sharded.py"), "finetune_qwen3", *arguments])
    *_, two = log(tmp_path / "two")
    assert two["eval_loss_original"] == pytest.approx(one["eval_loss_original"], rel=2e-2)
    a, b, start = (weights(folder) for folder in (tmp_path / "one" / "export", tmp_path / "two" / "export", inputs / "model"))
    for name, x in start.items():
        if "self_attn" not in name:
            assert torch.equal(a[name], b[name]) and torch.equal(b[name], x.bfloat16().float())


def test_frozen_weights_in_bfloat16_need_mixed_precision(inputs, tmp_path):
    with pytest.raises(ValueError, match="base_dtype: expected float32 or null without mixed_precision=bf16, got bfloat16"):
        finetune(inputs, tmp_path / "run", **LORA, **{"lora.base_dtype": "bfloat16"})


def test_adapters_alone_are_exported(inputs, tmp_path):
    *_, last = finetune(inputs, tmp_path / "run", **LORA, **{"lora.export": "adapters", "lora.target_modules": "[o_proj]"})
    export = tmp_path / "run" / "export"
    assert all("o_proj.lora" in name for name in weights(export))
    model = load_checkpoint(export)
    assert len(get_handle(model).patched) == 2
    text = ["text.path=" + str(inputs / "eval.txt"), "sequence_length=64", "batch_size=2"]
    assert evaluate_qwen3.main([f"model={export}", *text]) == {
        name: last[name] for name in ("eval_loss_original", "eval_loss_fp4", "eval_kl_between")
    }
