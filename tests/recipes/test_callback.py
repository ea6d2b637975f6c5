"""QATCallback in Transformers' Trainer and TRL's: what it measures, calibrates, keeps in checkpoints and exports."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from qat_patch import (
    AttnQATConfig,
    LinearQATConfig,
    QuantSpec,
    calibrate,
    get_handle,
    get_linear_handle,
    load_checkpoint,
    patch_model,
    quantize_linears,
)
from qat_recipes.callback import QATCallback
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import words
from support.models.tiny_trl import ARGUMENTS, chat_tokenizer, count_letters, load, prompts, texts, write_model

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CONFIG = AttnQATConfig(spec=QuantSpec(rotate=True))
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def sft(folder, output_dir, config=CONFIG, peft_config=None, callback=True, **options):
    names = ("calibration_batches", "calibration_exclude", "export_dir", "dtype", "server", "merge_adapters", "base_model")
    of_callback = {name: options.pop(name) for name in names if name in options}
    arguments = trl.SFTConfig(output_dir=str(output_dir), **ARGUMENTS | {"eval_on_start": callback} | options)
    data = {"train_dataset": texts(), "eval_dataset": texts(16).select(range(12, 16))}
    trainer = trl.SFTTrainer(load(folder), arguments, processing_class=chat_tokenizer(), peft_config=peft_config, **data)
    patch_model(trainer.model, config)
    if callback:
        trainer.add_callback(QATCallback(trainer, **of_callback))
    return trainer


def measured(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_measures_in_both_attentions_and_leaves_the_training_alone(folder, tmp_path):
    trainer = sft(folder, tmp_path, **EVERY_STEP)
    trainer.train()
    alone = sft(folder, tmp_path, callback=False, **EVERY_STEP)
    alone.train()
    assert same(weights(trainer), weights(alone))
    losses = measured(alone, "eval_loss")
    assert measured(trainer, "eval_loss")[1:] == losses and len(measured(trainer, "eval_original_loss")) == 3
    assert measured(trainer, "eval_entropy")[1:] == measured(alone, "eval_entropy")
    with get_handle(alone.model).disabled():
        original = alone.evaluate()
    assert measured(trainer, "eval_original_loss")[-1] == original["eval_loss"] != losses[-1]
    assert measured(trainer, "eval_original_entropy")[-1] == measured(alone, "eval_entropy")[-1]
    assert not any("runtime" in name for record in trainer.state.log_history for name in record if "original" in name)
    assert trainer.evaluate()["eval_original_loss"] == original["eval_loss"]


def test_calibrates_before_the_first_step_on_its_batches(folder, tmp_path):
    trainer = sft(folder, tmp_path, calibration_batches=2, calibration_exclude=["*.1.*"], packing=True, max_length=64)
    model = load(folder)
    patch_model(model, CONFIG)
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    batches = list(sft(folder, tmp_path, callback=False, packing=True, max_length=64).get_train_dataloader())[:2]
    calibrate(model, [{name: batch[name] for name in names} | {"use_cache": False} for batch in batches], exclude=["*.1.*"])
    callback = trainer.callback_handler.callbacks[-1]
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert not trainer.accelerator.gradient_state.in_dataloader  # of the loader whose first batches were looked at
    trainer.train()
    shifts, expected = get_handle(trainer.model).shifts, get_handle(model).shifts
    for which in ("k_shift", "q_shift"):
        assert [*shifts[which]] == ["model.layers.0.self_attn"] and same(shifts[which], expected[which])
    # as if nobody had looked at the batches before
    alone = sft(folder, tmp_path, callback=False, packing=True, max_length=64)
    for name, layer in get_handle(alone.model).patched.items():
        layer.k_shift, layer.q_shift = expected["k_shift"].get(name), expected["q_shift"].get(name)
    alone.train()
    assert same(weights(trainer), weights(alone))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])], ids=["full", "lora"])
def test_resumes_from_a_checkpoint(peft_config, folder, tmp_path):
    options = {"peft_config": peft_config, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "calibration_batches": 1}
    whole = sft(folder, tmp_path / "whole", **options)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = sft(folder, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(weights(resumed), weights(whole))
    shifts = get_handle(whole.model).shifts
    torch.testing.assert_close(get_handle(resumed.model).shifts, shifts, rtol=0, atol=0)
    assert len(shifts["k_shift"]) == len(shifts["q_shift"]) == 2
    if peft_config is None:
        reloaded = get_handle(load(checkpoint))
        torch.testing.assert_close(reloaded.shifts, shifts, rtol=0, atol=0)
        assert reloaded.config == CONFIG
    with pytest.raises(
        ValueError, match=r"trained with other attention in 2 modules, such as .*layers.0.*rotate=True.*rotate=False"
    ):
        sft(folder, tmp_path / "other", AttnQATConfig(), **options).train(resume_from_checkpoint=checkpoint)
    state = Path(checkpoint, "trainer_state.json")
    kept = json.loads(state.read_text())
    del kept["stateful_callbacks"]["qat_patch"]
    state.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="written without this callback"):
        sft(folder, tmp_path / "other", **options).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("preset", ["nvfp4", "kv_nvfp4"])
def test_with_linear_layers_in_4_bits(folder, tmp_path, preset):
    """Measured, calibrated, resumed to the bit and exported packed. Grids of servers have no shifts, but inputs have ranges."""
    config = AttnQATConfig(spec=QuantSpec(preset=preset))
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "calibration_batches": 1, **EVERY_STEP}

    def quantized(run, **more):
        trainer = sft(folder, tmp_path / run, config, **options | more)
        quantize_linears(trainer.model, LinearQATConfig(format="nvfp4"))
        return trainer

    whole = quantized("whole", export_dir=tmp_path / "export")
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    linears = get_linear_handle(whole.model)
    resumed = quantized("resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(weights(resumed), weights(whole)) and get_linear_handle(resumed.model).scales == linears.scales
    assert len(get_handle(whole.model).k_shift) == (2 if preset == "nvfp4" else 0)
    # `eval_loss` is with all of it, what is original with none.
    last = whole.evaluate()
    with linears.disabled(), get_handle(whole.model).disabled():
        expected = sft(folder, tmp_path / "plain", callback=False)
        expected.model = whole.model
        assert expected.evaluate()["eval_loss"] == last["eval_original_loss"] != last["eval_loss"]
    loaded = load_checkpoint(tmp_path / "export")
    assert all(layer.is_packed for layer in get_linear_handle(loaded).layers.values())
    with pytest.raises(ValueError, match=r"with 14 other linear layers, such as .*: expected quantized, got original"):
        sft(folder, tmp_path / "other", config, **options).train(resume_from_checkpoint=checkpoint)


def test_linear_layers_whose_inputs_nobody_has_measured(folder, tmp_path):
    trainer = sft(folder, tmp_path)
    quantize_linears(trainer.model, LinearQATConfig(format="nvfp4"))
    with pytest.raises(ValueError, match=r"QATCallback: .*or set calibration_batches"):
        trainer.train()


def test_exports_the_best_model(folder, tmp_path):
    best = {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_original_loss",
    }
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    # The second step spoils what the first one learned.
    options = {"learning_rate": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 1, "max_steps": 3, "max_grad_norm": 100.0}
    options |= {"bf16": True, "peft_config": lora, "calibration_batches": 1, "export_dir": tmp_path / "export"}
    trainer = sft(folder, tmp_path / "run", **options, **best, **EVERY_STEP)
    trainer.train()
    losses = measured(trainer, "eval_original_loss")[1:]
    assert trainer.state.best_metric == min(losses) and losses.index(min(losses)) != len(losses) - 1
    loaded = load_checkpoint(tmp_path / "export")
    handle = get_handle(loaded)
    torch.testing.assert_close(handle.shifts, get_handle(trainer.model).shifts, rtol=0, atol=0)
    assert handle.config == CONFIG
    merged = trainer.model.merge_and_unload()
    assert all(torch.allclose(x, loaded.state_dict()[name], atol=1e-6) for name, x in merged.state_dict().items())
    about = (tmp_path / "export" / "README.md").read_text()
    assert "eval_original_loss" in about and "SFTTrainer" in about
    assert (tmp_path / "export" / "tokenizer.json").is_file()


def test_transformers_own_trainer_with_several_held_out_sets(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_qwen3(vocab_size=len(tokenizer), num_hidden_layers=1)
    rows = [dict(tokenizer(words(5, seed=seed))) for seed in range(8)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **ARGUMENTS, **EVERY_STEP)
    held_out = {"near": rows[:2], "far": rows[6:]}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, collator, train_dataset=rows, eval_dataset=held_out)
    handle = patch_model(model)
    trainer.add_callback(QATCallback(trainer, export_dir=tmp_path / "export", dtype="bfloat16"))
    trainer.train()
    for name in held_out:
        assert len(measured(trainer, f"eval_{name}_original_loss")) == 2
    with handle.disabled():
        found = trainer.evaluate()
    assert found["eval_near_loss"] == measured(trainer, "eval_near_original_loss")[-2]
    assert found["eval_far_loss"] == measured(trainer, "eval_far_original_loss")[-2]
    assert load_checkpoint(tmp_path / "export").dtype == torch.bfloat16


def test_rewards_of_grpo_in_both_attentions(folder, tmp_path):
    sizes = {"num_generations": 2, "max_completion_length": 12, "per_device_eval_batch_size": 2, "max_steps": 1}
    arguments = trl.GRPOConfig(str(tmp_path), **ARGUMENTS | sizes | EVERY_STEP)
    data = {"train_dataset": prompts(), "eval_dataset": prompts(2)}
    trainer = trl.GRPOTrainer(load(folder), count_letters, arguments, processing_class=chat_tokenizer(), **data)
    handle = patch_model(trainer.model)
    trainer.add_callback(QATCallback(trainer))
    with handle.cached():
        trainer.train()
    assert len(measured(trainer, "eval_reward")) == len(measured(trainer, "eval_original_reward")) == 1
    trainer.add_callback(QATCallback(trainer, calibration_batches=1))
    with pytest.raises(ValueError, match="expected batches with input_ids, got list from the GRPOTrainer.*qat_patch.calibrate"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_batches": -1}, "calibration_batches: expected a number from 0 up, got -1"),
        ({"calibration_exclude": ["*.0.*"]}, "calibration_exclude has no effect without calibration_batches"),
        ({"dtype": "bfloat16"}, "dtype: has no effect without export_dir"),
        ({"export_dir": "."}, "export_dir: . exists"),
        ({"export_dir": "new", "data": 1}, "export_checkpoint has no data; it has auto_enable, "),
    ],
)
def test_arguments_that_are_refused(options, message, tmp_path):
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), TrainingArguments(str(tmp_path), **ARGUMENTS))
    with pytest.raises(ValueError, match=message):
        QATCallback(trainer, **options)


def test_trainings_that_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a Trainer of transformers or TRL, got Qwen3ForCausalLM"):
        QATCallback(tiny_qwen3())
    trainer = sft(folder, tmp_path, export_dir=tmp_path / "export", server="vllm")
    with pytest.raises(ValueError, match="server='vllm'|preset"):
        trainer.train()
    with get_handle(trainer.model).disabled(), pytest.raises(ValueError, match="inside handle.disabled"):
        trainer.train()
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), TrainingArguments(str(tmp_path), **ARGUMENTS), train_dataset=[{}])
    trainer.add_callback(QATCallback(trainer))
    with pytest.raises(ValueError, match="is not patched; call patch_model first"):
        trainer.train()
