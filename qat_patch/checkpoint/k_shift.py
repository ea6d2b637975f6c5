"""K shifts beside the weights of an export, in a file of their own: no state_dict has a key for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qat_patch.metadata import AttentionMetadata

from . import integrity

K_SHIFT = "qat_patch_k_shift.safetensors"
"""A float32 tensor [key heads, head dim] for each module that has a K shift, by its name."""
_Content = TypeVar("_Content")


def write_k_shift(folder: Path, shifts: dict[str, torch.Tensor]) -> str | None:
    """Store K shifts (module name -> float32 [key heads, head dim]) beside the weights; returns the SHA-256 of the file."""
    if not shifts:
        return None
    save_file({name: x.detach().cpu().contiguous() for name, x in shifts.items()}, folder / K_SHIFT)
    return integrity.sha256(folder / K_SHIFT)


def read_k_shift(file: Path, metadata: AttentionMetadata) -> dict[str, torch.Tensor]:
    """The K shifts that belong to the metadata.

    Raises:
        ValueError: the file is missing, or not the one that was exported with the metadata.
    """
    if not file.is_file():
        raise ValueError(
            f"load_checkpoint: {file} is missing, and the attention metadata says that there are K shifts; copy it along with "
            "the weights, or export with export_checkpoint"
        )
    if integrity.sha256(file) != metadata.k_shift:
        raise ValueError(
            f"load_checkpoint: {file} is not the one that the attention metadata names; the files come from different exports"
        )
    shifts = readable(file, lambda: load_file(file))
    for name, x in shifts.items():
        if name not in metadata.specs or x.dtype != torch.float32 or x.dim() != 2 or not x.isfinite().all():
            raise ValueError(
                f"load_checkpoint: {file}: expected finite float32 tensors [key heads, head dim] by module name, got "
                f"{name} {x.dtype} {list(x.shape)}"
            )
    return shifts


def readable(file: Path, read: Callable[[], _Content]) -> _Content:
    """What `read` finds in a safetensors file, or a ValueError that names the file."""
    try:
        return read()
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {file} is no safetensors file ({error}); the export is damaged") from error
