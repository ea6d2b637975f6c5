"""The file for K shifts beside the weights of an export: they are not in any state_dict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qat_patch.metadata import AttentionMetadata

from . import integrity
from .trust.file_names import K_SHIFT

_Content = TypeVar("_Content")


def digest(shifts: dict[str, torch.Tensor]) -> str | None:
    """The SHA-256 of the file that `write_k_shift` would write; None if there are no K shifts."""
    return hashlib.sha256(_file(shifts)).hexdigest() if shifts else None


def write_k_shift(folder: Path, shifts: dict[str, torch.Tensor]) -> None:
    """Store K shifts (module name -> float32 [key heads, head dim]) beside the weights; no file if there are none."""
    if shifts:
        (folder / K_SHIFT).write_bytes(_file(shifts))


def _file(shifts: dict[str, torch.Tensor]) -> bytes:
    return save({name: x.detach().cpu().contiguous() for name, x in shifts.items()})


def read_k_shift(file: Path, metadata: AttentionMetadata) -> dict[str, torch.Tensor]:
    """The K shifts that belong to the metadata.

    Raises:
        ValueError: the file is missing, or was not exported with this metadata.
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
    if not shifts:
        raise ValueError(
            f"load_checkpoint: {file} holds no K shift, and the attention metadata says that there are; the export is damaged"
        )
    return shifts


def readable(file: Path, read: Callable[[], _Content]) -> _Content:
    """What `read` finds in a safetensors file. A ValueError names the file if it cannot be read."""
    try:
        return read()
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {file} is no safetensors file ({error}); the export is damaged") from error
