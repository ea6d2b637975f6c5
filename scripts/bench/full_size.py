"""Train whole 14B models with the recipes, on all GPUs of this machine: Wan 2.1 at 720p, and Qwen3.

python -m scripts.bench.full_size measure docs/benchmarks/full_size.json
python -m scripts.bench.full_size plan --gpus 8
python -m scripts.bench.full_size report docs/benchmarks/full_size.json

`measure` writes models with random weights of the published sizes and synthetic samples of the real lengths to --work, and starts
the recipes on them by `accelerate launch` with the shipped configs, ten steps each: seconds a step, MFU and memory, 4-bit
attention against the model's own, the task's loss and distillation, FSDP2 and for Wan FSDP2 + Ulysses. The losses of a model cut
to two layers are compared with those on one GPU. A run is killed after a checkpoint, resumed and exported; the export is
verified, and loaded on one GPU. It writes to FILE after each run and goes on where it stopped. What does not fit this machine is
refused before anything is written; --layers cuts the models. `plan` prints the commands and what they need. `report` prints
the tables of a file; `make evidence` writes them into docs/SIZING.md. `--tiny` runs small models, to see that all of it works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from qat_patch import load_checkpoint
from qat_patch.checkpoint.golden_output import check_reference
from qat_patch.checkpoint.trust.file_names import REFERENCE
from scripts.arguments import new_parser
from scripts.bench.full_size_inputs import SIZES, TINY_SIZES, Size, write_data, write_model
from scripts.bench.full_size_report import GIB, check_machine, needs, table_of_needs, tables
from scripts.bench.sizing import machine
from scripts.demo_tools import read_metrics
from scripts.paths import OUTPUTS, RECIPES, ROOT

STEPS, CHECKPOINT, CUT = 10, 5, 2
"""The steps of a run, the checkpoint after which a run is killed, and the layers of the model that one GPU trains too."""
WARM_UP = 2
"""Untimed steps: the first one makes the optimizer's states and counts operations."""
SAMPLES = 16
HELD_OUT = {"wan": 1, "qwen3": 8}
"""The number of samples; a clip is measured at eight timesteps."""
_POLL = 0.05
CONFIGS = {"wan": "wan2_1_14b.yaml", "qwen3": "qwen3_14b.yaml"}
PROGRAMS = {"wan": "finetune_wan.py", "qwen3": "finetune_qwen3.py"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a recipe."""

    model: str
    """In SIZES."""
    how: str
    """one, fsdp2 or ulysses."""
    objective: str = "task"
    """task or distillation."""
    attention: str = "fp4"
    """fp4 or original."""
    stage: str = "timed"
    """timed; cut: few layers, for comparison with one GPU; killed and resumed: the life of a run."""

    @property
    def name(self) -> str:
        return "-".join((self.model, self.how, self.objective, self.attention, self.stage))


def plan(model: str) -> list[Run]:
    """All runs of a model, in order."""
    runs = []
    for how in ("fsdp2", "ulysses") if model == "wan" else ("fsdp2",):
        runs.append(Run(model=model, how=how))
        runs.append(Run(model=model, how=how, attention="original"))
        runs.append(Run(model=model, how=how, objective="distillation"))
    for how in ("one", "fsdp2", "ulysses") if model == "wan" else ("one", "fsdp2"):
        runs.append(Run(model=model, how=how, stage="cut"))
    return [*runs, Run(model=model, how="fsdp2", stage="killed"), Run(model=model, how="fsdp2", stage="resumed")]


def settings(run: Run, size: Size, gpus: int, work: Path) -> dict[str, Any]:
    """The settings of a run: the recipe's shipped config with the changes for this benchmark."""
    is_cut = run.stage == "cut"
    values = yaml.safe_load((RECIPES / "configs" / CONFIGS[run.model]).read_text(encoding="utf-8"))
    values["model"]["path"] = str(work / run.model / ("cut" if is_cut else "model"))
    train, held_out = (str(work / run.model / name / ("" if run.model == "wan" else "text.jsonl")) for name in ("train", "eval"))
    if run.model == "wan":
        values["data"] = {"train": train} | ({"eval": held_out} if is_cut else {})
        values["eval_timesteps"] = 8
        values["timesteps"]["flow_shift"] = 5.0  # of the pipeline for 720p; here there is a transformer alone
    else:
        values["data"] = {"train": {"path": train}, "sequence_length": size.tokens} | (
            {"eval": {"path": held_out}} if is_cut else {}
        )
    for name in ("samples", "keep_checkpoints", "report_to"):
        values.pop(name, None)
    # Runs with Ulysses have no mean keys, so the others have none either.
    values |= {"calibration_batches": 0, "warmup_steps": 0, "layers_every": 0, "eval_every": STEPS if is_cut else 0}
    values |= {"steps": STEPS, "accumulation_steps": 1, "fused_optimizer": True, "attention": run.attention}
    values |= {"distillation": 1.0 if run.objective == "distillation" else 0.0}
    values |= {"checkpoint_every": CHECKPOINT if run.stage == "killed" else 0}
    if is_cut:
        values["learning_rate"] = 1e-4  # so that ten steps show
        if run.how == "one":
            values["accumulation_steps"] = gpus
    if run.how == "ulysses":
        values["parallel"] = {"ulysses": gpus}
        if is_cut:
            values["accumulation_steps"] = gpus  # as many samples a step as the others
    if run.stage == "resumed":
        values["resume"] = "latest"
    return values | {"output_dir": str(output_dir(run, work))}


def output_dir(run: Run, work: Path) -> Path:
    """The folder of a run. A resumed run uses that of the killed one."""
    return work / run.model / "runs" / run.name.replace("resumed", "killed")


def launcher(run: Run, gpus: int) -> list[str]:
    """The command that starts a recipe in the needed number of processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if run.how == "one":
        return [*launch, "--num_processes=1", "--num_machines=1", "--mixed_precision=bf16", "--dynamo_backend=no"]
    return [*launch, "--config_file", str(RECIPES / "accelerate_configs" / "fsdp2.yaml"), f"--num_processes={gpus}"]


def command(run: Run, gpus: int, work: Path) -> list[str]:
    """The whole command line."""
    return [*launcher(run, gpus), str(RECIPES / PROGRAMS[run.model]), "--config", str(work / run.model / f"{run.name}.yaml")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, measure or report."""
    parser = new_parser("scripts.bench.full_size", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="run everything that FILE does not have yet")
    measuring.add_argument("file", type=Path, metavar="FILE")
    measuring.add_argument("--host-gib", type=float, help="host memory in GiB (default: what the container or the system says)")
    planning = commands.add_parser("plan", help="print the commands and the memory and disk space they need")
    for each in (measuring, planning):
        each.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
        each.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="number of GPUs (default: all)")
        each.add_argument("--layers", type=int, help="cut the models to this number of layers, to fit fewer GPUs")
        each.add_argument("--work", type=Path, default=OUTPUTS / "full_size", help="folder for weights, samples and checkpoints")
        each.add_argument("--tiny", action="store_true", help="small models")
    reporting = commands.add_parser("report", help="print the tables of FILE")
    reporting.add_argument("file", type=Path, metavar="FILE")
    loading = commands.add_parser("load", help="load an export on one GPU and compute its reference output")
    loading.add_argument("folder", type=Path, metavar="EXPORT")
    options = parser.parse_args(arguments)
    if options.command == "load":
        print(json.dumps(load(options.folder)))
        return
    if options.command == "report":
        print(tables(json.loads(options.file.read_text(encoding="utf-8"))))
        return
    if options.gpus < 2:
        parser.error(f"--gpus: expected at least 2, got {options.gpus}")
    sizes = {name: (TINY_SIZES if options.tiny else SIZES)[name] for name in options.models}
    if options.command == "plan":
        for name, size in sizes.items():
            print(table_of_needs(needs(size, options.gpus, options.layers)))
            for run in plan(name):
                print(f"\n# {run.name}\n{' '.join(command(run, options.gpus, options.work))}")
                print(yaml.safe_dump(settings(run, size, options.gpus, options.work)).strip())
        return
    for size in sizes.values():
        host = None if options.host_gib is None else int(options.host_gib * GIB)
        check_machine(size, options.gpus, options.layers, options.work, host_bytes=host)
    measure(options.file, sizes, options.gpus, options.layers, options.work)


def measure(file: Path, sizes: dict[str, Size], gpus: int, layers: int | None, work: Path) -> None:
    """Run everything that a file does not have yet, and add it.

    Raises:
        ValueError: the file comes from another machine, other versions, or other sizes.
    """
    about: dict[str, Any] = machine() | {"gpus": gpus, "layers": layers, "models": {n: size.name for n, size in sizes.items()}}
    results: dict[str, Any] = {"about": about, "weights": {}, "runs": {}, "exports": {}}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["about"] != about:
            raise ValueError(f"{file}: measured on {results['about']}, and this is {about}; choose another file")
    for model, size in sizes.items():
        runs = plan(model)
        if all(run.name in results["runs"] for run in runs) and model in results["exports"]:
            continue
        results["weights"][model] = _prepare(size, layers, work / model)
        for run in runs:
            # The resumed run needs the files of the killed one, and the later steps need its export.
            if run.name in results["runs"] and (run.stage in ("timed", "cut") or model in results["exports"]):
                continue
            results["runs"][run.name] = _measured(run, settings(run, size, gpus, work), command(run, gpus, work))
            _write(file, results)
            if run.stage in ("timed", "cut"):
                shutil.rmtree(output_dir(run, work))
        if model not in results["exports"]:
            results["exports"][model] = _check_export(output_dir(runs[-1], work) / "export")
            _write(file, results)
        # Only one model at a time fits on the disk.
        shutil.rmtree(work / model)
    print(tables(results))


def _write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _prepare(size: Size, layers: int | None, folder: Path) -> int:
    """Write new models and samples. Returns the number of weights."""
    shutil.rmtree(folder, ignore_errors=True)
    weights = write_model(size, folder / "model", layers)
    write_model(size, folder / "cut", min(CUT, layers or size.layers), seed=1)
    write_data(size, folder / "train", SAMPLES, seed=2)
    write_data(size, folder / "eval", HELD_OUT[size.kind], seed=3)
    return weights


def _measured(run: Run, values: dict[str, Any], launched: list[str]) -> dict[str, Any]:
    """Run it. Returns its log's values, and the time and host memory of its stages.

    Raises:
        SystemExit: it failed.
    """
    folder = Path(values["output_dir"])
    if run.stage != "resumed":
        shutil.rmtree(folder, ignore_errors=True)
    Path(launched[-1]).write_text(yaml.safe_dump(values), encoding="utf-8")
    print(f"{run.name}: {' '.join(launched)}", flush=True)
    first = CHECKPOINT if run.stage == "resumed" else 0
    log = folder.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(launched, cwd=ROOT, env=_environment(), stdout=out, stderr=out)
    try:
        stages = _watch(run, process, folder, first)
    finally:
        if process.poll() is None:
            kill(process)
    if process.returncode != (-signal.SIGKILL if run.stage == "killed" else 0):
        raise SystemExit(
            f"{run.name} failed with {process.returncode}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
        )
    found = _of_log(read_metrics(folder)) | {"stages": stages}
    print(f"{run.name}: " + ", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, float)), flush=True)
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started. Each worker of torchrun has a session of its own, so no signal reaches all."""
    family = list(_family(process.pid))
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    while any(map(_is_running, family)):
        time.sleep(_POLL)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment() -> dict[str, str]:
    paths = (str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _watch(run: Run, process: subprocess.Popen[bytes], folder: Path, first: int) -> dict[str, dict[str, float]]:
    """Watch a run until it ends or must be killed. Returns seconds and peak host memory in bytes of each stage."""
    stages: dict[str, dict[str, float]] = {}
    before, checkpoint = time.perf_counter(), folder / f"checkpoint-{CHECKPOINT}"
    started = time.time()
    while process.poll() is None:
        time.sleep(_POLL)
        done = _logged(folder, started) or first
        is_writing = any(_is_newer(each, started) for each in folder.glob("checkpoint-*.incomplete"))
        stage = "checkpoint" if is_writing else "start" if done == first else "export" if done == STEPS else "steps"
        now, memory = time.perf_counter(), host_memory(process.pid)
        of_stage = stages.setdefault(stage, {"seconds": 0.0, "host_bytes": 0})
        of_stage["seconds"] += now - before
        of_stage["host_bytes"] = max(of_stage["host_bytes"], memory)
        before = now
        if run.stage == "killed" and checkpoint.exists():
            break
        if run.stage == "resumed" and done > CHECKPOINT and checkpoint.exists():
            # This makes room for the export.
            shutil.rmtree(checkpoint)
    return stages


def _logged(folder: Path, since: float) -> int:
    """The last step that a run has logged since its start."""
    file = folder / "metrics.jsonl"
    try:
        return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["step"] if file.stat().st_mtime > since else 0
    except (OSError, ValueError, LookupError):  # not there yet, or half a line
        return 0


def _is_newer(path: Path, since: float) -> bool:
    """Whether the file was made since then: a killed run may have left an older one."""
    try:
        return path.stat().st_mtime > since
    except OSError:  # it has just been renamed
        return False


def host_memory(pid: int) -> int:
    """The bytes of a process and its children, without mapped files."""
    total = 0
    for process in _family(pid):
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - getattr(memory, "shared", 0)
    return total


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)
    except psutil.Error:  # gone
        return


def _of_log(records: list[dict[str, float]]) -> dict[str, Any]:
    steps = [record for record in records if record["step"]]
    seconds, tokens = [], 0.0
    for record in steps:
        seconds.append((record["tokens"] - tokens) / record["tokens_per_second"])
        tokens = record["tokens"]
    timed = steps[WARM_UP:]
    found: dict[str, Any] = {"seconds_a_step": statistics.median(seconds[WARM_UP:])}
    found["tokens_a_step"] = steps[0]["tokens"]
    if "mfu" in steps[-1]:
        found["mfu"] = statistics.median(record["mfu"] for record in timed)
    found["peak_gib"] = max(record["peak_memory_gib"] for record in steps)
    found["losses"] = [record["loss"] for record in steps]
    found["held_out"] = [
        {name: value for name, value in record.items() if name.startswith("eval_loss")}
        for record in records
        if "eval_loss_fp4" in record
    ]
    return found


def _check_export(folder: Path) -> dict[str, Any]:
    """Verify an export in one process and load it in another. Returns seconds and peak host memory."""
    commands = {
        "verify": [sys.executable, "-m", "qat_patch", "verify", str(folder)],
        "load": [sys.executable, "-m", "scripts.bench.full_size", "load", str(folder)],
    }
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}
    for name, program in commands.items():
        began, peak = time.perf_counter(), 0
        log = folder.parent.with_name(f"{name}.log")
        with log.open("wb") as out:
            process = subprocess.Popen(program, cwd=ROOT, env=_environment(), stdout=out, stderr=out)
        while process.poll() is None:
            peak = max(peak, host_memory(process.pid))
            time.sleep(_POLL)
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode:
            raise SystemExit(f"{name} {folder} failed with {process.returncode}:\n{text[-3000:]}")
        found[name] = {"seconds": time.perf_counter() - began, "host_bytes": peak}
        if name == "load":
            found[name] |= json.loads(text.splitlines()[-1])
    return found


def load(folder: Path) -> dict[str, Any]:
    """Load an export on one GPU and compute its reference output.

    Returns:
        The distances (relative L2) to the recorded output, and the peak of GPU memory.

    Raises:
        ValueError: a distance is too large.
    """
    model = load_checkpoint(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    distances = check_reference(model, folder / REFERENCE)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"distances": distances, "peak_gib": peak}


if __name__ == "__main__":
    main()
