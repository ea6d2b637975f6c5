"""Load an export and patch it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qat_patch.patch import get_handle, patch_model, require_handle, unpatch_model

from .manifest import ExportFolder, read_folder, weight_files

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors spells them."""


def load_checkpoint(folder: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device | None = None) -> Any:
    """Load an export and patch it as it was.

    All files are compared with their hashes first. Nothing is unpickled, and no code in the folder is run.

    Args:
        folder: what `export_checkpoint` wrote.
        dtype: of the weights; default: as exported.
        device: where to move the model.

    Returns:
        What was exported, patched: a Transformers model, a Diffusers transformer or a Diffusers pipeline, in evaluation
        mode; of an export of adapters alone the base model with these adapters. `get_handle` has the receipt.

    Raises:
        ValueError: the folder is no export of this package, of another format version, incomplete, changed or damaged, or
            the host library cannot load what is in it.
    """
    export = read_folder(folder)
    model = _load_pipeline(export, dtype) if export.kind == "pipeline" else load_part(export, "", dtype)
    return model if device is None else model.to(device)


def load_part(export: ExportFolder, part: str, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """One patched model of an export, by subfolder, on the CPU."""
    host = export.host(part)
    load = _adapters if export.kind == "adapters" else {"transformers": _causal_lm, "diffusers": _transformer}[host]
    return _finished(export, part, _hosted(host, export.folder / part, lambda: load(export, part, dtype)))


def _load_pipeline(export: ExportFolder, dtype: torch.dtype | str) -> Any:
    from diffusers import DiffusionPipeline

    dtypes: Any = dtype
    if dtype == "auto":
        folders = {file.parent for file in export.folder.glob("*/*.safetensors")}
        dtypes = {"default": torch.float32} | {folder.name: _stored_dtype(folder) for folder in sorted(folders)}
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    load = DiffusionPipeline.from_pretrained
    pipeline = _hosted("diffusers", export.folder, lambda: load(export.folder, dtype=dtypes, **options))
    for part in export.metadata:
        model = getattr(pipeline, part)
        _check_names(export.folder / part, model)
        _patch(export, part, model)
        _finished(export, part, model)
    return pipeline


def _causal_lm(export: ExportFolder, part: str, dtype: torch.dtype | str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    # Our quantizer patches it.
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(export.folder / part, dtype=dtype, **options)
    # Transformers makes up what is missing.
    if wrong := {what: sorted(map(str, names)) for what, names in info.items() if names}:
        raise ValueError(f"the weights are not those of the config: {wrong}")
    return model.eval()


def _transformer(export: ExportFolder, part: str, dtype: torch.dtype | str) -> torch.nn.Module:
    from diffusers import AutoModel

    folder = export.folder / part
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    # Diffusers has no "auto"; without the argument it loads float32.
    model = AutoModel.from_pretrained(str(folder), dtype=_stored_dtype(folder) if dtype == "auto" else dtype, **options)
    _check_names(folder, model)
    _patch(export, part, model)
    return model.eval()


def _adapters(export: ExportFolder, part: str, dtype: torch.dtype | str) -> torch.nn.Module:
    assert export.base_model is not None  # the manifest of adapters names it
    base = export.base_model
    if export.host(part) == "transformers":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        if get_handle(model) is not None:
            # The base is an export itself: patched as that one says, where this one counts.
            unpatch_model(model)
        _patch(export, part, model)
        model = PeftModel.from_pretrained(model, export.folder)
    else:
        from diffusers import AutoModel

        subfolder = {} if (Path(base) / "config.json").is_file() else {"subfolder": "transformer"}
        options = {"use_safetensors": True, "trust_remote_code": False} | ({} if dtype == "auto" else {"dtype": dtype})
        model = AutoModel.from_pretrained(base, **subfolder, **options)
        _patch(export, part, model)
        model.load_lora_adapter(str(export.folder), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    return model.eval()


def _patch(export: ExportFolder, part: str, model: torch.nn.Module) -> None:
    patch_model(model, export.metadata[part].config, k_shift=export.k_shift(part))


def _finished(export: ExportFolder, part: str, model: torch.nn.Module) -> torch.nn.Module:
    """Check that it was patched as the metadata says, and move weights out of the mapped file.

    There they start at any address, and CPU matrix products round by address.
    """
    export.metadata[part].check_patched(require_handle(model).specs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return model


def _hosted(host: str, folder: Path, load: Any) -> Any:
    """Whatever goes wrong inside a host library names the folder."""
    try:
        return load()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"load_checkpoint: {host} cannot load {folder}: {error or type(error).__name__}; config and weights do not belong "
            f"together, or this version of {host} does not know the model"
        ) from error


def _check_names(folder: Path, model: torch.nn.Module) -> None:
    """Raise a ValueError unless the weights have the names of the model's."""
    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            names |= set(weights.keys())
    expected = model.state_dict().keys()
    if names != expected:
        missing, extra = sorted(expected - names), sorted(names - expected)
        raise ValueError(
            f"load_checkpoint: the weights in {folder} are not those of its config; missing: {missing[:3]}, extra: {extra[:3]}"
        )


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type of the weights in a folder, where a model may keep some of them in float32."""
    types: set[torch.dtype] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            types |= {FLOATS.get(weights.get_slice(name).get_dtype(), torch.float32) for name in set(weights.keys())}
    narrow = types - {torch.float32}
    return narrow.pop() if len(narrow) == 1 else torch.float32
