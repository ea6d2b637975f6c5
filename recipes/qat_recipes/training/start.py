"""How a run starts: how it was launched, and where it goes on from. What does not fit is refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch.distributed.fsdp import MixedPrecisionPolicy

from qat_recipes.command_line import flatten, to_dict

from . import checkpoints
from .settings import TrainingSettings

BOOKKEEPING = frozenset({"output_dir", "resume", "checkpoint_every", "keep_checkpoints", "report_to", "max_skipped_steps"})
"""Where and how often a run is saved, and when it gives up: free to differ when it goes on."""


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """Accelerate as the settings want it.

    Raises:
        ValueError: `accelerate launch` asks for something else, or for what this loop cannot do.
    """
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


def starting_point(settings: TrainingSettings, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, and the state stored in it. Only reads.

    Raises:
        ValueError: output_dir holds another run, or the checkpoint is damaged or does not fit.
    """
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
