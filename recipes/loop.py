"""The training loop of every recipe, on Accelerate. What is learned, and from what, is for the task to say."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

import checkpoints
import faults
from adapters import has_adapters, save_adapters_only
from calibration import Calibration
from diagnostics import FlopCount, gradient_norms, quantization_errors
from objective import Teacher, evaluate, losses, make_teacher
from optimization import WeightAverage, compile_blocks, make_optimizer
from settings import flatten, to_dict, to_yaml
from task import Task
from training_settings import TrainingSettings

# Where and how often a run is saved, and when it gives up: free to differ when it goes on.
_BOOKKEEPING = {"output_dir", "resume", "checkpoint_every", "keep_checkpoints", "report_to", "max_skipped_steps"}


def train(settings: TrainingSettings, make_task: Callable[[Accelerator], Task]) -> dict[str, float]:
    """Run or resume a training, and export the result to output_dir/export.

    Args:
        settings: of the run.
        make_task: called once, when the settings and the checkpoint to resume from have been checked.

    Returns:
        The last training loss, and the held-out losses before the first step and after the last, by name.

    Raises:
        ValueError: output_dir holds another run, a checkpoint that does not fit or is damaged, or too little data.
            Nothing has been written to output_dir then.
        FloatingPointError: loss or gradients of too many steps are not finite.
        RuntimeError: a checkpoint cannot be written. Older ones are as they were.
    """
    accelerator = _accelerator(settings)
    checkpoint, state = _starting_point(settings, accelerator)
    done, tokens, skipped = state["step"], state["tokens"], state["skipped_steps"]
    set_seed(settings.seed, device_specific=True, deterministic=settings.deterministic)
    task = make_task(accelerator)
    teacher = make_teacher(task.objective, task.model, task.handle, accelerator) if settings.distillation else None
    if has_adapters(task.model):
        save_adapters_only(accelerator)
    if state["data"] is not None:
        task.restore_data(state["data"])
    loader, eval_loader = _loaders(settings, task, accelerator.num_processes, done)
    optimizer = make_optimizer(settings, task.model)
    if settings.compile:
        compile_blocks(task.model, task.handle, settings.compile)
    model, optimizer, loader, eval_loader = accelerator.prepare(task.model, optimizer, loader, eval_loader)
    if accelerator.is_fsdp2:
        # Accelerate does so for other models: sharding casts weights, but not what is computed between the layers.
        model.forward = accelerator.autocast()(model.forward)
    # Not prepared but registered: Accelerate would step it once a process.
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, settings.steps)
    accelerator.register_for_checkpointing(scheduler)
    average = WeightAverage(task.model, settings.ema_decay, accelerator) if settings.ema_decay else None
    calibration = Calibration(task.handle, accelerator) if settings.calibration_batches else None
    flops = FlopCount(task.objective, task.handle, task.model, accelerator.device)

    accelerator.print(f"{to_yaml(settings)}\n{task.handle}\n")
    log = _Log(settings, accelerator, checkpoint)

    def measure(step: int) -> dict[str, float]:
        values = {}
        with average.in_place() if average else contextlib.nullcontext():
            if eval_loader is not None and (step == 0 or settings.is_due(settings.eval_every, step)):
                values |= evaluate(
                    task.objective, model, task.handle, eval_loader, accelerator, teacher=teacher, seed=settings.seed
                )
            return values | task.after_step(step)

    batches = iter(loader)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint), strict=not has_adapters(task.model))
    else:
        if calibration:
            first = list(itertools.islice(batches, settings.calibration_batches))
            calibration.measure(task.objective, model, first)
            batches = itertools.chain(first, batches)
        if before := measure(0):
            log.write(0, before)
    model.train()
    steps = range(done + 1, settings.steps + 1)
    bar = tqdm(steps, initial=done, total=settings.steps, disable=not accelerator.is_local_main_process)
    for step in bar:
        began = time.perf_counter()
        values = {"learning_rate": scheduler.get_last_lr()[0]}
        seen = [next(batches) for _ in range(settings.accumulation_steps)]
        operations = sum(flops.of(model, batch) for batch in seen)
        is_detailed = settings.layers_every > 0 and step % settings.layers_every == 0
        errors = quantization_errors(task.objective, model, seen[0], accelerator.device) if is_detailed else {}
        values |= _step(settings, task, teacher, accelerator, model, optimizer, seen, is_detailed)
        scheduler.step()
        if average and _is_finite(values):
            average.step()
        if not _is_finite(values):
            skipped += 1
            where = faults.save_batches(Path(settings.output_dir), step, seen, values, accelerator.process_index)
            if skipped > settings.max_skipped_steps:
                raise FloatingPointError(
                    faults.advice(Path(settings.output_dir), step, values, where, settings.max_skipped_steps)
                )
            values = {name: value for name, value in values.items() if math.isfinite(value)} | {"skipped_steps": skipped}
        seconds = time.perf_counter() - began
        values |= {"tokens_per_second": values["tokens"] / seconds} | flops.speed(operations, seconds)
        values["peak_memory_gib"] = _peak_memory(accelerator.device)
        values["tokens"] = tokens = tokens + values["tokens"]
        bar.set_postfix_str(f"loss {values.get('loss', math.nan):.4f}, {values['tokens_per_second']:.0f} tokens/s")
        log.write(step, values | errors | measure(step))
        if settings.is_due(settings.checkpoint_every, step):
            state = {"step": step, "tokens": tokens, "skipped_steps": skipped, "processes": accelerator.num_processes}
            batches_done = step * settings.accumulation_steps * accelerator.num_processes
            state |= {"settings": to_dict(settings), "data": task.data_state(batches_done)}
            checkpoints.save(accelerator, log.file.parent, step, state, attach=log.files, keep=settings.keep_checkpoints)

    accelerator.wait_for_everyone()
    summary = log.summary()
    weights = accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None  # all processes take part
    # Without autocast, in which an export's reference output could not be computed again.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if accelerator.is_main_process:
        chosen = {name: x for name, x in flatten(to_dict(settings)).items() if x is not None and name not in _BOOKKEEPING}
        with average.in_place() if average else contextlib.nullcontext():
            task.export(log.file.parent / "export", {"tokens": tokens} | chosen, summary, weights)
    accelerator.wait_for_everyone()  # a process that ends while another still exports takes that one down
    accelerator.end_training()
    return summary


class _Log:
    """metrics.jsonl, one line a step, and the trackers. The first thing of a run that writes."""

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, checkpoint: Path | None) -> None:
        self.accelerator, self.file = accelerator, Path(settings.output_dir) / "metrics.jsonl"
        self.files = [self.file, self.file.with_name("settings.yaml")]
        """What a checkpoint takes along."""
        accelerator.wait_for_everyone()  # until all have found output_dir free
        if accelerator.is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            (self.file.parent / "settings.yaml").write_text(to_yaml(settings), encoding="utf-8")
            if checkpoint is None:
                self.file.touch()
            else:
                # The log as it was at the checkpoint: what came after it will come again.
                shutil.copyfile(checkpoint / self.file.name, self.file)
        # Trackers take numbers and text.
        flat = flatten(to_dict(settings)).items()
        config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat}
        accelerator.init_trackers("qat_patch", config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def summary(self) -> dict[str, float]:
        records = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        summary = {"train_loss": next(record["loss"] for record in reversed(records) if "loss" in record)}
        for when, record in (("before", records[0]), ("after", records[-1])):
            summary |= {f"{name}_{when}": value for name, value in record.items() if name.startswith("eval_")}
        return summary


def _accelerator(settings: TrainingSettings) -> Accelerator:
    if settings.deterministic:
        # Read when cuBLAS starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision, launched = settings.mixed_precision or "no", os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ValueError(f"accelerate launch asks for {launched}, the settings for mixed_precision={precision}; let them agree")
    accelerator = Accelerator(
        mixed_precision=precision,
        # As a plugin, so that no environment variable changes it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.accumulation_steps),
        log_with=list(settings.report_to) or None,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir) / "logs")),
    )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    kind = accelerator.distributed_type
    if kind not in supported or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        expected = ", ".join(kind.value for kind in supported)
        raise ValueError(f"accelerate launch asks for {kind.value}; expected one of {expected}, the last with fsdp_version 2")
    if accelerator.is_fsdp2 and settings.mixed_precision:
        # Accelerate's policy would also round the loss and sum gradients up in bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    # Accelerate leaves out trackers that are not installed, and says so to nobody.
    missing = set(settings.report_to) - {"all", *(str(tracker) for tracker in accelerator.log_with)}
    if missing:
        raise ValueError(f"settings.report_to: {', '.join(sorted(missing))} cannot be used here; pip install it first")
    return accelerator


def _starting_point(settings: TrainingSettings, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, and the state stored in it; refuses what does not fit. Only reads."""
    output_dir = Path(settings.output_dir)
    if (output_dir / "export").exists():
        raise ValueError(f"output_dir: the run in {output_dir} is finished; choose another folder, or remove this one")
    if settings.resume is None:
        if (output_dir / "metrics.jsonl").exists() or checkpoints.steps_in(output_dir):
            raise ValueError(f"output_dir: {output_dir} holds a run; resume=latest goes on with it; else choose another folder")
        return None, {"step": 0, "tokens": 0, "skipped_steps": 0, "data": None}
    checkpoint = checkpoints.find(output_dir, settings.resume)
    state = checkpoints.check(checkpoint)
    if state["processes"] != accelerator.num_processes:
        raise ValueError(f"resume: {checkpoint} needs {state['processes']} processes, and there are {accelerator.num_processes}")
    then, now = flatten(state["settings"]), flatten(to_dict(settings))
    free = _BOOKKEEPING | ({"steps"} if settings.schedule == "constant" else set())
    changed = sorted(name for name in (then | now).keys() - free if then.get(name) != now.get(name))
    if changed:
        differences = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(f"resume: these settings differ from those of {checkpoint}: {differences}")
    newer = [str(path) for step, path in checkpoints.steps_in(output_dir).items() if step > state["step"]]
    if newer:
        raise ValueError(f"resume: {output_dir} holds newer checkpoints than {checkpoint}; remove them first: {', '.join(newer)}")
    if state["step"] > settings.steps:
        raise ValueError(f"settings.steps: {checkpoint} has seen {state['step']} steps already, got {settings.steps}")
    return checkpoint, state


def _loaders(settings: TrainingSettings, task: Task, processes: int, done: int) -> tuple[DataLoader, DataLoader | None]:
    batches_a_step = settings.accumulation_steps * processes
    # With generators of their own the loaders draw nothing from the global one, which a checkpoint restores.
    order = task.batches(done * batches_a_step, settings.steps * batches_a_step)
    loader = DataLoader(task.train_data, batch_sampler=order, generator=torch.Generator())
    if task.eval_data is None:
        return loader, None
    return loader, DataLoader(task.eval_data, task.eval_batch_size, generator=torch.Generator())


def _step(
    settings: TrainingSettings,
    task: Task,
    teacher: Teacher | None,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    is_detailed: bool,
) -> dict[str, float]:
    """One optimizer step: losses, averaged over batches and processes, gradient norm before clipping, and tokens.

    If it is to be detailed, gradient norms of the layers too.

    The weights stay as they are if any of it is not finite; all processes agree on that.
    """
    sums: dict[str, torch.Tensor] = {}
    limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
    # Around the backward pass too, where gradient checkpointing runs the forward pass again.
    with contextlib.nullcontext() if settings.attention == "fp4" else task.handle.disabled():
        for batch in batches:
            with accelerator.accumulate(model):
                values = losses(task.objective, model, batch, teacher, settings.distillation)
                accelerator.backward(values["loss"])
            values["tokens"] = torch.tensor(task.tokens(batch))
            for name, value in values.items():
                value = value.detach().to(accelerator.device, torch.float32)
                sums[name] = sums[name] + value if name in sums else value
    layers = gradient_norms(model) if is_detailed else {}
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    totals = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist(), strict=True))
    tokens = int(totals.pop("tokens"))
    batches_a_step = settings.accumulation_steps * accelerator.num_processes
    means = {name: total / batches_a_step for name, total in totals.items()}
    values = {**means, "grad_norm": float(norm), "tokens": tokens, **layers}
    if _is_finite(values):
        optimizer.step()
    optimizer.zero_grad()
    return values


def _is_finite(values: dict[str, float]) -> bool:
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def _peak_memory(device: torch.device) -> float:
    """GiB since the start: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
