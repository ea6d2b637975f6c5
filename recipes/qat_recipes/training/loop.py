"""The training loop of every recipe, on Accelerate. The task says what to learn, and from which data."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from qat_patch import get_linear_handle
from qat_recipes.command_line import flatten, to_dict, to_yaml
from qat_recipes.memory.empty_weights import find_by_name, reserve_memory
from qat_recipes.memory.split_tokens import RepeatedBatches, RepeatedSamples

from . import checkpoints, nonfinite, restore
from .adapters import has_adapters, names_left_out, save_adapters_only
from .calibration import Calibration, LinearCalibration
from .diagnostics import FlopCount, quantization_errors
from .log import Log
from .objective import evaluate, make_teacher
from .optimization import WeightAverage, compile_blocks, make_optimizer
from .settings import TrainingSettings
from .start import BOOKKEEPING, content, make_accelerator, owned, refuse_other_inputs, starting_point
from .step import Stepper, is_finite
from .task import Task


def train(settings: TrainingSettings, make_task: Callable[[Accelerator], Task]) -> dict[str, float]:
    """Run or resume a training, and export the result to output_dir/export.

    Args:
        settings: the settings of the run.
        make_task: called once, after the settings and the checkpoint to resume from were checked.

    Returns:
        The last training loss, and the held-out losses before the first step and after the last, by name.

    Raises:
        ValueError: output_dir holds another run, is in use by one, or cannot be written; a checkpoint is damaged or does not fit;
            the data or the model have changed since it was written; or there is too little data. Then nothing was written to
            output_dir.
        FloatingPointError: loss or gradients of too many steps are not finite.
        RuntimeError: a checkpoint cannot be written. Older ones do not change.
    """
    accelerator, seen = make_accelerator(settings), content(settings)
    checkpoint, state = starting_point(settings, accelerator)
    with owned(settings, accelerator, seen):
        run = _Run(settings, make_task, accelerator, checkpoint, state)
        batches = run.begin()
        is_shown = accelerator.is_local_main_process
        bar = tqdm(range(run.done + 1, settings.steps + 1), initial=run.done, total=settings.steps, disable=not is_shown)
        for step in bar:
            values = run.step(step, batches)
            bar.set_postfix_str(
                f"loss {values.get('loss', math.nan):.4f}, {values.get('tokens_per_second', math.nan):.0f} tokens/s"
            )
            run.log.write(step, values | run.measure(step))
            if settings.is_due(settings.checkpoint_every, step):
                run.save(step)
        summary = run.finish()
        # Free everything that uses the process group before it: otherwise a process may abort at exit, after a finished run.
        del run, batches, bar
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
        return summary


class _Run:
    """Everything that a training needs, made in the required order."""

    def __init__(
        self,
        settings: TrainingSettings,
        make_task: Callable[[Accelerator], Task],
        accelerator: Accelerator,
        checkpoint: Path | None,
        state: dict[str, Any],
    ) -> None:
        self.settings, self.output_dir = settings, Path(settings.output_dir)
        self.accelerator, self.checkpoint = accelerator, checkpoint
        self.done, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped_steps"]
        self._seed()
        self.task = task = make_task(accelerator)
        self.inputs: dict[str, str] = {}
        if accelerator.is_main_process and (checkpoint is not None or settings.checkpoint_every):
            self.inputs = task.fingerprints()
        if checkpoint is not None and accelerator.is_main_process:
            refuse_other_inputs(checkpoint, state["inputs"], self.inputs)
        self.teacher = None
        if settings.distillation:
            self.teacher = make_teacher(task.objective, task.model, task.handle, accelerator, task.teacher())
        if has_adapters(task.model):
            save_adapters_only(accelerator)
        if state["data"] is not None:
            task.restore_data(state["data"])
        loader, eval_loaders = _loaders(settings, task, accelerator.num_processes, self.done)
        reserve_memory(task.model)
        if accelerator.is_fsdp2:
            find_by_name(task.model)
        optimizer = make_optimizer(settings, task.model)
        if settings.compile:
            compile_blocks(task.handle, settings.compile)
        objects = [task.model, optimizer, loader, *eval_loaders.values()]
        placement = [not task.places_itself, *[True] * len(objects[1:])]
        self.model, optimizer, self.loader, *prepared = accelerator.prepare(*objects, device_placement=placement)
        self.eval_loaders = dict(zip(eval_loaders, prepared, strict=True))
        if accelerator.is_fsdp2:
            # Accelerate does this for other models; sharding casts weights, but not the computations between the layers.
            self.model.forward = accelerator.autocast()(self.model.forward)
        # Registered, not prepared: Accelerate would step it once per process.
        schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, settings.steps)
        self.average = WeightAverage(task.model, settings.ema_decay, accelerator) if settings.ema_decay else None
        self.calibration = (
            Calibration(task.handle, accelerator, settings.calibration_exclude, settings.calibration_shifts)
            if settings.calibration_batches
            else None
        )
        linears, self.linear_calibration = get_linear_handle(task.model), None
        if linears is not None and settings.linear_batches:
            self.linear_calibration = LinearCalibration(linears, task.handle, accelerator)
        if settings.processes_a_sample > 1:
            self._seed()  # the processes of a group add the same noise, although loading drew different random numbers
        registered = [self.scheduler, self.average, self.calibration, self.linear_calibration]
        registered = [each for each in registered if each is not None]
        accelerator.register_for_checkpointing(*registered)
        self.flops = FlopCount(task.objective, task.handle, task.model, accelerator)
        accelerator.print(f"{to_yaml(settings)}\n{task.handle}\n{linears or ''}\n")
        if checkpoint is not None:
            left_out = names_left_out(self.model) if has_adapters(task.model) else set()
            self.random_states = restore.load(accelerator, checkpoint, self.model, optimizer, registered, left_out=left_out)
        self.log = Log(settings, accelerator, self.checkpoint)
        self.stepper = Stepper(
            settings=settings,
            task=task,
            accelerator=accelerator,
            model=self.model,
            optimizer=optimizer,
            teacher=self.teacher,
        )

    def _seed(self) -> None:
        settings = self.settings
        group = self.accelerator.process_index // settings.processes_a_sample
        set_seed(settings.seed + group, deterministic=settings.deterministic)

    def begin(self) -> Iterator[Any]:
        """Resume from the checkpoint, or calibrate and measure. Returns the batches of the remaining steps."""
        batches = iter(self.loader)
        if self.checkpoint is not None:
            restore.set_random_states(self.random_states)  # trackers may have drawn random numbers when they started
        else:
            for_linears, for_keys = self.settings.linear_batches, self.settings.calibration_batches
            first = list(itertools.islice(batches, max(for_linears, for_keys)))
            if self.linear_calibration:
                self.linear_calibration.measure(self.task.objective, self.model, first[:for_linears])
            if self.calibration:
                of_all = self.task.for_every_part(first[:for_keys])
                self.calibration.measure(self.task.objective, self.model, of_all)
            batches = itertools.chain(first, batches)
            if before := self.measure(0):
                self.log.write(0, before)
        self.model.train()
        return batches

    def step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Make a step. Returns its log entries.

        Raises:
            FloatingPointError: it was not finite, and no more steps may be skipped.
        """
        settings, device = self.settings, self.accelerator.device
        began = time.perf_counter()
        values = {"learning_rate": self.scheduler.get_last_lr()[0]}
        seen = [next(batches) for _ in range(settings.accumulation_steps)]
        operations = sum(self.flops.of(self.model, batch) for batch in seen)
        is_detailed = settings.layers_every > 0 and step % settings.layers_every == 0
        errors = {}
        if is_detailed:
            task, batches_of_all = self.task, self.task.for_every_part(seen[:1])
            errors = quantization_errors(task.objective, self.model, task.handle, batches_of_all, device)
        values |= self.stepper.step(seen, is_detailed=is_detailed)
        self.scheduler.step()
        if not is_finite(values):
            values = self._skip(step, seen, values)
        elif self.average:
            self.average.step()
        seconds = time.perf_counter() - began
        if seconds > 0:  # clocks of virtual machines stand still at times
            values |= {"tokens_per_second": values["tokens"] / seconds} | self.flops.speed(operations, seconds)
        values["peak_memory_gib"] = _peak_memory(device)
        self.tokens += values["tokens"]
        values["tokens"] = self.tokens
        return values | errors

    def _skip(self, step: int, batches: list[Any], values: dict[str, float]) -> dict[str, float]:
        """Count and store a step that was not finite. Returns its finite values."""
        self.skipped += 1
        limit = self.settings.max_skipped_steps
        where = nonfinite.save_batches(self.output_dir, step, batches, values, self.accelerator.process_index)
        if self.skipped > limit:
            raise FloatingPointError(nonfinite.advice(self.output_dir, step, values, where, limit))
        return {name: value for name, value in values.items() if math.isfinite(value)} | {"skipped_steps": self.skipped}

    def measure(self, step: int) -> dict[str, float]:
        """The measurements after a step (0: before the first): held-out losses, and those of the task."""
        settings, task = self.settings, self.task
        values: dict[str, float] = {}
        with self._averaged():
            if step == 0 or settings.is_due(settings.eval_every, step):
                for part, loader in self.eval_loaders.items():
                    found = evaluate(
                        task.objective,
                        self.model,
                        task.handle,
                        loader,
                        self.accelerator,
                        teacher=self.teacher,
                        seed=settings.seed,
                    )
                    values |= {f"{name}/{part}" if part else name: value for name, value in found.items()}
            return values | task.after_step(step)

    def save(self, step: int) -> None:
        """Write a checkpoint.

        Raises:
            RuntimeError: it cannot be written.
        """
        settings, processes = self.settings, self.accelerator.num_processes
        batches_done = step * _batches_a_step(settings, processes)
        state = {"step": step, "tokens": self.tokens, "skipped_steps": self.skipped, "processes": processes}
        state |= {"settings": to_dict(settings), "data": self.task.data_state(batches_done), "inputs": self.inputs}
        checkpoints.save(self.accelerator, self.output_dir, step, state, attach=self.log.files, keep=settings.keep_checkpoints)

    def finish(self) -> dict[str, float]:
        """Export. Returns the summary of the log."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        summary = self.log.summary()
        weights = None
        if accelerator.is_fsdp2:
            with self._averaged():
                weights = accelerator.get_state_dict(self.model)  # all processes take part
        # Without autocast, so that the export's reference output can be computed again.
        accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if accelerator.is_main_process:
            settings = flatten(to_dict(self.settings)).items()
            chosen = {name: x for name, x in settings if x is not None and name not in BOOKKEEPING}
            with self._averaged():
                self.task.export(self.output_dir / "export", {"tokens": self.tokens} | chosen, summary, weights)
        accelerator.wait_for_everyone()  # if a process ended while another still exports, it would take that one down
        return summary

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has its averaged weights, if there are averages."""
        return self.average.in_place() if self.average else contextlib.nullcontext()


def _loaders(settings: TrainingSettings, task: Task, processes: int, done: int) -> tuple[DataLoader, dict[str, DataLoader]]:
    batches_a_step, group = _batches_a_step(settings, processes), settings.processes_a_sample
    # With their own generators the loaders draw nothing from the global one, which a checkpoint restores.
    order: Any = task.batches(done * batches_a_step, settings.steps * batches_a_step)
    if group > 1:
        order = RepeatedBatches(order, group)
    loader = DataLoader(task.train_data, batch_sampler=order, generator=torch.Generator())
    held_out = {}
    for part, samples in task.eval_data.items():
        repeated: Any = samples if group == 1 else RepeatedSamples(samples, group)
        held_out[part] = DataLoader(repeated, task.eval_batch_size, generator=torch.Generator())
    return loader, held_out


def _batches_a_step(settings: TrainingSettings, processes: int) -> int:
    """Different ones."""
    return settings.accumulation_steps * processes // settings.processes_a_sample


def _peak_memory(device: torch.device) -> float:
    """The peak since the start in GiB: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
