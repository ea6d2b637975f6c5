"""The scripts of recipes/examples, unchanged, on a tiny model and small files: each ends with an export that loads."""

import json

import pytest

from qat_patch import QuantSpec, get_handle, load_checkpoint
from support.models import tiny_trl

pytest.importorskip("trl", reason="TRL needs Python 3.11")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROWS = {"trainer": tiny_trl.texts, "trl_sft": tiny_trl.conversations, "trl_dpo": tiny_trl.preferences}
OPTIONS = {
    "trainer": ["--eval_strategy=epoch", "--save_strategy=epoch", "--max_length=64"],
    "trl_sft": ["--packing=true", "--max_length=64", "--use_peft=true", "--bf16=true"],
    "trl_dpo": ["--bf16=false"],
    "trl_grpo": ["--bf16=false", "--max_completion_length=16", "--beta=0.1", "--num_generations=2", "--eval_strategy=epoch"],
}
OPTIONS["trl_sft"] += ["--eval_strategy=epoch", "--lora_target_modules", "q_proj", "k_proj"]


def questions(count):
    return tiny_trl.prompts(count).add_column("answer", ["a"] * count)


@pytest.mark.parametrize("name", OPTIONS)
def test_example_runs_to_an_export(name, tmp_path, capsys):
    from examples import trainer, trl_dpo, trl_grpo, trl_sft

    script = {"trainer": trainer, "trl_sft": trl_sft, "trl_dpo": trl_dpo, "trl_grpo": trl_grpo}[name]
    tiny_trl.write_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 8), ("test", 4)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS.get(name, questions)(count)))
    model, dataset = ("model", "data") if name == "trainer" else ("model_name_or_path", "dataset_name")
    arguments = [f"--{model}={tmp_path / 'model'}", f"--{dataset}={data}", f"--output_dir={tmp_path / 'run'}", *OPTIONS[name]]
    script.main([*arguments, "--use_cpu=true", "--report_to=none", "--num_train_epochs=1", "--per_device_train_batch_size=4"])
    assert "4-bit attention in 2 of 2 attention modules" in capsys.readouterr().out
    handle = get_handle(load_checkpoint(tmp_path / "run" / "export"))
    assert {*handle.specs.values()} == {QuantSpec(rotate=True, four_over_six=True)}
    assert len(handle.k_shift) == (2 if name in ("trainer", "trl_sft") else 0)
    metrics = (tmp_path / "run" / "export" / "README.md").read_text()
    assert ("eval_original_loss" in metrics) == ("--eval_strategy=epoch" in OPTIONS[name])
