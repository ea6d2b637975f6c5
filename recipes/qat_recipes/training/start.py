"""The start of a run: its launch, and its checkpoint to resume from. Mistakes are refused before anything is written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from qat_patch.checkpoint import lock
from qat_recipes.command_line import flatten, to_dict
from qat_recipes.memory.optimizers import check_optimizer

from . import checkpoints
from .log import METRICS, SETTINGS
from .settings import TrainingSettings

BOOKKEEPING = frozenset({"output_dir", "resume", "checkpoint_every", "keep_checkpoints", "report_to", "max_skipped_steps"})
"""Settings that a resumed run may change: where and how often it is saved, and when it gives up."""
_PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: one alone reads weights, hashes checkpoints and exports, minutes for large models."""
_NOT_SUPPORTED = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What `accelerate launch` may ask for, by the environment variables ACCELERATE_USE_..., and this loop was not made for."""
_STATE = {"step": int, "tokens": int, "skipped_steps": int, "processes": int, "settings": dict, "inputs": dict}


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """An Accelerator for these settings.

    Raises:
        ValueError: `accelerate launch` asks for something else, or for something that this loop cannot do.
    """
    # Before Accelerate acts on them: DeepSpeed would connect the processes first, and may wait for ever there.
    for name in _NOT_SUPPORTED:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch asks for {name}, which this loop was not made for; start it with ddp.yaml or fsdp2.yaml of "
                "recipes/accelerate_configs, and share a clip among processes with the setting parallel.ulysses"
            )
    if settings.deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision, launched = settings.mixed_precision or "no", os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ValueError(f"accelerate launch asks for {launched}, the settings for mixed_precision={precision}; make them equal")
    # DDP must accept parts without gradients, because a step may not train them.
    handlers: list[KwargsHandler] = [InitProcessGroupKwargs(timeout=_PATIENCE)]
    if settings.trains_in_turns:
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    accelerator = Accelerator(
        mixed_precision=precision,
        kwargs_handlers=handlers,
        # A plugin, so that no environment variable changes it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.accumulation_steps),
        log_with=list(settings.report_to) or None,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir) / "logs")),
    )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    kind = accelerator.distributed_type
    if kind not in supported or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        expected = ", ".join(kind.value for kind in supported)
        raise ValueError(f"accelerate launch asks for {kind.value}; expected one of {expected}, the last with fsdp_version 2")
    check_optimizer(settings.optimizer, accelerator.device, is_sharded=accelerator.is_fsdp2)
    if settings.offload_activations and accelerator.device.type != "cuda":
        raise ValueError(
            f"settings.offload_activations: there is no GPU to offload from, the run is on {accelerator.device.type}"
        )
    if accelerator.is_fsdp2 and settings.mixed_precision:
        # Accelerate's policy would also round the loss, sum gradients in bfloat16, and round the inputs of modules: timesteps,
        # rotary embeddings, the residual stream. Autocast rounds only where a single process does.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
        )
    # Accelerate silently leaves out trackers that are not installed.
    missing = set(settings.report_to) - {"all", *(str(tracker) for tracker in accelerator.log_with)}
    if missing:
        raise ValueError(f"settings.report_to: {', '.join(sorted(missing))} cannot be used here; pip install it first")
    return accelerator


def starting_point(settings: TrainingSettings, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to resume from, and its state; None if nothing was saved. Only reads.

    The first process checks the checkpoint's files, and tells the others the result.

    Raises:
        ValueError: output_dir holds another run, or the checkpoint is damaged or does not fit.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_starting_point(settings, accelerator)]
        except ValueError as error:
            found = [error]
    (outcome,) = broadcast_object_list(found)
    if isinstance(outcome, ValueError):
        # A problem may only be another run that is writing now.
        lock.refuse_if_locked(Path(settings.output_dir), "output_dir")
        raise outcome
    return outcome


def content(settings: TrainingSettings) -> dict[str, tuple[int, int]]:
    """The contents of output_dir, to see whether they change."""
    output_dir = Path(settings.output_dir)
    if not output_dir.is_dir():
        return {}
    stats = {path.name: path.lstat() for path in output_dir.iterdir() if path.name != lock.LOCK}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def refuse_other_inputs(checkpoint: Path, then: dict[str, str], now: dict[str, str]) -> None:
    """Raise a ValueError if a resumed run would use other data, or another model."""
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"resume: {', '.join(changed)} changed since {checkpoint} was written; use the same as before, or start "
            "another run in another output_dir"
        )


@contextlib.contextmanager
def owned(settings: TrainingSettings, accelerator: Accelerator, seen: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Inside, output_dir belongs to this run.

    Raises:
        ValueError: another run has it, it cannot be written, or its contents are no longer as `seen`.
    """
    output_dir = Path(settings.output_dir)
    with lock.locked(output_dir, "output_dir") if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if content(settings) != seen:
            raise ValueError(f"output_dir: another run has just written to {output_dir}; start this one again")
        yield


def _starting_point(settings: TrainingSettings, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    output_dir = Path(settings.output_dir)
    new: dict[str, Any] = {"step": 0, "tokens": 0, "skipped_steps": 0, "data": None, "inputs": {}}
    if (output_dir / "export").exists():
        raise ValueError(f"output_dir: the run in {output_dir} is finished; choose another folder, or remove this one")
    saved = checkpoints.steps_in(output_dir)
    if settings.resume is None:
        if (output_dir / METRICS).exists() or saved:
            go_on = "continues it" if saved else "starts it again, because it has saved nothing"
            raise ValueError(f"output_dir: {output_dir} holds a run; resume=latest {go_on}; else choose another folder")
        return None, new
    checkpoint = checkpoints.find(output_dir, settings.resume)
    if checkpoint is None:
        _refuse_if_moved(output_dir)
        accelerator.print(f"resume=latest: nothing has been saved in {output_dir}; the run starts from the beginning")
        return None, new
    state = checkpoints.check(checkpoint)
    if any(not isinstance(state.get(name), kind) for name, kind in _STATE.items()) or not (checkpoint / METRICS).is_file():
        raise ValueError(f"resume: {checkpoint} does not hold the state of a run; resume from another, or start again")
    if state["processes"] != accelerator.num_processes:
        raise ValueError(f"resume: {checkpoint} needs {state['processes']} processes, and there are {accelerator.num_processes}")
    then, now = flatten(state["settings"]), flatten(to_dict(settings))
    free = BOOKKEEPING | ({"steps"} if settings.schedule == "constant" else set())
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


def _refuse_if_moved(output_dir: Path) -> None:
    """Raise a ValueError if this run's checkpoints are gone although its log goes further than the first one."""
    try:
        every = yaml.safe_load((output_dir / SETTINGS).read_text(encoding="utf-8"))["checkpoint_every"]
        last = max(json.loads(line)["step"] for line in (output_dir / METRICS).read_text(encoding="utf-8").splitlines())
        is_moved = 0 < every < last
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return  # killed before it wrote a whole line
    if is_moved:
        raise ValueError(
            f"resume=latest: there is no checkpoint in {output_dir}, and its log goes to step {last} with one every {every} "
            "steps: they were moved or removed. Move them back, resume from where one is (resume=PATH), or choose another folder"
        )
