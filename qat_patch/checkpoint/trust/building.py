"""Checks while and after a host library builds a model: bounds, one thread at a time, and no weights left in mapped files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from .headers import integer_tensors, tensor_names, weight_sizes

_ONE_AT_A_TIME = threading.RLock()
# Libraries register a parameter again when they load its weights, sometimes more than once.
_MOST_REGISTRATIONS = 16
_FEW, _FEW_NUMBERS = 10_000, 1 << 24


@contextlib.contextmanager
def building(folders: list[Path]) -> Iterator[None]:
    """Let one thread at a time build a model, with not many more parameters than the folders have tensors.

    Raises:
        ValueError: there are more. A config that asks for millions of them would keep the library busy for hours.
    """
    sizes = [weight_sizes(folder) for folder in folders]
    most = _FEW + _MOST_REGISTRATIONS * sum(tensors for tensors, _ in sizes)
    most_numbers = _FEW_NUMBERS + _MOST_REGISTRATIONS * sum(numbers for _, numbers in sizes)
    thread, count, total = threading.get_ident(), 0, 0

    def registered(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal count, total
        if threading.get_ident() == thread and parameter is not None:
            count, total = count + 1, total + parameter.numel()
        if count > most or total > most_numbers:
            raise ValueError("its config asks for many more or larger parameters than there are weights")

    with _ONE_AT_A_TIME:
        hook = register_module_parameter_registration_hook(registered)
        try:
            yield
        finally:
            hook.remove()


def check_complete(folder: Path, model: torch.nn.Module) -> None:
    """Raise a ValueError unless the weights of a pipeline's component are exactly those of its files.

    The host libraries initialize missing weights at random, with only a warning.
    """
    if getattr(model, "_weight_conversions", None):
        return  # transformers renames these weights while it reads them
    names, state = tensor_names(folder), model.state_dict(keep_vars=True)
    stored = {id(x) for name, x in state.items() if name in names}
    missing = sorted(name for name, x in state.items() if name not in names and id(x) not in stored)
    if missing or not names <= state.keys():
        raise ValueError(
            f"load_checkpoint: the weights in {folder} are not those of its config; missing: {missing[:3]}, extra: "
            f"{sorted(names - state.keys())[:3]}"
        )


def settle(folders: list[Path], model: torch.nn.Module) -> None:
    """Check the types of a model's weights, and move them out of the mapped files.

    There they start at any address, and CPU matrix products round by address; and what is written into the files would change
    the model.

    Raises:
        ValueError: integers are stored for a parameter.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for folder in folders:
        if wrong := sorted(parameters & set(integer_tensors(folder))):
            raise ValueError(f"load_checkpoint: {folder}: expected floating-point numbers for {wrong[0]}, got integers")
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            if x.device.type == "cpu":
                x.data = x.data.clone()


def rename(loaded: Any, private: Path, name: str) -> None:
    """Make a model or pipeline name the folder that the user gave as its source, not the private copy."""

    def public(path: Any) -> str:
        return str(path).replace(str(private), name)

    parts = loaded.modules() if isinstance(loaded, torch.nn.Module) else [loaded, *loaded.components.values()]
    for part in parts:
        config: Any = getattr(part, "config", None)
        for holder in (config, part):
            for attribute in ("_name_or_path", "name_or_path"):
                value = getattr(holder, "__dict__", {}).get(attribute)
                if isinstance(value, str) and str(private) in value:
                    setattr(holder, attribute, public(value))
        register: Any = getattr(part, "register_to_config", None)
        if register is not None and str(private) in str(config.get("_name_or_path")):
            register(_name_or_path=public(config["_name_or_path"]))
