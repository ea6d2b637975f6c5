"""The record that `save_pretrained` of a host library writes about a patched model: the attention in force.

A Transformers config holds it as `quantization_config`, a Diffusers config under our own key, and shifts are in files beside
the weights. If `quantization_config` belongs to another quantizer, or only adapters are saved, the record is `qat_patch.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qat_patch.hosts.transformers.adapter import named_original
from qat_patch.layer import Shifts
from qat_patch.linear.handle import get_linear_handle
from qat_patch.metadata import CONFIG_KEYS, METHOD, NOTICE, NOTICE_KEY, RECORD, AttentionMetadata, config_entries
from qat_patch.patch import get_handle
from qat_patch.servers import AUTO_CONFIG, SERVERS, SERVING
from qat_patch.version import __version__

from .shifts import digests, write_shifts
from .trust.file_names import MANIFEST, REFERENCE, REFERENCE_FOR_SERVERS, SHIFT_FILES
from .trust.plain_json import read_json

_log = logging.getLogger(__name__)


def attention_in_force(model: torch.nn.Module) -> tuple[AttentionMetadata, Shifts] | None:
    """The attention that a patched model runs, and its shifts, by module names in `model`; None if nothing is patched."""
    handle = get_handle(model)
    if handle is None:
        return None
    (plan,) = handle.plans.values()
    kept = [layer.name for layer in plan.patched if plan.replaced(layer) is None]
    if not kept:
        return None
    shifts = {which: {name: x for name, x in found.items() if name in kept} for which, found in handle.shifts.items()}
    specs = {name: handle.specs[name] for name in kept}
    metadata = AttentionMetadata(config=handle.config, specs=specs, **digests(shifts), package_version=__version__)
    prefix = next(name for name, module in model.named_modules() if module is plan.model)
    if not prefix and len(kept) == len(plan.patched):
        return metadata, shifts
    # `model` is a part of the patched model, or contains it.
    names = {name: f"{prefix}.{name}".removeprefix(".") for name in kept}
    shifts = {which: {names[name]: x for name, x in found.items()} for which, found in shifts.items()}
    return dataclasses.replace(metadata.renamed(lambda name: names[name]), **digests(shifts)), shifts


def record_in_transformers(module: Any) -> None:
    """Let `PreTrainedModel` save the attention in force, and log it when a loaded model has a record that it does not read."""
    model_class = module.PreTrainedModel
    save, load = model_class.save_pretrained, model_class.from_pretrained.__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _call(save, self, *args, **kwargs)
        folder, found = _destination(call), attention_in_force(self)
        if get_linear_handle(self) is not None and call["state_dict"] is None:
            _log.warning(
                "save_pretrained writes the weights of quantized linear layers unrounded, and nothing about them: call "
                "quantize_linears after loading; export_checkpoint packs them"
            )
        if found is not None and _is_free(self):
            found = _in_any_order(found[0]), found[1]
            with _as_quantizer(self, *found, folder, call["state_dict"]):
                return save(self, *args, **kwargs)
        _write_beside(folder, found)
        return save(self, *args, **kwargs)

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        # Auto classes put the argument into the config.
        asked = kwargs.get("attn_implementation") or getattr(kwargs.get("config"), "_attn_implementation", None)
        if (original := named_original(asked)) is not None:
            kwargs["attn_implementation"] = original
        result = load(cls, name, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if original is not None and get_handle(model) is None:
            raise ValueError(
                f"from_pretrained: attn_implementation={asked!r} is the name that patch_model gives to what a model runs after "
                f"the patch, and {name} was saved without one: load it with attn_implementation={original!r}, and call "
                "patch_model. DPOTrainer and GRPOTrainer of TRL load their reference model like the one that they train: make "
                "the trainer first, and patch then: patch_model(trainer.model), and patch_model(trainer.ref_model) for 4-bit "
                "attention in both"
            )
        if name is not None and not _is_free(model):
            _announce(model, name, kwargs.get("revision"))
        if name is not None:
            _remember(model, _folder_with_manifest(name, kwargs), "")
        return result

    model_class.save_pretrained = save_pretrained
    model_class.from_pretrained = classmethod(from_pretrained)


def record_in_peft(module: Any) -> None:
    """The same for `PeftModel`, which saves only adapters."""
    model_class = module.PeftModel
    save, load = model_class.save_pretrained, model_class.from_pretrained.__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        # By the names in the model that the adapters are for.
        _write_beside(_destination(_call(save, self, *args, **kwargs)), attention_in_force(self.get_base_model()))
        return save(self, *args, **kwargs)

    @functools.wraps(load)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(cls, model, model_id, *args, **kwargs)
        _announce(result.get_base_model(), model_id, kwargs.get("revision"))
        return result

    model_class.save_pretrained = save_pretrained
    model_class.from_pretrained = classmethod(from_pretrained)


def record_in_diffusers(module: Any) -> None:
    """Let `ModelMixin` save the attention in force. Diffusers does not patch when it loads: `patch_model` finds the record."""
    # The notice is for users without this package.
    logging.getLogger("diffusers.configuration_utils").addFilter(_is_more_than_our_notice)
    model_class = module.ModelMixin
    save, load = model_class.save_pretrained, model_class.from_pretrained.__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder, found = _destination(_call(save, self, *args, **kwargs)), attention_in_force(self)
        _remove_what_stands_there(folder)
        if found is None:
            return save(self, *args, **kwargs)
        metadata, shifts = found
        if folder is not None:
            write_shifts(folder, shifts)
        before = self._internal_dict
        try:
            self.register_to_config(**config_entries("diffusers", _in_any_order(metadata)))
            return save(self, *args, **kwargs)
        finally:
            self._internal_dict = before

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        result = load(cls, pretrained_model_name_or_path, **kwargs)
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            model = result[0] if isinstance(result, tuple) else result
            _remember(model, folder, "")
            _remember(model, folder.parent, folder.name)
        return result

    model_class.save_pretrained = save_pretrained
    model_class.from_pretrained = classmethod(from_pretrained)


def _is_more_than_our_notice(record: logging.LogRecord) -> bool:
    """False for the log line in which Diffusers says only that it does not know our notice."""
    return not record.getMessage().startswith(f"The config attributes { {NOTICE_KEY: NOTICE} } were passed to ")


def _in_any_order(metadata: AttentionMetadata) -> AttentionMetadata:
    """The same with sorted patterns, if their order does not matter: host libraries sort the entries of a config."""
    overrides = list(metadata.config.overrides)
    return metadata if overrides == sorted(overrides) else metadata.renamed(lambda name: name)


def _call(save: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, by name."""
    call = inspect.signature(save).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def _destination(call: dict[str, Any]) -> Path | None:
    """The folder that a call saves to; None in a process that writes nothing."""
    return Path(call["save_directory"]) if call["is_main_process"] else None


def _remove_what_stands_there(folder: Path | None) -> None:
    """Remove our files about weights that are now overwritten."""
    if folder is not None:
        for name in (*SHIFT_FILES.values(), MANIFEST, REFERENCE, REFERENCE_FOR_SERVERS, SERVING, AUTO_CONFIG):
            (folder / name).unlink(missing_ok=True)


def _write_beside(folder: Path | None, found: tuple[AttentionMetadata, Shifts] | None) -> None:
    """Write the record to its own file, if the config has no place for it."""
    _remove_what_stands_there(folder)
    if folder is None or found is None:
        return
    metadata, shifts = found
    folder.mkdir(parents=True, exist_ok=True)
    write_shifts(folder, shifts)
    (folder / MANIFEST).write_text(json.dumps(metadata.to_dict(), indent=2) + "\n", encoding="utf-8")


def _is_free(model: Any) -> bool:
    """Whether the config is saved, and its `quantization_config` belongs to no other quantizer."""
    quantizer = getattr(model, "hf_quantizer", None)
    ours = quantizer is None or quantizer.quantization_config.quant_method == METHOD
    return ours and not getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def _as_quantizer(
    model: Any, metadata: AttentionMetadata, shifts: Shifts, folder: Path | None, state_dict: Any
) -> Iterator[None]:
    """Inside, the model saves this metadata as that of its quantizer."""
    from .quantizer import QATPatchConfig, QATPatchQuantizer, Saving

    def write_beside() -> None:
        _remove_what_stands_there(folder)
        if folder is not None:
            write_shifts(folder, shifts)

    config = QATPatchConfig(**metadata.to_dict())
    quantizer = QATPatchQuantizer(config)
    quantizer.saving = Saving(state_dict, write_beside)
    key = CONFIG_KEYS["transformers"]
    before = [(model, "hf_quantizer", model.__dict__.get("hf_quantizer")), (model.config, key, model.config.__dict__.get(key))]
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _folder_with_manifest(name: Any, kwargs: dict[str, Any]) -> Path | None:
    """The folder with our files beside a model's weights; for a name on the Hub, its folder in the cache."""
    from transformers.utils.hub import cached_file

    if Path(name).is_dir():
        return Path(name)
    options = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if kwargs.get(key) is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(name), MANIFEST, **options, **quiet)
    return None if file is None else Path(file).parent


def _remember(model: Any, folder: Path | None, part: str) -> None:
    """Keep for `patch_model` the attention that an export for a server expects: its configs do not name it."""
    if folder is None or not (file := folder / MANIFEST).is_file():
        return
    try:
        record = read_json(file)
        is_beside = record.get("server") in [*SERVERS] or record.get("linear") is not None
        attention = record.get("attention") if is_beside else None
        values = attention.get(part) if isinstance(attention, dict) else None
        if AttentionMetadata.is_ours(values):
            setattr(model, RECORD, AttentionMetadata.from_dict(values))
    except ValueError as error:  # only a warning: the user asked for the weights, and these are loaded
        _log.warning("%s cannot be read (%s): patch_model will not know which attention this model was trained for", file, error)


def _announce(model: Any, source: Any, revision: Any) -> None:
    """Log that a model runs original attention although it was saved with 4-bit; keep the record for `patch_model`."""
    from transformers.utils.hub import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(source), MANIFEST, revision=revision, **options) if get_handle(model) is None else None
    record = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else None
    if AttentionMetadata.is_ours(record):
        setattr(model, RECORD, AttentionMetadata.from_dict(record))
        _log.warning(
            "%s was saved with 4-bit attention and runs original attention; qat_patch.patch_model(model) switches it on", source
        )
