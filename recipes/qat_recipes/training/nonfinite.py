"""For steps that are not finite: save their batches, and say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import checkpoints


def save_batches(output_dir: Path, step: int, batches: list[Any], values: dict[str, float], process: int) -> Path:
    """Store the batches of a step as output_dir/nonfinite/step-STEP-process-PROCESS.safetensors.

    Tensors are named by the number of the batch and their name in it, such as 0.input_ids; the header has the measured values.
    """
    file = output_dir / "nonfinite" / f"step-{step}-process-{process}.safetensors"
    file.parent.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        items = batch.items() if isinstance(batch, dict) else enumerate(batch)
        tensors |= {f"{number}.{name}": x.detach().cpu().contiguous() for name, x in items if isinstance(x, torch.Tensor)}
    save_file(tensors, file, metadata={"step": str(step), "values": json.dumps(values)})
    return file


def advice(output_dir: Path, step: int, values: dict[str, float], saved: Path, limit: int) -> str:
    """The message of a run that stops because losses or gradients are not finite."""
    good = checkpoints.newest_complete(output_dir)
    go_on = f"The newest complete checkpoint is {good}" if good else "There is no checkpoint"
    return (
        f"step {step}: {values}: not finite, and max_skipped_steps is {limit}. The step changed no weights; its batches are in "
        f"{saved}. {go_on}. Lower learning_rate, raise warmup_steps, look at the batches, or allow more skipped steps"
    )
