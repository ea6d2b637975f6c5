"""The recipe for language models in several processes, and under accelerate launch."""

import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import evaluate_qwen3
from qat_patch import get_handle, get_linear_handle, load_checkpoint
from qat_recipes.training import checkpoints
from support.runs.qwen3_runs import BARE, finetune, settings
from support.runs.runs import RECIPES, SHARDED, assert_same_run, command_line, log, run_in_two_processes

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROOT = RECIPES.parent
RECIPE = RECIPES / "finetune_qwen3.py"


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_equal_a_larger_batch(inputs, tmp_path, sharded):
    changes = BARE | {"data.train.path": inputs / "train.txt", "data.train.blocks": 8, "steps": 4}
    changes |= {"data.eval.path": inputs / "eval.txt", "data.eval.blocks": 4, "eval_every": 4, "checkpoint_every": 2}
    changes["calibration_batches"] = 2
    if sharded:
        changes |= {"mixed_precision": "bf16", "linear.format": "nvfp4a16"}
    tolerance = 2e-2 if sharded else 1e-3
    finetune(inputs, tmp_path / "one", **changes, batch_size=2)

    program = [str(RECIPE)]
    if sharded:
        (tmp_path / "sharded.py").write_text(SHARDED)
        program = [str(tmp_path / "sharded.py"), "finetune_qwen3"]
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
    loaded = load_checkpoint(tmp_path / "two" / "export")
    assert len(get_handle(loaded).k_shift) == 2 and (get_linear_handle(loaded) is not None) == sharded
    if sharded:  # its weights stay on the 4-bit grid
        for name in ("eval_loss_original", "eval_loss_fp4"):
            del measured[name]
    del measured["eval_kl_between"]
    assert measured == pytest.approx({name: two[-1][name] for name in measured}, rel=tolerance)


def test_the_launch_configs_are_ones_of_accelerate():
    ddp, fsdp2 = (load_config_from_file(str(RECIPES / "accelerate_configs" / f"{name}.yaml")) for name in ("ddp", "fsdp2"))
    assert (ddp.distributed_type, ddp.num_processes) == ("MULTI_GPU", 8)
    assert (fsdp2.distributed_type, fsdp2.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    options = launch_command_parser()._option_string_actions
    assert all(f"--{name}" in options for name in fsdp2.fsdp_config)


def test_accelerate_launch_runs_the_recipe_and_reports(inputs, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", str(RECIPE)]
    arguments = command_line(settings(inputs, tmp_path / "run", **BARE, report_to="[tensorboard]"))
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 0.001" in done.stdout and "patched  model.layers.1.self_attn" in done.stdout
    assert "2/2" in done.stderr and "tokens/s" in done.stderr
    assert any(path.stat().st_size for path in (tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "export" / "config.json").is_file()
