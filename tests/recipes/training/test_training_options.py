"""What a run can be asked for besides its data: moving averages, fused and compiled steps, and what the log says of layers."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config, Phi3ForCausalLM

import finetune_qwen3
import finetune_wan
from qat_patch import calibrate, get_handle, load_checkpoint, patch_model, verify_checkpoint
from qat_recipes.command_line import read_settings
from qat_recipes.tasks.language_modeling import LanguageModeling, NextToken, Settings
from qat_recipes.training import diagnostics
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.objective import CalledWithBatch
from support.models.tiny_clips import write_clips
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import command_line, log, run, run_until_killed, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 3, "data.sequence_length": 64, "data.train.blocks": 7}


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "model", "data.train.path": inputs / "train.txt", "output_dir": output_dir}
    return STEPS | places | changes


def finetune(inputs, output_dir, **changes):
    run(finetune_qwen3, settings(inputs, output_dir, **changes))
    return log(output_dir)


def test_moving_average(inputs, tmp_path):
    """Of the weights of every step, as diffusers weighs them; measured, exported, and part of a checkpoint."""
    decay = 0.6
    held_out = {"data.eval.path": inputs / "eval.txt", "eval_every": 4}
    records = finetune(inputs, tmp_path / "ema", ema_decay=decay, checkpoint_every=2, **held_out)
    steps = finetune(inputs, tmp_path / "plain", checkpoint_every=1, **held_out)
    # Training itself takes no notice, and what is measured is not what was trained.
    assert [record.get("loss") for record in records] == [record.get("loss") for record in steps]
    assert records[-1]["eval_loss_fp4"] != steps[-1]["eval_loss_fp4"]
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = weights(inputs / "model")[name]
    for step in range(1, 5):
        now = weights(tmp_path / "plain" / f"checkpoint-{step}")[name]
        # EMAModel starts with a shorter memory.
        rate = min(decay, (1 + (step - 1)) / (10 + (step - 1))) if step > 1 else 0.0
        expected = expected - (1 - rate) * (expected - now)
    torch.testing.assert_close(weights(tmp_path / "ema" / "export")[name], expected, rtol=1e-5, atol=1e-7)

    run_until_killed(
        finetune_qwen3, settings(inputs, tmp_path / "killed", ema_decay=decay, checkpoint_every=2, **held_out), "checkpoint-4"
    )
    assert finetune(inputs, tmp_path / "killed", ema_decay=decay, checkpoint_every=2, resume="latest", **held_out) == records
    assert torch.equal(weights(tmp_path / "killed" / "export")[name], weights(tmp_path / "ema" / "export")[name])


def test_calibration(inputs, tmp_path):
    """On the first batches of the run, which are then learned from like all others; kept by checkpoints and by the export."""
    options = {"calibration_batches": 3, "checkpoint_every": 2, "model.gradient_checkpointing": "true"}
    records = finetune(inputs, tmp_path / "whole", **options)
    assert [r["loss"] for r in records] != [r["loss"] for r in finetune(inputs, tmp_path / "plain")]
    shifts = get_handle(load_checkpoint(tmp_path / "whole" / "export")).shifts

    chosen = read_settings(Settings, command_line(settings(inputs, tmp_path / "no")))
    task = LanguageModeling(chosen, Accelerator())
    batches = [default_collate([task.train_data[i] for i in indices]) for indices in task.batches(0, 3)]
    calibrate(CalledWithBatch(task.objective, task.model), batches)
    assert len(shifts["k_shift"]) == len(shifts["q_shift"]) == 2
    torch.testing.assert_close(shifts, get_handle(task.model).shifts)

    run_until_killed(finetune_qwen3, settings(inputs, tmp_path / "killed", **options), "checkpoint-4")
    assert finetune(inputs, tmp_path / "killed", resume="latest", **options) == records
    again = get_handle(load_checkpoint(tmp_path / "killed" / "export")).shifts
    torch.testing.assert_close(again, shifts, rtol=0, atol=0)

    alone = options | {"calibration_shifts": "['q_shift']"}
    finetune(inputs, tmp_path / "alone", **alone)
    handle = get_handle(load_checkpoint(tmp_path / "alone" / "export"))
    assert not handle.k_shift
    torch.testing.assert_close(handle.q_shift, shifts["q_shift"], rtol=0, atol=0)
    for wrong, message in (
        ("[]", "expected k_shift, q_shift or both"),
        ("['v_shift']", "expected k_shift or q_shift, got"),
    ):
        with pytest.raises(ValueError, match=f"calibration_shifts.*{message}"):
            finetune(inputs, tmp_path / "wrong", **options | {"calibration_shifts": wrong})


def test_modules_are_left_out_of_calibration(inputs, tmp_path):
    """They have no shift in the run, in its checkpoints, and in the export; the others' are those that all would have."""
    options = {"calibration_batches": 3, "checkpoint_every": 2}
    finetune(inputs, tmp_path / "all", **options)
    expected = get_handle(load_checkpoint(tmp_path / "all" / "export")).shifts
    left_out = options | {"calibration_exclude": "['*.0.*']"}
    records = finetune(inputs, tmp_path / "some", **left_out)
    handle = get_handle(load_checkpoint(tmp_path / "some" / "export"))
    name = "model.layers.1.self_attn"
    assert len(handle.patched) == 2
    kept = {which: {name: found[name]} for which, found in expected.items()}
    torch.testing.assert_close(handle.shifts, kept, rtol=0, atol=0)

    run_until_killed(finetune_qwen3, settings(inputs, tmp_path / "killed", **left_out), "checkpoint-4")
    for changed in ("[]", "['*.1.*']"):
        with pytest.raises(ValueError, match="calibration_exclude"):
            finetune(inputs, tmp_path / "killed", resume="latest", **options | {"calibration_exclude": changed})
    assert finetune(inputs, tmp_path / "killed", resume="latest", **left_out) == records
    torch.testing.assert_close(get_handle(load_checkpoint(tmp_path / "killed" / "export")).shifts, kept, rtol=0, atol=0)

    with pytest.raises(ValueError, match=r"exclude: the pattern '\*.attn2' matches no patched module"):
        finetune(inputs, tmp_path / "typo", **options | {"calibration_exclude": "['*.attn2']"})
    with pytest.raises(ValueError, match=r"calibration_exclude: expected \[\] without calibration_batches"):
        finetune(inputs, tmp_path / "nothing", calibration_exclude="['*.0.*']")


def test_a_model_whose_projections_have_other_names():
    """Phi-3 has one for Q, K and V."""
    config = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(**config, pad_token_id=0))
    with pytest.raises(
        ValueError, match=r"no module q_proj; null means that one too; .*layers are o_proj, qkv_proj, gate_up_proj,"
    ):
        add_adapters(model, LoraSettings(rank=2, alpha=2), LanguageModeling.lora_targets, 0)
    with pytest.raises(ValueError, match="no module q_proj; leave it out"):
        add_adapters(model, LoraSettings(rank=2, alpha=2, target_modules=("o_proj", "q_proj")), LanguageModeling.lora_targets, 0)
    trained = add_adapters(model, LoraSettings(rank=2, alpha=2, target_modules=("qkv_proj",)), LanguageModeling.lora_targets, 0)
    assert sum(x.requires_grad for x in trained.parameters()) == 2


def test_adapters_trained_under_mixed_precision_are_verified(inputs, tmp_path):
    """What an export records is computed without autocast, as in a process that loads it."""
    finetune(inputs, tmp_path / "run", mixed_precision="bf16", **{"lora.rank": 4, "lora.alpha": 8, "lora.export": "adapters"})
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "run" / "export")) == 2


def test_fused_and_compiled_steps_compute_the_same(inputs, tmp_path, monkeypatch):
    plain = finetune(inputs, tmp_path / "plain")
    calls, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: calls.append(options) or adamw(*args, **options))
    fused = finetune(inputs, tmp_path / "fused", fused_optimizer="true")
    assert calls[0]["fused"] is True
    compiled_blocks, compile_block = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, **options: compiled_blocks.append(block) or compile_block(block, **options)
    )
    compiled = finetune(inputs, tmp_path / "compiled", compile="eager")
    assert len(compiled_blocks) == 2
    for other in (fused, compiled):
        assert [record["loss"] for record in other] == pytest.approx([record["loss"] for record in plain], rel=1e-4)
    assert weights(tmp_path / "compiled" / "export").keys() == weights(tmp_path / "plain" / "export").keys()
    assert len(get_handle(load_checkpoint(tmp_path / "compiled" / "export")).patched) == 2


def test_what_the_log_says_of_layers(inputs, tmp_path):
    records = finetune(inputs, tmp_path / "run", layers_every=2)
    plain = finetune(inputs, tmp_path / "plain")
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]
    unquantized_v = finetune(inputs, tmp_path / "pv", layers_every=2, **{"qat.spec.preset": "nvfp4_qk"})
    errors = [f"quantization_error/model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert all(0.01 < unquantized_v[1][name] < records[1][name] < 0.3 for name in errors) and errors[0] not in records[2]
    names = {"grad_norm/model.layers.0", "grad_norm/model.layers.1", "grad_norm/rest"}
    assert [names <= record.keys() for record in records] == [False, True, False, True]
    for record in records[1::2]:
        assert sum(record[name] ** 2 for name in names) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)


def test_speed(inputs, tmp_path, monkeypatch):
    finetune(inputs, tmp_path / "run", steps=2)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["tflops_per_second"] > 0 and "mfu" not in record  # a CPU has no peak in the table

    model = tiny_qwen3()
    handle = patch_model(model)
    count = diagnostics.FlopCount(NextToken(), handle, model, Accelerator())
    batch = {"input_ids": token_ids(2, 48), "position_ids": torch.arange(48).repeat(2, 1)}
    state = torch.get_rng_state()
    operations = count.of(model, batch)
    assert torch.equal(torch.get_rng_state(), state) and handle.patched["model.layers.0.self_attn"].quantizes
    # 2 operations for each weight and token, forward; three times that with the backward pass. And attention: two products.
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    attention = 3 * 2 * 2 * 2 * 4 * 48 * 48 * 32
    assert operations == pytest.approx(3 * (2 * matrices * 96 + attention), rel=0.02)
    monkeypatch.setattr(FlopCounterMode, "__enter__", lambda self: pytest.fail("counted twice"))
    assert count.of(model, batch) == operations
    count.peak = 989
    assert count.speed(989e12, 2.0) == {"tflops_per_second": 494.5, "mfu": 0.5}


def test_samples_are_compared(tmp_path):
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "model")
    for name, count in (("clips", 4), ("eval", 1)):
        write_clips(tmp_path / name, count)
    options = {"model.path": tmp_path / "model", "data.train": tmp_path / "clips", "data.eval": tmp_path / "eval"}
    options |= {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "eval_every": 1, "output_dir": tmp_path / "run"}
    options |= {"calibration_batches": 1, "samples.every": 1, "samples.clips": 1, "samples.inference_steps": 2}
    run(finetune_wan, options)
    assert any(shift.abs().max() > 0 for shift in get_handle(load_checkpoint(tmp_path / "run" / "export")).k_shift.values())
    records = log(tmp_path / "run")
    for record in records:
        assert 10 < record["sample_psnr"] <= 100 and 0.3 < record["sample_ssim"] < 1.001
        assert record["eval_velocity_error_between"] > 0
    assert any(record["sample_psnr"] < 100 for record in records)  # few pixels: some samples may be equal
    from qat_recipes.tasks.samples import psnr, ssim

    video = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy()
    assert (psnr(video, video), ssim(video, video)) == (100.0, pytest.approx(1.0))
    assert psnr(video + 0.1, video) == pytest.approx(20.0, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay: expected a number between 0 and 1"),
        ({"layers_every": 9}, "layers_every: expected at most steps"),
        ({"max_skipped_steps": -1}, "max_skipped_steps: expected 0 or more"),
        ({"calibration_batches": 5}, r"calibration_batches: expected at most the batches of the run \(4\), got 5"),
    ],
)
def test_mistakes(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **changes)
