"""The shipped YAML files, unchanged except for a tiny model, small data and few steps: each run ends with an export."""

import math
import shutil

import pytest

import finetune_qwen3
import finetune_wan
from qat_patch import get_handle, get_linear_handle, load_checkpoint
from support.models.tiny_clips import write_clips
from support.models.tiny_recipe import write_inputs
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import RECIPES, command_line, log, reset_accelerate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CONFIGS = RECIPES / "configs"


def texts(folder):
    """Many short documents, so that packed blocks hold several."""
    write_inputs(folder)
    shutil.copy(folder / "train.jsonl", folder / "eval.jsonl")
    changes = {"model.path": folder / "model", "data.sequence_length": 64, "warmup_steps": 1}
    for name in ("train", "eval"):
        changes |= {f"data.{name}.{key}": "null" for key in ("config", "documents")}
        changes[f"data.{name}.path"] = folder / f"{name}.jsonl"
    return changes | {"data.eval.split": "null"}


def no_texts(folder):
    """The model writes its own; a part of it is held out, for this test measures."""
    write_inputs(folder)
    changes = {"model.path": folder / "model", "data.sequence_length": 64, "data.eval_fraction": 0.2}
    return changes | {"data.generate.sequences": 16, "data.generate.batch_size": 8}


def clips(folder):
    tiny_pipeline(layers=1).save_pretrained(folder / "model")
    write_clips(folder / "clips", 8)
    changes = {"model.path": folder / "model", "data.train": folder / "clips", "data.eval_fraction": 0.3}
    return changes | {"samples.every": 2, "samples.inference_steps": 2}


@pytest.mark.parametrize(
    "name", ["qwen3_14b", "qwen3_kv_nvfp4", "qwen3_nvfp4", "qwen3_no_data", "wan2_1_1_3b", "wan2_1_14b", "wan2_1_14b_lora"]
)
def test_runs_to_an_export(name, tmp_path):
    recipe, inputs = (finetune_qwen3, texts) if name.startswith("qwen3") else (finetune_wan, clips)
    inputs = no_texts if name == "qwen3_no_data" else inputs
    changes = inputs(tmp_path) | {"output_dir": tmp_path / "run", "steps": 4, "report_to": "[]"}
    changes |= dict.fromkeys(("eval_every", "checkpoint_every", "layers_every"), 2)
    if name == "qwen3_nvfp4":
        changes |= {"data.eval_fraction": "null"}
    if name == "wan2_1_14b_lora":
        pytest.importorskip("bitsandbytes")
        changes |= {"offload_activations": "false"}  # from a GPU only
        assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) < 12
    try:
        recipe.main([f"--config={CONFIGS / name}.yaml", *command_line(changes)])
    finally:
        reset_accelerate()
    records = log(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(5))
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert any(key.startswith("quantization_error/") for key in records[2])
    handle = get_handle(load_checkpoint(tmp_path / "run" / "export"))
    assert handle.patched
    if name in ("qwen3_kv_nvfp4", "qwen3_nvfp4"):
        assert {spec.preset for spec in handle.specs.values()} == {"kv_nvfp4"}
        assert "vllm serve ." in (tmp_path / "run" / "export" / "SERVING.md").read_text()
    if name == "qwen3_nvfp4":
        assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) < 12
        assert len(get_linear_handle(load_checkpoint(tmp_path / "run" / "export")).layers) == 14
    if name == "qwen3_no_data":
        assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) < 12
        assert "kl" in records[1] and len(list((tmp_path / "run" / "generated").iterdir())) == 3
