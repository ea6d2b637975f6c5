"""Read the state of a checkpoint without running code: tensors and plain values. Anything that does not fit stops the run.

Accelerate writes it and could read it, but it lets some of the files run code, and ignores missing random states.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import torch.distributed.checkpoint as sharded
from accelerate import Accelerator
from accelerate.utils import load as load_plain
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer
from safetensors.torch import load_model
from torch.distributed.checkpoint import metadata as sharded_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import StateDictType

from qat_recipes.memory.optimizers import check_state


class Stateful(Protocol):
    """An object that Accelerate saves besides models and optimizers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


def load(
    accelerator: Accelerator,
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    registered: Sequence[Stateful],
    *,
    left_out: set[str],
) -> dict[str, Any]:
    """Load a checkpoint, except the random states.

    Args:
        accelerator: the run's.
        folder: the checkpoint, whose files have been checked.
        model: as prepared.
        optimizer: as prepared.
        registered: the objects registered for checkpointing, in order.
        left_out: names of weights that are not in checkpoints.

    Returns:
        The random states of this process, for `set_random_states`.

    Raises:
        ValueError: a file is missing, holds more than tensors and plain values, or does not fit this run.
    """

    def attempt(what: str, action: Any, *args: Any) -> Any:
        try:
            return action(*args)
        # Each format fails in its own way; that of shards raises something that is not an Exception.
        except (Exception, CheckpointException) as error:
            # torch's message would advise running the file's code.
            is_code = "weights_only" in str(error)
            reason = "it holds something else than tensors and plain values" if is_code else str(error)
            raise ValueError(
                f"resume: {what} of {folder} cannot be loaded: {reason}. The run cannot continue from it; resume from another "
                "checkpoint, or start again in another output_dir"
            ) from error

    shared = accelerator.num_processes > 1 and accelerator.device.type == "cuda"
    where = accelerator.device if shared else torch.device("cpu")
    if accelerator.is_fsdp2:
        attempt("the sharded state", _load_sharded, accelerator, folder, model, optimizer)
    else:
        attempt("model.safetensors", _load_weights, folder / "model.safetensors", model, where, left_out)
        attempt("optimizer.bin", _load_optimizer, folder / "optimizer.bin", optimizer, where)
    found = len(list(folder.glob("custom_checkpoint_*.pkl")))
    if found != len(registered):
        raise ValueError(f"resume: expected {len(registered)} files custom_checkpoint_*.pkl in {folder}, got {found}")
    for index, one in enumerate(registered):
        name = f"custom_checkpoint_{index}.pkl"
        attempt(f"{name} ({type(one).__name__})", _load_registered, folder / name, one)
    name = f"random_states_{accelerator.process_index}.pkl"
    states = attempt(name, _random_states, folder / name)
    accelerator.step = states["step"]
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the random states."""
    random.setstate(states["random_state"])
    numpy.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])


def _load_weights(file: Path, model: torch.nn.Module, device: torch.device, left_out: set[str]) -> None:
    missing, unexpected = load_model(model, file, strict=False, device=str(device))
    if wrong := sorted({*missing} - left_out) + sorted(unexpected):
        raise ValueError(f"{len(wrong)} weights are in one of the model and the file only, {wrong[0]} for one")


def _load_optimizer(file: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    state = load_plain(file, map_location=device, weights_only=True)
    check_state(optimizer, state)
    optimizer.load_state_dict(state)


def _load_registered(file: Path, one: Stateful) -> None:
    found, now = load_plain(file, map_location="cpu", weights_only=True), one.state_dict()
    # A schedule accepts anything as its attributes, so compare the types. Mean keys do not exist before they are loaded.
    if now and not _is_alike(found, now):
        raise ValueError(f"expected {', '.join(sorted(now))}, of the types and shapes that they have here")
    one.load_state_dict(found)


def _is_alike(found: Any, now: Any) -> bool:
    if type(found) is not type(now):
        return False
    if isinstance(now, torch.Tensor):
        return found.shape == now.shape and found.dtype == now.dtype
    if isinstance(now, dict):
        return found.keys() == now.keys() and all(_is_alike(found[key], now[key]) for key in now)
    if isinstance(now, list | tuple):
        return len(found) == len(now) and all(map(_is_alike, found, now))
    return True


def _random_states(file: Path) -> dict[str, Any]:
    """The random states in the file, after trying each."""
    states = load_plain(file, map_location="cpu", weights_only=True)
    expected = {"step", "random_state", "numpy_random_seed", "torch_manual_seed"}
    expected |= {"torch_cuda_manual_seed"} if torch.cuda.is_available() else set()
    if {*states} != expected:
        raise ValueError(f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(map(str, states)))}")
    if not isinstance(states["step"], int):
        raise ValueError(f"expected a number of batches as step, got {states['step']!r}")
    random.Random().setstate(states["random_state"])
    numpy.random.RandomState().set_state(states["numpy_random_seed"])
    torch.Generator().set_state(states["torch_manual_seed"])
    if torch.cuda.is_available():
        found, count = len(states["torch_cuda_manual_seed"]), torch.cuda.device_count()
        if found != count:
            raise ValueError(f"expected the states of {count} GPUs, got those of {found}; show as many (CUDA_VISIBLE_DEVICES)")
        for number, state in enumerate(states["torch_cuda_manual_seed"]):
            torch.Generator(f"cuda:{number}").set_state(state)
    return states


# What FSDP writes ---------------------------------------------------------------------------------------------------------


def _load_sharded(accelerator: Accelerator, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        # One file. Accelerate reads it as plain values.
        load_fsdp_model(plugin, accelerator, model, folder)
        load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
        return
    options = StateDictOptions(cpu_offload=getattr(plugin.state_dict_config, "offload_to_cpu", False))
    weights = {"model": get_model_state_dict(model, options=options)}
    sharded.load(weights, storage_reader=_PlainReader(folder / "pytorch_model_fsdp_0"), planner=_PlainPlanner())
    set_model_state_dict(model, weights["model"], options=options)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    sharded.load(state, storage_reader=_PlainReader(folder / "optimizer_0"), planner=_PlainPlanner())
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles the descriptions of shards, and nothing else."""

    CLASSES = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                (sharded_metadata.__name__, name)
                for name in (
                    "_MEM_FORMAT_ENCODING",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # Python 3.11.0 to 3.11.3 write a member of an enumeration so
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no shards")
        return super().find_class(module, name)


def _memory_format(of: Any, name: str) -> Any:
    """The one attribute that a description of shards may ask for."""
    if of is not sharded_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for {name} of {of!r}, which describes no shards")
    return of[name]


class _PlainReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        for where in metadata.storage_data.values():
            if Path(where.relative_path).name != where.relative_path or where.transform_descriptors:
                raise ValueError(f"expected shards as plain files in {self.path}, got {where}")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        # torch's planner unpickles anything, so it gets only what was read as plain values.
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
