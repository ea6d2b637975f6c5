"""Linear layers in NVFP4 in the recipe for language models: all weights, adapters, what is measured, and resuming."""

import pytest
import torch

import evaluate_qwen3
import finetune_wan
from qat_patch import get_handle, get_linear_handle, load_checkpoint, verify_checkpoint
from support.models.exports import logits
from support.models.tiny_clips import write_clips
from support.models.tiny_wan import tiny_transformer
from support.runs.qwen3_runs import BARE, finetune
from support.runs.runs import assert_same_run, log, run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
COMBINATIONS = ("original", "fp4", "linear", "fp4_linear")


def test_all_weights_are_trained_measured_in_four_combinations_and_exported_packed(inputs, tmp_path):
    changes = {"linear.format": "nvfp4", "calibration_batches": 3, "linear.calibration_batches": 2, "steps": 4, "eval_every": 2}
    finetune(inputs, tmp_path / "run", **changes)
    records = log(tmp_path / "run")
    for record in (records[0], records[2], records[4]):
        losses = [record[f"eval_loss_{name}"] for name in COMBINATIONS]
        assert len(set(losses)) == 4
    assert records[4]["eval_loss_fp4_linear"] < records[0]["eval_loss_fp4_linear"] - 0.3
    folder = tmp_path / "run" / "export"
    assert any("14 linear layers in nvfp4, packed" in line for line in verify_checkpoint(folder))
    measured = evaluate_qwen3.main([f"model={folder}", f"text.path={inputs / 'eval.txt'}", "sequence_length=64", "batch_size=2"])
    for name in ("linear", "fp4_linear"):
        assert measured[f"eval_loss_{name}"] == pytest.approx(records[4][f"eval_loss_{name}"], rel=1e-5)
    assert "| eval_loss_fp4_linear_after |" in (folder / "README.md").read_text()
    # The ranges of inputs are part of the checkpoint: the run goes on to the bit.
    finetune(inputs, tmp_path / "resumed", resume=tmp_path / "run" / "checkpoint-2", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "resumed")


@pytest.mark.parametrize("export", ["merged", "adapters"])
def test_adapters_follow_the_unquantized_model(inputs, tmp_path, export):
    """The teacher is the starting model with nothing quantized."""
    changes = BARE | {"lora.rank": 4, "lora.alpha": 8, "lora.export": export, "distillation": 1.0, "linear.format": "nvfp4a16"}
    changes |= {
        "data.eval.path": inputs / "eval.txt",
        "eval_every": 2,
        "learning_rate": 1e-2,
        "linear.exclude": "['*.down_proj']",
    }
    finetune(inputs, tmp_path / "run", **changes)
    first, last = (log(tmp_path / "run")[step] for step in (0, 2))
    assert first["eval_kl_original"] < 1e-6 < first["eval_kl_linear"] < first["eval_kl_fp4_linear"]
    assert last["eval_kl_fp4_linear"] != first["eval_kl_fp4_linear"]
    loaded = load_checkpoint(tmp_path / "run" / "export")
    handle = get_linear_handle(loaded)
    assert len(handle.layers) == 12 and all(layer.is_packed for layer in handle.layers.values()) == (export == "merged")
    with handle.disabled(), get_handle(loaded).disabled():
        assert torch.isfinite(logits(loaded)).all()
    assert any("12 linear layers in nvfp4a16" in line for line in verify_checkpoint(tmp_path / "run" / "export"))


def test_without_adapters_the_teacher_is_unquantized_too(inputs, tmp_path):
    changes = BARE | {"data.eval.path": inputs / "eval.txt", "eval_every": 1, "steps": 1, "distillation": 1.0}
    finetune(inputs, tmp_path / "run", **changes | {"linear.format": "nvfp4", "attention": "original"})
    first = log(tmp_path / "run")[0]
    assert first["eval_kl_original"] < 1e-6 < min(first["eval_kl_fp4"], first["eval_kl_linear"])
    assert log(tmp_path / "run")[1]["loss"] > 1e-6  # the distance of quantized linear layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.format": "w4a4"}, "linear.format: expected nvfp4 or nvfp4a16"),
        ({"linear.format": "nvfp4a16", "linear.calibration_batches": 2}, "null with format nvfp4a16"),
        ({"linear.calibration_batches": 0}, "expected at least 1, or null"),
        ({"linear.calibration_batches": 99}, "at most the batches of the run"),
        ({"linear.exclude": "['*.fc1']"}, "matches no linear layer in a block"),
        (
            {"linear.format": "nvfp4", "lora.rank": 4, "lora.alpha": 8, "lora.dropout": 0.1},
            "lora.dropout: expected 0 with linear",
        ),
        (
            {"linear.format": "nvfp4", "lora.rank": 4, "lora.alpha": 8, "lora.base_dtype": "nf4"},
            "its layers round weights as they are; expected lora.base_dtype=null, got nf4",
        ),
        (
            {
                "linear.format": "nvfp4",
                "lora.rank": 4,
                "lora.alpha": 8,
                "lora.start.path": ".",  # it is not read
                "lora.start.use": "frozen",
            },
            "expected lora.start.use merged or trained, got frozen",
        ),
        (
            {"linear.exclude": "['*.q_proj']", "model.export_server": "vllm", "qat.spec.preset": "kv_nvfp4"},
            "merges q_proj, k_proj, v_proj into one layer",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_first_step(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **BARE | changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_wan_run_would_end_without_an_export_and_is_refused_at_once(tmp_path):
    tiny_transformer(layers=1).save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", 4)
    places = {"output_dir": tmp_path / "run", "model.path": tmp_path / "model", "data.train": tmp_path / "clips"}
    changes = {"steps": 2, "batch_size": 1, "learning_rate": 1e-5, "timesteps.flow_shift": 3.0, "linear.format": "nvfp4"}
    with pytest.raises(ValueError, match=r"settings\.linear: the result could not be exported: .* packed linear layers of a Wan"):
        run(finetune_wan, places | changes)
