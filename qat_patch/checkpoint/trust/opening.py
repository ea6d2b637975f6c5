"""Exports are opened only here: checked, in a private copy, with ValueErrors that are safe to print."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..manifest import ExportFolder, read_folder
from . import allowed_keys, download, file_names
from .headers import check_tensors, weight_sizes
from .plain_json import parse_json
from .private_copy import PrivateCopy, private_copy


@contextlib.contextmanager
def opened(folder: str | Path, revision: str | None = None) -> Iterator[ExportFolder]:
    """Open an export: everything but the values of its weights is checked, and a private copy is used.

    Args:
        folder: what `export_checkpoint` wrote, or its name on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: the folder is not an export, has another format version, is incomplete, changed or damaged; its parts do
            not belong together; it could run code; or it changed while it was open.
    """
    with contextlib.ExitStack() as stack:
        with said_plainly(str(folder)):
            copy = stack.enter_context(private_copy(download.export_folder(folder, revision)))
        with said_plainly(str(folder), copy.folder):
            export = read_folder(copy, str(folder))
        yield export
        with said_plainly(str(folder), copy.folder):
            copy.check_unchanged()


@contextlib.contextmanager
def said_plainly(name: str, private: Path | None = None) -> Iterator[None]:
    """Turn every error about an export into a ValueError that names the user's folder and is safe to print."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = str(error) if private is None else str(error).replace(str(private), name)
        if not isinstance(error, ValueError):
            text = f"load_checkpoint: {name}: {type(error).__name__}: {text}; the export is damaged, or libraries do not fit it"
        raise ValueError(printable(text)) from _cause(error)


@contextlib.contextmanager
def base_model(export: ExportFolder) -> Iterator[Path]:
    """A private copy of the base model that adapters name: its safetensors, and a config that runs no code.

    Raises:
        ValueError: the model does not exist, or its config could run code.
    """
    assert export.base_model is not None  # the manifest of adapters names it
    name = export.base_model
    folder = download.base_folder(name, export.host(""))
    with private_copy(folder, wanted=file_names.of_a_base_model) as copy:
        try:
            _take_base(copy)
            yield copy.folder
            copy.check_unchanged()
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy.folder), name)) from error


def _take_base(copy: PrivateCopy) -> None:
    copy.take([name for name in copy.files if file_names.is_weights(name) or name.endswith(".index.json")])
    beside = file_names.SHIFT_FILES.values()
    weights = [name for name in copy.files if file_names.is_weights(name) and name.rpartition("/")[2] not in beside]
    if not weights:
        raise ValueError(
            f"load_checkpoint: expected a base model with a config and safetensors weights in {copy.source}, and found none; "
            "save it there with save_pretrained, or export the adapters again with the right base_model"
        )
    for name in weights:
        check_tensors(copy.folder / name)
    sizes = weight_sizes(copy.folder)
    for name in copy.files:
        file = name.rpartition("/")[2]
        if file not in ("config.json", "generation_config.json"):
            continue
        where = str(copy.source / name)
        config = allowed_keys.plain_config(where, file, parse_json(where, copy.read(name)))
        allowed_keys.check_sizes(where, file, config, *sizes)
        copy.put(name, json.dumps(config).encode())


def printable(text: str) -> str:
    """Text from a file, with terminal control codes escaped."""
    return "".join(x if x.isprintable() or x in "\n\t" else ascii(x)[1:-1] for x in text)


def _cause(error: BaseException) -> BaseException | None:
    """The error of a host library, to show as the cause; None if one in its chain holds terminal control codes."""
    first = cause = error.__cause__ if isinstance(error, ValueError) else error
    while cause is not None:
        if printable(str(cause)) != str(cause):
            return None
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return first
