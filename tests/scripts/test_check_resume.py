"""scripts/check_resume.py: real processes, killed for real; and it sees a difference of one bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import check_resume
from support.models.tiny_clips import write_clips
from support.models.tiny_recipe import write_inputs
from support.models.tiny_wan import tiny_pipeline

RUN = ["steps=60", "batch_size=2", "learning_rate=1e-3", "checkpoint_every=8", "keep_checkpoints=2"]


def test_language_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_inputs(tmp_path)
    settings = [f"model.path={tmp_path}/model", f"data.train.path={tmp_path}/train.txt", "data.sequence_length=64"]
    settings += [f"data.eval.path={tmp_path}/eval.txt", "eval_every=30"]
    options = ["--recipe=finetune_qwen3.py", f"--output={tmp_path}/out", "--kills=2", "--seed=1"]
    result = check_resume.main([*options, *RUN, *settings])
    assert result["different"] == [] and len(result["kills"]) == 2 and result["steps"] == 62 - 1
    assert any(kill["interrupted_write"] for kill in result["kills"])

    whole, killed = tmp_path / "out" / "whole", tmp_path / "out" / "killed"
    file = killed / "checkpoint-60" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, file)
    assert list(check_resume.differences(whole, killed)) == ["checkpoint-60/model.safetensors: model.norm.weight"]
    state = torch.load(killed / "checkpoint-60" / "optimizer.bin")
    state["state"][3]["exp_avg"].view(torch.int32).flatten()[0] ^= 1
    torch.save(state, killed / "checkpoint-60" / "optimizer.bin")
    assert "checkpoint-60/optimizer.bin: state: 3: exp_avg" in list(check_resume.differences(whole, killed))
    shutil.rmtree(killed / "export")
    shutil.copytree(whole / "export", killed / "export")
    (killed / "export" / "model.safetensors").unlink()
    assert "export/model.safetensors: there is only one" in list(check_resume.differences(whole, killed))


@pytest.mark.slow
def test_video_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "model")
    write_clips(tmp_path / "clips", 7)
    settings = [f"model.path={tmp_path}/model", f"data.train={tmp_path}/clips"]
    options = ["--recipe=finetune_wan.py", f"--output={tmp_path}/out", "--kills=1"]
    assert check_resume.main([*options, *RUN, *settings])["different"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kills=0"], "--kills: expected at least 1"),
        (["--recipe=nothing.py"], "the recipe failed with 2:"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        check_resume.main(["--recipe=finetune_qwen3.py", f"--output={tmp_path}/out", *options])
    (tmp_path / "out").mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match="exists; choose another"):
        check_resume.main(["--recipe=finetune_qwen3.py", f"--output={tmp_path}/out"])
