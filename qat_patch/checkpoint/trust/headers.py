"""The weight files of a folder, with checked headers and index."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qat_patch.metadata import METHOD

from ..shifts import readable
from .adapter_keys import refused_in_adapters
from .file_names import REFERENCE, SHIFT_FILES, check_plain
from .plain_json import parse_json, read_json

_BESIDE = {*SHIFT_FILES.values(), REFERENCE}
_ADAPTER_METADATA = "lora_adapter_metadata"
"""The header key of adapter weights in which diffusers keeps their config."""
_PREFIX = "transformer."
"""The prefix of the config's keys, if the file is one that a pipeline reads."""
_FLOATS, _INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32", "I16", "I8", "U8", "BOOL")
_TENSOR_NAME = re.compile(r"[\w.:-]{1,512}", re.ASCII)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, without those that this package puts beside them."""
    return sorted(file for file in folder.glob("*.safetensors") if file.name not in _BESIDE)


def check_weights(folder: Path, metadata: dict[str, Any] | None) -> None:
    """Check the headers of the weights in a folder, and their index.

    Raises:
        ValueError: there are no weights; a model cannot have such a name or type; the headers do not hold the expected
            metadata; or the index is wrong.
    """
    weights = weight_files(folder)
    if not weights:
        raise ValueError(f"load_checkpoint: there are no safetensors weights in {folder}; the export is incomplete")
    place: dict[str, str] = {}
    for file in weights:
        header, names = check_tensors(file)
        if header != metadata:
            raise ValueError(
                f"load_checkpoint: the attention metadata in {file.name} differs from the one in the config of {folder}; the "
                "files come from different exports, or one was edited"
            )
        if twice := sorted(place.keys() & names):
            raise ValueError(f"load_checkpoint: {folder}: {twice[0]} is in {place[twice[0]]} and in {file.name}; expected one")
        place |= dict.fromkeys(names, file.name)
    indices = sorted(folder.glob("*.index.json"))
    if len(weights) > 1 and len(indices) != 1:
        raise ValueError(
            f"load_checkpoint: {folder} holds {len(weights)} files of weights and {len(indices)} indices; expected one"
        )
    for file in indices:
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"load_checkpoint: {file}: weight_map: expected a mapping, got {weight_map!r}; the export is damaged"
            )
        for name in weight_map.values():
            check_plain(str(file), name)
        if weight_map != place:
            wrong = sorted(name for name in {*weight_map, *place} if weight_map.get(name) != place.get(name))
            raise ValueError(
                f"load_checkpoint: {file}: says that {wrong[0]!r} is in {weight_map.get(wrong[0])}, and it is in "
                f"{place.get(wrong[0])}; the export is damaged"
            )


def check_tensors(file: Path) -> tuple[Any, list[str]]:
    """The attention metadata in the header of a safetensors file, and the names of its tensors.

    Raises:
        ValueError: it is not a safetensors file; a model cannot have such a name or type; or the header holds an adapter
            config that could run code.
    """
    header, types = readable(file, functools.partial(_read_header, file))
    for name, dtype in types.items():
        is_known = dtype in _FLOATS + _INTEGERS or (dtype == "F8_E4M3" and name.endswith(".weight_scale"))
        if not _TENSOR_NAME.fullmatch(name) or not is_known:
            raise ValueError(
                f"load_checkpoint: {file}: expected tensors with the names of parameters, floats or integers, got {name!r} of "
                f"{dtype}; the export is damaged, or hostile"
            )
    if _ADAPTER_METADATA in header:
        where = f"{file}: {_ADAPTER_METADATA}"
        stored = parse_json(where, header[_ADAPTER_METADATA].encode())
        for key in refused_in_adapters(where, {key.removeprefix(_PREFIX): value for key, value in stored.items()}):
            raise ValueError(f"load_checkpoint: {where} sets {key!r}, which could run code, and no export does")
    try:
        metadata = json.loads(header.get(METHOD, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {file}: the attention metadata in its header are not JSON ({error})") from error
    return metadata, list(types)


def weight_sizes(folder: Path) -> tuple[int, int]:
    """The number of tensors, and of numbers in them, in the weights of a folder and its subfolders."""
    tensors = numbers = 0
    for file in folder.rglob("*.safetensors"):
        if file.name not in _BESIDE:
            with safe_open(file, framework="pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in set(weights.keys())]
            tensors, numbers = tensors + len(shapes), numbers + sum(map(math.prod, shapes))
    return tensors, numbers


def tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in the weights of a folder."""
    return {name for file in sorted(folder.rglob("*.safetensors")) if file.name not in _BESIDE for name in _read_header(file)[1]}


def integer_tensors(folder: Path) -> list[str]:
    """The names of the tensors in the weights of a folder that are not floating-point."""
    types = [_read_header(file)[1] for file in weight_files(folder)]
    return [name for each in types for name, dtype in each.items() if dtype in _INTEGERS]


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        return weights.metadata() or {}, {name: weights.get_slice(name).get_dtype() for name in names}
