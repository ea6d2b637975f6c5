"""The short scripts and the notebook of recipes/examples, unchanged, on tiny models: their output and their files."""

import ast
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from qat_patch import QuantSpec, get_handle, load_checkpoint
from support.families.families import lively
from support.models import tiny_trl
from support.models.tiny_recipe import words
from support.models.tiny_wan import tiny_pipeline
from support.runs.fake_hub import FakeHub

EXAMPLES = Path(__file__).parents[2] / "recipes" / "examples"
OPTIONS = QuantSpec(rotate=True, four_over_six=True)


@pytest.fixture
def model(tmp_path):
    """A folder with a language model, and texts beside it."""
    tiny_trl.write_model(tmp_path / "model")
    for seed, name in enumerate(("train", "held_out")):
        (tmp_path / f"{name}.txt").write_text(words(200, seed=seed), encoding="utf-8")
    return tmp_path / "model"


def test_finetune(model, tmp_path, capsys):
    from examples import finetune

    files = [f"--model={model}", f"--train={tmp_path / 'train.txt'}", f"--held-out={tmp_path / 'held_out.txt'}"]
    finetune.main([*files, f"--output={tmp_path / 'out'}", "--length=64", "--steps=11", "--learning-rate=1e-2"])
    out = capsys.readouterr().out
    assert "4-bit attention in 2 of 2 attention modules" in out and "step 10: loss" in out
    losses = [float(x) for x in re.findall(r"([\d.]+) in (?:original|4-bit) attention", out)]
    assert len(losses) == 4 and losses[2] < losses[0] - 0.5 and losses[3] < losses[1] - 0.5
    handle = get_handle(load_checkpoint(tmp_path / "out"))
    assert {*handle.specs.values()} == {OPTIONS} and len(handle.k_shift) == 2
    with pytest.raises(ValueError, match="expected at least 9999 tokens"):
        finetune.main([*files, f"--output={tmp_path / 'other'}", "--length=9999"])


def test_patch_pipeline(tmp_path, capsys):
    from examples import patch_pipeline

    pipe = tiny_pipeline()
    lively(pipe.transformer)
    pipe.save_pretrained(tmp_path / "pipeline")
    sizes = ["--height=16", "--width=16", "--frames=5", "--steps=2"]
    patch_pipeline.main([f"--model={tmp_path / 'pipeline'}", "--prompt=a red square", f"--output={tmp_path / 'out'}", *sizes])
    out = capsys.readouterr().out
    assert "4-bit attention in 4 of 4 attention modules" in out
    psnr = float(re.search(r"PSNR of 4-bit to original attention: ([\d.]+) dB", out)[1])
    assert 10 < psnr < 110  # close, and not equal
    frames = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(frames) == 10 and Image.open(tmp_path / "out" / "four_bit-004.png").size == (16, 16)


def test_evaluate_and_serve(model, tmp_path, capsys):
    from examples import evaluate_and_serve

    text = f"--text={tmp_path / 'held_out.txt'}"
    evaluate_and_serve.main([f"--model={model}", text, f"--output={tmp_path / 'out'}", "--tokens=128", "--new-tokens=4"])
    out = capsys.readouterr().out
    original, served = (float(x) for x in re.search(r"loss ([\d.]+) in original attention, ([\d.]+) as served", out).groups())
    assert 0 < abs(served - original) < 0.5
    assert "vllm serve . \\\n    --kv-cache-dtype nvfp4" in out
    assert {*get_handle(load_checkpoint(tmp_path / "out")).specs.values()} == {QuantSpec(preset="kv_nvfp4")}


def test_share(model, tmp_path, capsys, monkeypatch):
    from examples import share

    hub = type("Hub", (FakeHub,), {"root": tmp_path / "hub", "token": "good"})
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(hub.root / name))
    share.main([f"--model={model}", "--repo=me/model", f"--output={tmp_path / 'out'}"])
    out = capsys.readouterr().out
    assert "bit-equal" in out and "hub/me/model/commit/1" in out and "4-bit attention in 2 of 2 attention modules" in out
    assert (hub.root / "me/model" / "qat_patch.json").exists()


def test_notebook(model, tmp_path, capsys):
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear the outputs"
    names = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if number == 0:
            assert [node.targets[0].id for node in ast.parse(source).body] == ["MODEL", "OUTPUT"]
            names |= {"MODEL": str(model), "OUTPUT": str(tmp_path / "out")}
        else:
            exec(compile(source, f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    costs = re.findall(r"original attention ([\d.]+), 4-bit attention ([\d.]+)", out)
    patched, calibrated, trained = ([float(loss) for loss in each] for each in costs)
    assert patched[0] == calibrated[0] and patched[1] != calibrated[1] and trained[1] < calibrated[1]
    before, reloaded = re.search(r"before ([\d.]+), reloaded ([\d.]+)", out).groups()
    assert before == reloaded
    assert {*names["handle"].specs.values()} == {OPTIONS}
