"""The demo for language: the whole of it on a tiny model, in this process, and the table that it leads to."""

import contextlib
import importlib
import io
import json
import re

import pytest
import yaml

from qat_patch import cli
from scripts import demo
from support.models.tiny_recipe import words, write_inputs
from support.runs.runs import reset_accelerate


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_table_has_plain_options_trained_and_control(tmp_path, monkeypatch, capsys):
    def launch(recipe, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            importlib.import_module(recipe.removesuffix(".py")).main(arguments)
        reset_accelerate()
        return out.getvalue()

    def prepare_text(folder):
        (folder / "train").mkdir()
        (folder / "train" / "play.txt").write_text(words(500, seed=1), encoding="utf-8")

    settings = yaml.safe_load(demo.CONFIG.read_text(encoding="utf-8"))
    settings["data"] = {"train": {"path": str(tmp_path / "train")}, "eval": {"path": str(tmp_path / "eval.txt"), "blocks": 2}}
    settings["data"]["sequence_length"] = 64
    settings |= {"model": {"path": str(tmp_path / "model")}, "calibration_batches": 1, "learning_rate": 1e-2}
    settings |= {"steps": 2, "eval_every": 2, "checkpoint_every": 2}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    changes = {"DATA": tmp_path, "OUTPUT": tmp_path / "out", "ROOT": tmp_path, "CONFIG": tmp_path / "demo.yaml", "NEW_TOKENS": 4}
    changes |= {"launch": launch, "prepare_text": prepare_text, "packaged_gguf": lambda: None}
    changes |= {"prepare_model": lambda folder, file: write_inputs(tmp_path)}
    commands = []
    changes["qat_patch"] = lambda *arguments: commands.append(arguments) or cli.main(arguments)
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)

    demo.main()
    assert [(command[0], command[2]) for command in commands] == [("evaluate", "--attention=nvfp4"), ("generate", "--prompt")]
    rows = re.findall(r"^\| ([^|]*[^| ]) \| ([\d.]+) \| ([\d.]+) \| ([-+][\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    plain, options, trained, control = [[float(number) for number in row[1:]] for row in rows]
    assert [row[0].split(",")[0] for row in rows[:2]] == ["not trained", "not trained"] and rows[3][0].endswith("(control)")
    assert plain[0] == options[0] and plain[1] != options[1], "the same text, in plain NVFP4 and with the options"
    assert trained[0] < options[0] and control[0] < options[0] and trained != control
    for own, four_bits, gap in (plain, options, trained, control):
        assert gap == pytest.approx(four_bits - own, abs=2e-4)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["plain"]["eval_loss_fp4"] == pytest.approx(plain[1], abs=1e-4)
    assert results["reloaded_eval_loss_fp4"] == results["qat"][-1]["eval_loss_fp4"] == pytest.approx(trained[1], abs=1e-4)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
