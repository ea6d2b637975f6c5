"""Settings of the recipes: files, arguments, and what they refuse."""

import dataclasses
import json
import subprocess
import sys
from typing import Literal

import pytest

from evaluate_qwen3 import Settings as EvaluateSettings
from qat_patch import AttnQATConfig, QuantSpec
from qat_patch.config_reader import from_dict
from qat_recipes.command_line import flatten, read_settings, run, to_dict, to_yaml
from qat_recipes.tasks.language_modeling import Settings
from qat_recipes.tasks.video_diffusion import Settings as WanSettings
from support.runs.runs import RECIPES

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested."""

    length: int
    """How long."""
    name: str | None = None
    """What it is called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """Made for the test."""

    rate: float = 0.5
    """How fast."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    pair: tuple[float, float] = (0.0, 1.0)
    """Two."""
    names: tuple[str, ...] = ()
    """Any number."""
    flag: bool = False
    """On or off."""
    inner: Inner | None = None
    """Maybe something nested."""


def test_arguments_win_over_the_file_and_have_the_declared_types(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("rate: 5e-6\nkind: b\ninner:\n  length: 3\n  name: first\nnames: [x, y]\n")
    assert read_settings(Outer, [f"--config={file}"]) == Outer(
        rate=5e-6, kind="b", inner=Inner(length=3, name="first"), names=("x", "y")
    )
    arguments = ["inner.length=4", "--config", str(file), "inner.name=12", "pair=[1, 2e-3]", "names=[]", "flag=true", "rate=1"]
    read = read_settings(Outer, arguments)
    assert read == Outer(rate=1.0, kind="b", inner=Inner(length=4, name="12"), pair=(1.0, 0.002), flag=True)
    assert isinstance(read.rate, float)
    assert read_settings(Outer, ["inner.length=4", "inner.name=null"]).inner == Inner(length=4)
    assert read_settings(Outer, [f"--config={file}", "inner=null"]).inner is None
    assert read_settings(Outer, ["inner={length: 7}"]).inner == Inner(length=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"settings: got none; pass --config FILE.yaml"),
        (["rat=1"], r"settings: unknown key 'rat'; .*did you mean 'rate'"),
        (["inner.lenght=1"], r"settings\.inner: unknown key 'lenght'; .*did you mean 'length'"),
        (["inner.name=x"], r"settings\.inner: 'length' is missing"),
        (["rate=fast"], r"settings\.rate: expected float, got 'fast'"),
        (["rate=true"], r"settings\.rate: expected float, got True"),
        (["rate=[1"], r"settings\.rate: '\[1' is no YAML value"),
        (["inner.length=1.5"], r"settings\.inner\.length: expected int, got 1\.5"),
        (["inner.length=yes"], r"settings\.inner\.length: expected int, got True"),
        (["inner=3"], r"settings\.inner: expected a mapping with the keys length, name"),
        (["flag=1"], r"settings\.flag: expected bool, got 1"),
        (["kind=c"], r"settings\.kind: expected a or b, got 'c'"),
        (["pair=[1]"], r"settings\.pair: expected a list of float, float, got \[1\]"),
        (["pair=[1, x]"], r"settings\.pair\[1\]: expected float, got 'x'"),
        (["names=x"], r"settings\.names: expected a list of str, \.\.\., got 'x'"),
        (["names=[1]"], r"settings\.names\[0\]: expected str, got 1"),
        (["rate"], r"expected key=value, .*got 'rate'"),
        (["inner..length=1"], r"expected key=value, .*got 'inner\.\.length=1'"),
        (["rate=1", "rate.x=2"], r"'rate' is set to '1' and has no settings inside"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_settings(Outer, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 1\nrate: 2\n", "line 2: the key 'rate' occurs twice"),
        ("- 1\n", r"expected a mapping of settings, got \[1\]"),
        ("", "expected a mapping of settings, got None"),
        ("rate: [\n", "cannot be read"),
        ("speed: 1\n", "unknown key 'speed'"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(Outer, [f"--config={file}"])
    with pytest.raises(ValueError, match="there is no file"):
        read_settings(Outer, [f"--config={tmp_path}/none.yaml"])


def test_settings_survive_the_way_through_yaml(tmp_path):
    settings = Outer(rate=3e-7, names=("no", "1"), inner=Inner(length=2, name="null"))
    file = tmp_path / "settings.yaml"
    file.write_text(to_yaml(settings))
    assert read_settings(Outer, [f"--config={file}"]) == settings
    assert from_dict(Outer, to_dict(settings), "settings") == settings
    assert flatten(to_dict(settings))["inner.length"] == 2


@pytest.mark.parametrize("settings", [Outer, Settings, EvaluateSettings])
def test_help_documents_every_setting(settings, capsys):
    with pytest.raises(SystemExit):
        read_settings(settings, ["--help"])
    printed = capsys.readouterr().out
    if settings is Outer:
        assert "  inner.length (int; required with inner)\n      How long.\n" in printed
        assert "  pair (float, float; default (0.0, 1.0))\n      Two.\n" in printed
    else:
        assert printed.count(")\n      ") >= 5
    if settings is Settings:
        assert "Must be at least 1 with held-out data" in " ".join(printed.split())


def test_what_a_recipe_refuses_is_one_line_and_what_breaks_is_a_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: read_settings(Settings, ["steps=0"]))
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out == "" and said.err.startswith("error: settings: ") and said.err.count("\n") == 1
    for breaks in (lambda: json.loads("{"), lambda: [][0]):
        with pytest.raises((ValueError, IndexError)):
            run(breaks)
    assert run(lambda: {"loss": 1.0}) is None


@pytest.mark.parametrize("program", ["finetune_qwen3", "finetune_wan", "evaluate_qwen3"])
def test_every_recipe_is_run_this_way(program):
    assert (RECIPES / f"{program}.py").read_text().endswith('if __name__ == "__main__":\n    run(main)\n')


def test_under_accelerate_launch_nothing_else_is_said():
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", str(RECIPES / "finetune_qwen3.py"), "steps=0"]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: settings: 'output_dir' is missing")
    assert "Traceback" not in done.stderr + done.stdout


def arguments(**changes):
    settings = {
        "output_dir": "out",
        "steps": 10,
        "batch_size": 1,
        "learning_rate": "1e-5",
        "model.path": "org/model",
        "data.train.path": "org/data",
        "data.sequence_length": 64,
    }
    return [f"{name}={value}" for name, value in (settings | changes).items()]


def test_the_qat_block_is_an_attn_qat_config():
    read = read_settings(Settings, [*arguments(), "qat.spec.preset=nvfp4_qk", "qat.exclude=['*.0.*']"])
    assert read.qat == AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk"), exclude=("*.0.*",))
    overrides = "qat.overrides={'*.attn2': {rotate: true}}"
    read = read_settings(Settings, [*arguments(), overrides, "qat.exclude_first_blocks=2"])
    assert read.qat == AttnQATConfig(overrides={"*.attn2": QuantSpec(rotate=True)}, exclude_first_blocks=2)
    assert from_dict(Settings, to_dict(read), "settings") == read
    with pytest.raises(ValueError, match=r"settings\.qat\.overrides: expected a mapping to QuantSpec, got 3"):
        read_settings(Settings, [*arguments(), "qat.overrides=3"])
    with pytest.raises(ValueError, match=r"settings\.qat\.spec\.preset: expected nvfp4 or nvfp4_qk or .*, got 'fp8'"):
        read_settings(Settings, [*arguments(), "qat.spec.preset=fp8"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"accumulation_steps": 0}, "accumulation_steps: expected at least 1"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number"),
        ({"betas": "[0.9, 1]"}, r"betas: expected two numbers in \[0, 1\)"),
        ({"weight_decay": -1}, "weight_decay: expected 0 or more"),
        ({"max_grad_norm": 0}, "max_grad_norm: expected a positive number or null"),
        ({"warmup_steps": 10}, r"warmup_steps: expected 0 or more, and less than steps \(10\)"),
        ({"checkpoint_every": 11}, r"checkpoint_every: expected at most steps \(10\)"),
        ({"keep_checkpoints": 2}, "keep_checkpoints: expected null without checkpoint_every"),
        ({"keep_checkpoints": 0, "checkpoint_every": 5}, "keep_checkpoints: expected at least 1"),
        ({"mixed_precision": "fp16"}, "mixed_precision: expected bf16, got 'fp16'"),
        ({"eval_every": 5}, "eval_every: expected 0, since there is no held-out data, got 5"),
        ({"data.eval_fraction": 0.1}, "eval_every: expected at least 1, since there is held-out data"),
        ({"data.eval_fraction": 1, "eval_every": 5}, "eval_fraction: expected a number between 0 and 1"),
        ({"data.eval_fraction": 0.1, "data.eval.path": "org/other"}, "eval and eval_fraction are both set"),
        ({"data.eval.path": "org/data", "data.eval.documents": 5}, "org/data is the training text too"),
        ({"data.sequence_length": 1}, "sequence_length: expected at least 2"),
        ({"data.train.documents": 0}, "documents: expected at least 1"),
        ({"data.train.path": "none.txt"}, "there is no file or folder none.txt"),
        ({"data.train.path": "./data"}, "there is no file or folder ./data"),
        ({"data.train.path": __file__}, "expected a .txt or .jsonl file, a folder or a Hub dataset"),
        ({"model.path": "./none"}, "model.path: there is no folder ./none"),
        ({"model.path": ".", "model.revision": "main"}, "revision: only models on the Hub have one"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(Settings, arguments(**changes))


def test_local_text_has_no_hub_settings(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for key in ("config", "split", "text_column"):
        with pytest.raises(ValueError, match=f"settings.data.train.{key}: .*set it to null"):
            read_settings(Settings, arguments(**{"data.train.path": tmp_path / "a.txt", f"data.train.{key}": "x"}))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_complete(config, monkeypatch, tmp_path):
    # Their local text comes from scripts/demo.py.
    (tmp_path / "build/demo/train").mkdir(parents=True)
    (tmp_path / "build/demo/eval.txt").touch()
    monkeypatch.chdir(tmp_path)
    kind = WanSettings if config.stem.startswith("wan") else Settings
    assert read_settings(kind, [f"--config={config}"]).attention == "fp4"


def test_the_papers_settings():
    (config,) = (path for path in CONFIGS if path.stem == "qwen3_14b")
    read = read_settings(Settings, [f"--config={config}"])
    assert (read.learning_rate, read.betas, read.weight_decay, read.max_grad_norm) == (5e-6, (0.9, 0.999), 0.01, 1.0)
    assert (read.steps, read.data.sequence_length, read.mixed_precision) == (4000, 8192, "bf16")
    assert (read.model.path, read.model.gradient_checkpointing) == ("Qwen/Qwen3-14B", True)
    assert (read.data.train.path, read.data.train.config) == ("allenai/c4", "en")


@pytest.mark.parametrize(("size", "steps", "clips"), [("1_3b", 4000, 16), ("14b", 400, 32)])
def test_the_papers_settings_for_video(size, steps, clips):
    (config,) = (path for path in CONFIGS if path.stem == f"wan2_1_{size}")
    read = read_settings(WanSettings, [f"--config={config}"])
    assert (read.learning_rate, read.betas, read.weight_decay, read.max_grad_norm) == (1e-6, (0.9, 0.999), 0.01, 1.0)
    assert (read.steps, 8 * read.batch_size * read.accumulation_steps) == (steps, clips)
    assert (read.mixed_precision, read.model.gradient_checkpointing, read.timesteps.flow_shift) == ("bf16", True, None)


def test_what_has_no_shifts_is_not_calibrated():
    with pytest.raises(ValueError, match="calibration_batches: expected 0 with preset kv_nvfp4, which has no shifts, got 2"):
        read_settings(Settings, [*arguments(), "qat.spec.preset=kv_nvfp4", "calibration_batches=2"])
