"""The needs of scripts.bench.full_size, calculated, and its measurements, as tables: the last section of docs/SIZING.md."""

from __future__ import annotations

import bisect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from scripts.bench.full_size_inputs import SIZES, Size
from scripts.paths import DOCS

MARK = "## Several GPUs\n"
RESULTS = DOCS / "benchmarks" / "full_size.json"
GPUS = 8
"""The entry in the tables before anything is measured."""
GIB = 2**30
ROOM = 0.9
"""The usable share of memory: the rest is for CUDA contexts, fragmentation, and files that the system keeps in memory."""
MIB_A_TOKEN = {"wan": 0.693, "qwen3": 2.149}
"""GPU memory per token with gradient checkpointing, as measured with LoRA (docs/SIZING.md, section *Measured*)."""
A_GATHERED_WEIGHT = 2 + 2 + 4
"""Bytes of a weight that a GPU has whole: it and its gradient in bfloat16, and the float32 copy in which gradients are summed."""
HOST_A_PROCESS = 4 * GIB
"""Python, PyTorch and a CUDA context."""
BESIDE = 6 * GIB
"""On disk: the model of two layers, samples, logs."""
NOT = "not measured"

TEXT = """
FSDP2 over N GPUs (`recipes/accelerate_configs/fsdp2.yaml`) divides the bytes that weights take by N and adds what a GPU has whole
while it computes with it. The memory of a token stays the same, since each GPU has its own sequence; with `parallel.ulysses` the
GPUs share one. DDP divides nothing. The first process alone reads the weights and gives each its part.

`python -m scripts.bench.full_size measure {results}` runs the recipes on whole 14B models with random
weights and samples of the real lengths (Wan: 81 frames of 720x1280, 75,600 tokens; Qwen3: 8,192), with the shipped configs, ten
steps each; `make evidence` writes the tables below.

### Calculated needs

For {gpus} GPUs. Only the memory of a token was measured (section *Measured*); the rest is calculated. A step needs 16 bytes a
weight, over the number of GPUs, and 8 bytes on each GPU for every weight that it has whole: those of two layers, the embeddings
and the head. These are a weight and its gradient in bfloat16, and the float32 copy in which gradients are summed. The sum is a
bound: gradients of the embeddings are summed last, when most of what tokens take is free again.

{needs}

### Steps

{about}. A step has one sample a GPU, or with Ulysses one for all of them; seconds are medians of the last eight of ten steps,
memory is the peak of what PyTorch has allocated on the first GPU.

{steps}

### Compared with one GPU

The same cut to two layers, with the same samples on one GPU and on all: the largest relative difference of the held-out losses in
both attentions, before the first step and after the last.

{same}

### The life of a run

Killed after a checkpoint, resumed, exported in bfloat16 from the shards, verified on the CPU, and loaded on one GPU: seconds and
peak memory of the host.

{life}
"""


class Need(NamedTuple):
    """The needs of a stage, in bytes."""

    stage: str
    host: float
    disk: float
    gpu: float


class Needs(NamedTuple):
    """The needs of all stages of a model."""

    name: str
    weights: int
    layers: int
    gpus: int
    stages: list[Need]

    @property
    def most(self) -> Need:
        return Need("all", *(max(getattr(need, what) for need in self.stages) for what in ("host", "disk", "gpu")))


def needs(size: Size, gpus: int, layers: int | None = None) -> Needs:
    """Calculated from 16 bytes per weight: float32 weights, gradients and two moments."""
    one, two = (sum(parameter.numel() for parameter in size.empty(number).parameters()) for number in (1, 2))
    layer, others = two - one, 2 * one - two
    weights = others + layer * (layers or size.layers)
    processes, tokens = gpus * HOST_A_PROCESS, size.tokens * MIB_A_TOKEN[size.kind] * 2**20
    fixed = 16 * weights / gpus + A_GATHERED_WEIGHT * (others + 2 * layer)
    teacher = 4 * weights / gpus
    stages = [
        Need("write weights, bfloat16", 5 * GIB, 2 * weights, 0),
        Need("start: the first process reads float32 weights", 4 * weights + processes, 2 * weights, 4 * weights / gpus),
        Need("start, distillation: and a teacher", 8 * weights + processes, 2 * weights, 8 * weights / gpus),
        Need("step, FSDP2", processes, 2 * weights, fixed + tokens),
        Need("step, FSDP2, distillation", processes, 2 * weights, fixed + teacher + tokens),
    ]
    if size.kind == "wan":
        stages.append(Need("step, FSDP2 + Ulysses", processes, 2 * weights, fixed + tokens / gpus))
        stages.append(Need("step, FSDP2 + Ulysses, distillation", processes, 2 * weights, fixed + teacher + tokens / gpus))
    stages += [
        Need("checkpoint: weights and moments in float32", 12 * weights + processes, 14 * weights, fixed),
        Need("resume", 12 * weights + processes, 14 * weights, fixed),
        # The weights are gathered, put into another model, cast, and read back.
        Need("export, bfloat16", (4 + 4 + 2 + 2) * weights + processes, 4 * weights, fixed),
        Need("verify, load", 4 * weights, 4 * weights, 2 * weights + GIB),
    ]
    stages = [need._replace(disk=need.disk + BESIDE) for need in stages]
    return Needs(size.name, weights, layers or size.layers, gpus, stages)


def table_of_needs(found: Needs) -> str:
    """In GiB."""
    rows = [f"| {found.name}, {found.weights / 1e9:.2f} G weights | host, GiB | disk, GiB | a GPU, GiB |", "|---|---|---|---|"]
    rows += [f"| {need.stage} | {_gib(need.host)} | {_gib(need.disk)} | {_gib(need.gpu)} |" for need in found.stages]
    return "\n".join(rows)


def _gib(number: float) -> str:
    return f"{number / GIB:.0f}"


def host_limit() -> int:
    """The bytes of memory of this container, or what the system says of the machine."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(file).is_file() and (text := Path(file).read_text(encoding="utf-8").strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def check_machine(
    size: Size,
    gpus: int,
    layers: int | None,
    work: Path,
    *,
    gpu_bytes: int | None = None,
    host_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> None:
    """Refuse a machine that is too small. The default is this machine; without a GPU only host memory and disk count.

    Raises:
        ValueError: it is too small; the message says what is needed, what there is, and how many layers would fit.
    """
    if gpu_bytes is None and torch.cuda.is_available():
        gpu_bytes = min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))
    place = next(path for path in (work, *work.resolve().parents) if path.exists())
    # A resumed run writes its weights again.
    used = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) if work.exists() else 0
    there = {
        "host": (ROOM * (host_limit() if host_bytes is None else host_bytes), "host memory"),
        "disk": (shutil.disk_usage(place).free + used if disk_bytes is None else disk_bytes, f"disk under {place}"),
    }
    if gpu_bytes is not None:
        there["gpu"] = (ROOM * gpu_bytes, "memory of each GPU")

    def lacking(layers: int | None) -> list[str]:
        most = needs(size, gpus, layers).most
        each = ((getattr(most, name), has, what) for name, (has, what) in there.items())
        return [f"{what}: {need / GIB:.0f} GiB, got {has / GIB:.0f}" for need, has, what in each if need > has]

    if lacks := lacking(layers):
        whole = layers or size.layers
        fitting = bisect.bisect_left(range(1, whole), True, key=lambda number: bool(lacking(number)))
        way_out = f"; {fitting} layers would fit (--layers {fitting})" if fitting else ""
        raise ValueError(
            f"full_size: {size.name} of {whole} layers on {gpus} GPUs: expected {'; '.join(lacks)} (of memory {ROOM:.0%} count). "
            f"Take a larger machine or more GPUs, or another --work{way_out}; `plan` prints what each stage needs. "
            "Some machines grow while they are used: if this one has more memory than it says, give --host-gib"
        )


# What was measured --------------------------------------------------------------------------------------------------------


def section(results: dict[str, Any] | None = None) -> str:
    """The last section of docs/SIZING.md. `results`: from `measure`; None: those of RESULTS, if it exists."""
    if results is None and RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    gpus, layers = (GPUS, None) if results is None else (results["about"]["gpus"], results["about"]["layers"])
    return MARK + TEXT.format(
        results=f"docs/benchmarks/{RESULTS.name}",
        gpus=gpus,
        needs="\n\n".join(table_of_needs(needs(size, gpus, layers)) for size in SIZES.values()),
        about="Not measured yet" if results is None else f"Measured on: {_about(results)}",
        steps=_steps(results),
        same=_same(results),
        life=_life(results),
    )


def tables(results: dict[str, Any]) -> str:
    """The measurements as tables for printing."""
    return "\n\n".join((_about(results), _steps(results), _same(results), _life(results)))


def _about(results: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in results["about"].items() if name != "models" and value is not None)


def _run(results: dict[str, Any] | None, *parts: str) -> dict[str, Any] | None:
    return None if results is None else results["runs"].get("-".join(parts))


def _cell(found: dict[str, Any] | None, show: Callable[[dict[str, Any]], str]) -> str:
    return NOT if found is None else show(found)


def _steps(results: dict[str, Any] | None) -> str:
    rows = ["| | | attention | s a step | MFU | peak, GiB a GPU | 4-bit / its own, time |", "|---|---|---|---|---|---|---|"]
    for model, size in SIZES.items():
        for how, name in (("fsdp2", "FSDP2"), ("ulysses", "FSDP2 + Ulysses"))[: 1 + (model == "wan")]:
            own = _run(results, model, how, "task", "original", "timed")
            for objective, attention in (("task", "fp4"), ("task", "original"), ("distillation", "fp4")):
                run = _run(results, model, how, objective, attention, "timed")
                ratio = ""
                if (objective, attention) == ("task", "fp4"):
                    ratio = NOT if run is None or own is None else f"{run['seconds_a_step'] / own['seconds_a_step']:.3f}"
                cells = [
                    f"{size.name}, {name}",
                    "task loss" if objective == "task" else objective,
                    "4-bit" if attention == "fp4" else "its own (SDPA)",
                    _cell(run, lambda run: f"{run['seconds_a_step']:.2f}"),
                    _cell(run, lambda run: f"{100 * run['mfu']:.1f} %" if "mfu" in run else NOT),
                    _cell(run, lambda run: f"{run['peak_gib']:.1f}"),
                    ratio,
                ]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of the held-out losses of two runs."""
    pairs = zip(one["held_out"], other["held_out"], strict=True)
    return max(abs(b[name] - a[name]) / abs(a[name]) for a, b in pairs for name in a)


def _same(results: dict[str, Any] | None) -> str:
    rows = ["| | FSDP2 | FSDP2 + Ulysses | the loss fell by, on one GPU |", "|---|---|---|---|"]
    for model, size in SIZES.items():
        one = _run(results, model, "one", "task", "fp4", "cut")
        cells = []
        for how in ("fsdp2", "ulysses"):
            other = _run(results, model, how, "task", "fp4", "cut")
            absent = "" if (model, how) == ("qwen3", "ulysses") else NOT
            cells.append(absent if one is None or other is None else f"{difference(one, other):.1e}")
        fell = _cell(one, lambda run: f"{run['held_out'][0]['eval_loss_fp4'] - run['held_out'][-1]['eval_loss_fp4']:.3f}")
        rows.append(f"| {size.name}, two layers | {' | '.join(cells)} | {fell} |")
    return "\n".join(rows)


def _life(results: dict[str, Any] | None) -> str:
    rows = [f"| | {' | '.join(f'{size.name}: s | host, GiB' for size in SIZES.values())} |", "|---" * (1 + 2 * len(SIZES)) + "|"]

    def of_run(stage: str, part: str) -> Callable[[str], dict[str, Any] | None]:
        def find(model: str) -> dict[str, Any] | None:
            run = _run(results, model, "fsdp2", "task", "fp4", stage)
            return None if run is None else run["stages"].get(part)

        return find

    def of_export(part: str) -> Callable[[str], dict[str, Any] | None]:
        return lambda model: None if results is None else results["exports"].get(model, {}).get(part)

    for name, find in {
        "start, to the first step": of_run("killed", "start"),
        "checkpoint": of_run("killed", "checkpoint"),
        "resume, to the first step": of_run("resumed", "start"),
        "export": of_run("resumed", "export"),
        "verify": of_export("verify"),
        "load on one GPU": of_export("load"),
    }.items():
        cells = []
        for model in SIZES:
            found = find(model)
            cells += [_cell(found, lambda x: f"{x['seconds']:.0f}"), _cell(found, lambda x: f"{x['host_bytes'] / GIB:.1f}")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    cells = []
    for model in SIZES:
        whole, resumed = (_run(results, model, "fsdp2", "task", "fp4", stage) for stage in ("timed", "resumed"))
        cells += [NOT if whole is None or resumed is None else f"{resumed_difference(whole, resumed):.1e}", ""]
    rows.append(f"| losses against a run that was not killed, relative | {' | '.join(cells)} |")
    return "\n".join(rows)


def resumed_difference(whole: dict[str, Any], resumed: dict[str, Any]) -> float:
    """The largest relative difference of training losses."""
    return max(abs(b - a) / abs(a) for a, b in zip(whole["losses"], resumed["losses"], strict=True))
