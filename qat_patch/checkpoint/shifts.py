"""The files for K and Q shifts beside the weights of an export: they are not in any state_dict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qat_patch.layer import SHIFTS, Shifts
from qat_patch.metadata import AttentionMetadata

from . import integrity
from .trust.file_names import SHIFT_FILES

_Content = TypeVar("_Content")


def digests(shifts: Shifts) -> dict[str, Any]:
    """The SHA-256 of each file that `write_shifts` would write, by kind; None for a kind without shifts."""
    return {which: hashlib.sha256(_file(found)).hexdigest() if found else None for which, found in shifts.items()}


def write_shifts(folder: Path, shifts: Shifts) -> None:
    """Store shifts beside the weights, each kind in its own file; no file for a kind without shifts."""
    for which, found in shifts.items():
        if found:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SHIFT_FILES[which]).write_bytes(_file(found))


def _file(shifts: dict[str, torch.Tensor]) -> bytes:
    return save({name: x.detach().cpu().contiguous() for name, x in shifts.items()})


def read_shifts(metadata: AttentionMetadata, find: Callable[[str], Path]) -> Shifts:
    """The shifts that belong to the metadata; empty for a kind that has none.

    Args:
        metadata: that of the weights.
        find: gives the file of a name beside the weights.

    Raises:
        ValueError: a file is missing, or was not exported with this metadata.
    """
    none: Shifts = {which: {} for which in SHIFTS}
    return none | {which: _read(find(SHIFT_FILES[which]), metadata, which) for which in metadata.shifts}


def _read(file: Path, metadata: AttentionMetadata, which: str) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(
            f"load_checkpoint: {file} is missing, and the attention metadata says that there are {SHIFTS[which]}s; copy it along "
            "with the weights, or export with export_checkpoint"
        )
    if integrity.sha256(file) != metadata.shifts[which]:
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
            f"load_checkpoint: {file} holds no {SHIFTS[which]}, and the attention metadata says that there are; the export is "
            "damaged"
        )
    return shifts


def readable(file: Path, read: Callable[[], _Content]) -> _Content:
    """What `read` finds in a safetensors file. A ValueError names the file if it cannot be read."""
    try:
        return read()
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {file} is no safetensors file ({error}); the export is damaged") from error
