"""scripts.bench.full_size: the plan is as wanted, the command runs on two processes, and small machines are refused."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import yaml

from qat_recipes.command_line import read_settings
from qat_recipes.tasks.language_modeling import Settings as TextSettings
from qat_recipes.tasks.video_diffusion import Settings as VideoSettings
from scripts.bench import full_size, full_size_report, sizing_report
from scripts.bench.full_size import Run, plan, settings
from scripts.bench.full_size_inputs import SIZES, TINY_SIZES, write_data, write_model
from support.runs.runs import RECIPES, SHARDED

GIB = 2**30
# A run that waits to be killed when its checkpoint has got its name.
WAITING = """
import time
from qat_patch.checkpoint import integrity
sync = integrity.sync
integrity.sync = lambda path, **kw: time.sleep(600) if kw else sync(path)
"""


@pytest.fixture(autouse=True)
def room_on_the_disk(monkeypatch):
    """Tiny models need little of what is asked for, and machines that run tests may have less."""
    monkeypatch.setattr(full_size_report.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * GIB))


def test_the_plan_is_what_is_to_be_measured(tmp_path):
    names = {run.name for model in SIZES for run in plan(model)}
    timed = {"fsdp2": ("wan", "qwen3"), "ulysses": ("wan",)}
    for how, models in timed.items():
        for model in models:
            for rest in ("task-fp4", "task-original", "distillation-fp4"):
                names.remove(f"{model}-{how}-{rest}-timed")
            names.remove(f"{model}-{how}-task-fp4-cut")
    names -= {f"{model}-one-task-fp4-cut" for model in SIZES}
    assert names == {f"{model}-fsdp2-task-fp4-{stage}" for model in SIZES for stage in ("killed", "resumed")}

    assert (SIZES["wan"].tokens, SIZES["wan"].latents) == (21 * 45 * 80, (16, 21, 90, 160)) and SIZES["qwen3"].tokens == 8192
    weights = {name: full_size_report.needs(size, 8).weights for name, size in SIZES.items()}
    assert weights == {"wan": 14_288_491_584, "qwen3": 14_768_307_200}
    for model, size in SIZES.items():
        shipped = yaml.safe_load((RECIPES / "configs" / full_size.CONFIGS[model]).read_text())
        for run in plan(model):
            values = settings(run, size, 8, tmp_path)
            assert values["steps"] == 10 and values["batch_size"] == 1 and values["model"]["gradient_checkpointing"]
            assert values["mixed_precision"] == "bf16" and values["qat"] == shipped["qat"] and "lora" not in values
            assert values["distillation"] == (run.objective == "distillation") and values["attention"] == run.attention
            assert values.get("parallel") == ({"ulysses": 8} if run.how == "ulysses" else None)
            # As many samples a step, on one GPU and on all.
            processes = 1 if run.how == "one" else 8
            samples = processes * values["accumulation_steps"] // (8 if run.how == "ulysses" else 1)
            assert samples == (1 if run.how == "ulysses" and run.stage == "timed" else 8)
            command = full_size.command(run, 8, tmp_path)
            assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
            assert ("--num_processes=8" in command) == (run.how != "one")
            assert (str(RECIPES / "accelerate_configs" / "fsdp2.yaml") in command) == (run.how != "one")
            assert command[-3] == str(RECIPES / full_size.PROGRAMS[model])
    resumed = settings(Run(model="wan", how="fsdp2", stage="resumed"), SIZES["wan"], 8, tmp_path)
    killed = settings(Run(model="wan", how="fsdp2", stage="killed"), SIZES["wan"], 8, tmp_path)
    assert resumed["resume"] == "latest" and killed["checkpoint_every"] == 5 and resumed["output_dir"] == killed["output_dir"]


@pytest.mark.parametrize("model", SIZES)
def test_the_recipes_take_the_settings(tmp_path, model):
    size = TINY_SIZES[model]
    assert write_model(size, tmp_path / model / "model") == full_size_report.needs(size, 2).weights
    write_model(size, tmp_path / model / "cut", 1)
    for name in ("train", "eval"):
        write_data(size, tmp_path / model / name, 2, seed=0)
    kind = {"wan": VideoSettings, "qwen3": TextSettings}[model]
    for run in plan(model):
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings(run, size, 2, tmp_path)))
        read = read_settings(kind, ["--config", str(file)])
        assert read.model.path.endswith("cut" if run.stage == "cut" else "model")


def on_two_processes_of_a_cpu(monkeypatch, tmp_path):
    """The same command, with torchrun instead of accelerate launch, which shards over GPUs only."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    (tmp_path / "waiting.py").write_text(WAITING + SHARDED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--log-dir={tmp_path}"]

    def command(run, gpus, work):
        assert gpus == 2
        program = full_size.PROGRAMS[run.model]
        script = tmp_path / ("waiting.py" if run.stage == "killed" else "sharded.py")
        start = [sys.executable, str(RECIPES / program)] if run.how == "one" else [*torchrun, str(script), program[:-3]]
        return [*start, "--config", str(work / run.model / f"{run.name}.yaml")]

    monkeypatch.setattr(full_size, "command", command)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return ["measure", str(tmp_path / "results.json"), "--tiny", "--gpus=2", f"--work={tmp_path}/work"]


def test_workers_in_sessions_of_their_own_are_killed_too():
    sleep = "import time; time.sleep(600)"
    program = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{sleep}'], start_new_session=True).pid); "
    command = [sys.executable, "-u", "-c", program + sleep]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        worker = psutil.Process(int(process.stdout.readline()))
        full_size.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_run_is_killed_resumed_and_exported(monkeypatch, tmp_path):
    arguments = on_two_processes_of_a_cpu(monkeypatch, tmp_path)
    life = [Run(model="wan", how="ulysses", stage=stage) for stage in ("killed", "resumed")]
    monkeypatch.setattr(full_size, "plan", lambda model: life)
    # In this process, to save time: the whole of it is in the slow test.
    spent = {"seconds": 1.0, "host_bytes": 0}
    monkeypatch.setattr(full_size, "_check_export", lambda folder: {"load": full_size.load(folder) | spent})
    full_size.main([*arguments, "--models", "wan"])
    results = json.loads((tmp_path / "results.json").read_text())
    killed, resumed = (results["runs"][run.name] for run in life)
    assert len(killed["losses"]) == 5 and len(resumed["losses"]) == 10
    assert killed["losses"] == resumed["losses"][:5]
    assert resumed["tokens_a_step"] == 48
    assert {"start", "export"} <= resumed["stages"].keys() and resumed["stages"]["export"]["host_bytes"] > 2**28
    assert results["exports"]["wan"]["load"]["distances"] == {"output": 0, "original_output": 0}
    assert not (tmp_path / "work" / "wan").exists()
    # Nothing is left to do, and other sizes need another file.
    monkeypatch.setattr(full_size, "_measured", None)
    full_size.main([*arguments, "--models", "wan"])
    with pytest.raises(ValueError, match="choose another file"):
        full_size.main([*arguments, "--models", "wan", "--layers=1"])


@pytest.mark.slow
def test_all_of_it(monkeypatch, tmp_path, capsys):
    full_size.main(on_two_processes_of_a_cpu(monkeypatch, tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(export.keys() == {"bytes", "verify", "load"} for export in results["exports"].values())
    assert results["runs"].keys() == {run.name for model in SIZES for run in plan(model)}
    for model in SIZES:
        one = results["runs"][f"{model}-one-task-fp4-cut"]
        for how in ("fsdp2", "ulysses")[: 1 + (model == "wan")]:
            assert full_size_report.difference(one, results["runs"][f"{model}-{how}-task-fp4-cut"]) < 2e-2
        whole, resumed = (results["runs"][f"{model}-fsdp2-task-fp4-{stage}"] for stage in ("timed", "resumed"))
        assert full_size_report.resumed_difference(whole, resumed) == 0
    # A CPU has no MFU.
    table = capsys.readouterr().out.partition("| | | attention")[2].partition("two layers")[0]
    assert table.count(full_size_report.NOT) == 9


def test_too_small_a_machine_is_refused(tmp_path):
    there = {"gpu_bytes": 141 * GIB, "host_bytes": 560 * GIB, "disk_bytes": 235 * GIB}
    wan, place = SIZES["wan"], tmp_path / "new"
    full_size_report.check_machine(wan, 8, None, place, **there)
    message = r"14B of 40 layers on 2 GPUs: expected memory of each GPU: 191 GiB, got 127 .*layers would fit"
    with pytest.raises(ValueError, match=message) as error:
        full_size_report.check_machine(wan, 2, None, place, **there)
    fitting = int(str(error.value).partition("--layers ")[2].partition(")")[0])
    assert 0 < fitting < 40
    full_size_report.check_machine(wan, 2, fitting, place, **there)
    with pytest.raises(ValueError, match=f"of {fitting + 1} layers"):
        full_size_report.check_machine(wan, 2, fitting + 1, place, **there)
    for name, message in (("host_bytes", "host memory: 192 GiB, got 90"), ("disk_bytes", "disk under .*: 192 GiB, got 100")):
        with pytest.raises(ValueError, match=message):
            full_size_report.check_machine(wan, 8, None, place, **there | {name: 100 * GIB})
    with pytest.raises(ValueError, match="host memory: 8 GiB, got 4 .* more memory than it says, give --host-gib"):
        full_size.main(["measure", str(tmp_path / "results.json"), "--tiny", "--gpus=2", f"--work={place}", "--host-gib=5"])
    assert not place.exists()


def test_the_tables(tmp_path, monkeypatch, capsys):
    nothing = full_size_report.section(None)
    assert "Not measured yet" in nothing and nothing.count(full_size_report.NOT) > 60
    run = {"seconds_a_step": 30.0, "mfu": 0.4, "peak_gib": 90.0, "losses": [2.0, 1.5], "stages": {}}
    part = {"seconds": 100.0, "host_bytes": 200 * GIB}
    held_out = [{"eval_loss_fp4": 2.0, "eval_loss_original": 2.0}, {"eval_loss_fp4": 1.0, "eval_loss_original": 1.0}]
    runs = {each.name: run | {"held_out": held_out} for model in SIZES for each in plan(model)}
    runs["wan-fsdp2-task-original-timed"] = run | {"seconds_a_step": 20.0}
    runs["wan-ulysses-task-fp4-cut"] = run | {"held_out": [held_out[0], held_out[1] | {"eval_loss_fp4": 1.01}]}
    runs["qwen3-fsdp2-task-fp4-resumed"] = run | {"losses": [2.0, 1.53], "stages": {"start": part, "export": part}}
    about = {"device": "NVIDIA H200", "gpus": 4, "layers": None, "models": {}}
    exports = {model: {"verify": part, "load": part} for model in SIZES}
    text = full_size_report.section({"about": about, "runs": runs, "exports": exports})
    assert "Measured on: device NVIDIA H200, gpus 4." in text and "For 4 GPUs" in text
    assert "| Wan 2.1 14B, FSDP2 | task loss | 4-bit | 30.00 | 40.0 % | 90.0 | 1.500 |" in text
    assert "| Wan 2.1 14B, two layers | 0.0e+00 | 1.0e-02 | 1.000 |" in text
    assert "| export | not measured | not measured | 100 | 200.0 |" in text
    assert "| losses against a run that was not killed, relative | 0.0e+00 |  | 2.0e-02 |  |" in text
    # docs/SIZING.md ends with what `report` prints.
    monkeypatch.setattr(full_size_report, "RESULTS", tmp_path / "full_size.json")
    (tmp_path / "full_size.json").write_text(json.dumps({"about": about, "runs": runs, "exports": exports}))
    full_size.main(["report", str(tmp_path / "full_size.json")])
    printed = capsys.readouterr().out.strip().split("\n\n")[1:]
    written = sizing_report.report(sizing_report.measured())
    assert len(printed) == 3 and all(table in written for table in printed)
