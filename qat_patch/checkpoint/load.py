"""Load an export and patch it as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qat_patch.linear.handle import quantize_linears
from qat_patch.linear.packed import LinearRecord, restore_packed, unpacked_state
from qat_patch.metadata import CONFIG_KEYS, LOADING_ADAPTERS
from qat_patch.patch import get_handle, patch_model, require_handle, unpatch_model

from .adapters import LORA_FILE, load_adapter
from .manifest import ExportFolder
from .trust.building import building, check_complete, rename, settle
from .trust.file_names import MANIFEST, holds_tokenizer
from .trust.headers import weight_files
from .trust.opening import base_model, opened, said_plainly
from .trust.plain_json import read_json
from .weights import as_dtype, set_stored_types, stored_dtype

COMPONENT = "qat_patch_component"
"""Key in the headers of weights: the component of the pipeline that they belong to."""


def load_checkpoint(
    folder: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> Any:
    """Load an export and patch it as it was.

    The hashes of all files are checked first, and the checked bytes are loaded. Nothing is unpickled, and no code in the folder
    is run; SECURITY.md lists the promises. Only one thread loads at a time.

    Args:
        folder: what `export_checkpoint` wrote, or its name on the Hub.
        revision: branch, tag or commit on the Hub; default: main.
        dtype: dtype of the weights; default: as exported.
        device: device to move the model to.

    Returns:
        The patched Transformers model, Diffusers transformer or Diffusers pipeline, in evaluation mode; for an export of
        adapters alone, the base model with these adapters. `get_handle` returns the receipt.

    Raises:
        ValueError: the folder is not an export of this package, has another format version, is incomplete, changed or
            damaged, could run code, or the host library cannot load it.
    """
    dtype = dtype if dtype == "auto" else as_dtype(dtype, "load_checkpoint") or "auto"
    with opened(folder, revision) as export, said_plainly(export.name, export.folder):
        model = load_pipeline(export, dtype) if export.kind == "pipeline" else load_part(export, "", dtype)
    return model if device is None else model.to(device)


def load_tokenizer(folder: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of an exported language model, loaded with the checks of `load_checkpoint`.

    Raises:
        ValueError: as for `load_checkpoint`, or the export has no tokenizer.
    """
    from transformers import AutoTokenizer

    with opened(folder, revision) as export, said_plainly(export.name, export.folder):
        check_tokenizer(export.folder, "export it again with export_checkpoint(..., tokenizer=...)")
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = _hosted("transformers", [export.folder], lambda: AutoTokenizer.from_pretrained(export.folder, **options))
        tokenizer.name_or_path = export.name
    return tokenizer


def check_tokenizer(folder: str | Path, remedy: str = "put it there with tokenizer.save_pretrained(...)") -> None:
    """Raise a ValueError if a folder holds no language model, or one without a tokenizer.

    Transformers would build one with an empty vocabulary from the model's config, or complain that sentencepiece is missing.
    """
    names = os.listdir(folder)
    if not {"config.json", "adapter_config.json", MANIFEST}.intersection(names):
        raise ValueError(f"{folder}: expected the folder of a language model, got no config.json there")
    if not holds_tokenizer(names):
        raise ValueError(f"{folder}: expected the tokenizer of the language model in this folder, got none; {remedy}")


def load_part(export: ExportFolder, part: str, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """One patched model of an export, by subfolder, on the CPU."""
    host, folder = export.host(part), export.folder / part
    if export.kind == "adapters":
        with base_model(export) as base:
            model = _hosted(host, [folder, base], lambda: _adapters(export, part, base, dtype))
            return _finished(export, part, model, [folder, base])
    load = {"transformers": _model, "diffusers": _transformer}[host]
    return _finished(export, part, _hosted(host, [folder], lambda: load(export, part, dtype)), [folder])


def component_of(folder: Path) -> str | None:
    """The component of a pipeline that a transformer is, or that its adapters are for, if the export says so.

    Raises:
        ValueError: pipelines have no such component.
    """
    with safe_open(weight_files(folder)[0], framework="pt") as weights:
        found = (weights.metadata() or {}).get(COMPONENT)
    if found not in (None, *LOADING_ADAPTERS):
        raise ValueError(f"load_checkpoint: {folder}: expected a component {' or '.join(LOADING_ADAPTERS)}, got {found!r}")
    return found


def load_pipeline(export: ExportFolder, dtype: torch.dtype | str = "auto") -> Any:
    """A whole pipeline, patched as it was exported, on the CPU."""
    from diffusers import DiffusionPipeline

    folders = [folder for folder in sorted(export.folder.iterdir()) if folder.is_dir() and weight_files(folder)]
    dtypes: Any = dtype
    if dtype == "auto":
        dtypes = {"default": torch.float32} | {folder.name: stored_dtype(folder) for folder in folders}
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    # Diffusers expects an argument for each component that was left out.
    index = read_json(export.folder / "model_index.json")
    options |= {name: None for name, value in index.items() if value == [None, None]}
    load = DiffusionPipeline.from_pretrained
    pipeline = _hosted("diffusers", folders, lambda: load(export.folder, dtype=dtypes, **options))
    rename(pipeline, export.folder, export.name)
    for folder in folders:
        component = getattr(pipeline, folder.name, None)
        if not isinstance(component, torch.nn.Module):
            raise ValueError(
                f"load_checkpoint: {folder} holds weights, and model_index.json no model of that name; the export is damaged"
            )
        rename(component, export.folder, export.name)
        check_complete(folder, component)
        if dtype == "auto":
            set_stored_types(folder, component)
        settle([folder], component)
    for part in export.metadata:
        model = getattr(pipeline, part)
        _check_names(export.folder / part, model)
        _patch(export, part, model)
        export.metadata[part].check_patched(require_handle(model).specs)
    return pipeline


def _class_in(config: dict[str, Any]) -> Any:
    """The class of transformers that a config names."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"architectures: expected one class of models of transformers, got {names!r}")
    return found


def _model(export: ExportFolder, part: str, dtype: torch.dtype | str) -> torch.nn.Module:
    folder = export.folder / part
    # Our quantizer patches the model, except in an export for a server.
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    config = read_json(folder / "config.json")
    model_class = _class_in(config)
    if (expected := getattr(model_class.config_class, "model_type", None)) != config.get("model_type"):
        raise ValueError(
            f"model_type: expected {expected!r}, which is that of {model_class.__name__}, got {config.get('model_type')!r}"
        )
    source: Path | None = folder
    type_of_weights = dtype
    if export.linear is not None:
        source, type_of_weights = None, stored_dtype(folder) if dtype == "auto" else dtype
        options |= _unpacked(folder, export.linear, model_class.config_class, config)
    model, info = model_class.from_pretrained(source, dtype=type_of_weights, output_loading_info=True, **options)
    # Transformers initializes missing weights at random.
    if wrong := {what: sorted(map(str, names)) for what, names in info.items() if names}:
        raise ValueError(f"the weights are not those of the config: {wrong}")
    if dtype == "auto":
        set_stored_types(folder, model)
    if export.linear is not None:
        restore_packed(model, export.linear)
    if export.is_beside:
        _patch(export, part, model)
    return model.eval()


def _unpacked(folder: Path, linear: LinearRecord, config_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of from_pretrained for a folder with packed weights, which become ordinary weights on the 4-bit grid."""
    from transformers import GenerationConfig

    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        state |= load_file(file)
    plain = {key: value for key, value in config.items() if key != CONFIG_KEYS["transformers"]}
    found = {"config": config_class.from_dict(plain), "state_dict": unpacked_state(state, linear)}
    if (folder / "generation_config.json").is_file():
        found["generation_config"] = GenerationConfig.from_pretrained(folder)
    return found


def _transformer(export: ExportFolder, part: str, dtype: torch.dtype | str) -> torch.nn.Module:
    from diffusers import AutoModel

    folder = export.folder / part
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    # Diffusers has no "auto"; by default it loads float32.
    model = AutoModel.from_pretrained(str(folder), dtype=stored_dtype(folder) if dtype == "auto" else dtype, **options)
    _check_names(folder, model)
    if dtype == "auto":
        set_stored_types(folder, model)
    _patch(export, part, model)
    return model.eval()


def _adapters(export: ExportFolder, part: str, base: Path, dtype: torch.dtype | str) -> torch.nn.Module:
    common = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    if export.host(part) == "transformers":
        from peft import PeftModel

        model = _base_class(export).from_pretrained(base, dtype=dtype, **common)
        rename(model, base, str(export.base_model))
        if get_handle(model) is not None:
            # The base is an export itself and comes patched; this export's patch replaces it.
            unpatch_model(model)
        _patch(export, part, model)
        if export.linear is not None:
            quantize_linears(model, export.linear.config, scales=export.linear.scales)
        model = PeftModel.from_pretrained(model, export.folder)
    else:
        from diffusers import AutoModel

        subfolder = {} if (base / "config.json").is_file() else {"subfolder": component_of(export.folder) or "transformer"}
        options = common | ({} if dtype == "auto" else {"dtype": dtype})
        model = AutoModel.from_pretrained(str(base), **subfolder, **options)
        rename(model, base, str(export.base_model))
        _patch(export, part, model)
        load_adapter(model, export.folder / LORA_FILE)
    return model.eval()


def _base_class(export: ExportFolder) -> Any:
    """The model class that PEFT adapters belong to: the one that PEFT names, or that of the task that PEFT names."""
    import transformers

    config = read_json(export.folder / "adapter_config.json")
    if mapping := config.get("auto_mapping"):
        return _class_in({"architectures": [mapping.get("base_model_class")]})
    by_task = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
        "FEATURE_EXTRACTION": transformers.AutoModel,
    }
    return by_task.get(str(config.get("task_type")), transformers.AutoModelForCausalLM)


def _patch(export: ExportFolder, part: str, model: torch.nn.Module) -> None:
    patch_model(model, export.metadata[part].config, **export.shifts(part))


def _finished(export: ExportFolder, part: str, model: torch.nn.Module, folders: list[Path]) -> torch.nn.Module:
    """Check that a model was patched as the metadata says, and `settle` it."""
    export.metadata[part].check_patched(require_handle(model).specs)
    rename(model, export.folder / part, export.name)
    settle(folders, model)
    return model


def _hosted(host: str, folders: list[Path], load: Any) -> Any:
    """Call a host library so that its errors name the folder. One thread at a time: loading changes globals of torch."""
    try:
        with building(folders):
            return load()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"load_checkpoint: {host} cannot load {folders[0]}: {error or type(error).__name__}; config and weights do not "
            f"belong together, or this version of {host} does not know the model"
        ) from error


def _check_names(folder: Path, model: torch.nn.Module) -> None:
    """Raise a ValueError unless the weights have the names of the model's weights."""
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
