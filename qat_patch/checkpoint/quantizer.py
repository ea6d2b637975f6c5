"""Our quantizer in transformers: `from_pretrained` of an export gives a patched model, and `save_pretrained` keeps the patch.

Importing this module imports transformers; the package loads it with `register_when_imported`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat_patch.metadata import METHOD, AttentionMetadata
from qat_patch.patch import patch_model

from .shifts import read_shifts


class Saving(NamedTuple):
    """A call of `save_pretrained`."""

    state_dict: Any
    """The state_dict that it was given, or None."""
    write_beside: Callable[[], None]
    """Writes our files beside the weights."""


@register_quantization_config(METHOD)
class QATPatchConfig(QuantizationConfigMixin):
    """The attention metadata as transformers carries it. It is read once, before any weight."""

    def __init__(self, **values: Any) -> None:
        self.metadata = AttentionMetadata.from_dict({"quant_method": METHOD} | values)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        return self.metadata.to_dict()


@register_quantizer(METHOD)
class QATPatchQuantizer(HfQuantizer):
    """Patches the model after its weights, which are ordinary ones, are loaded."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    saving: Saving | None = None
    """Set while the model is saved."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.shapes = {name: x.shape for name, x in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_shapes(model, self.shapes)
        metadata = self.quantization_config.metadata
        shifts = read_shifts(metadata, lambda name: _beside_the_weights(model, name))
        rename = _new_names(model, metadata)
        if rename is not None:
            metadata = self.quantization_config.metadata = metadata.renamed(rename)
            shifts = {which: {rename(name): x for name, x in found.items()} for which, found in shifts.items()}
        metadata.check_patched(patch_model(model, metadata.config, **shifts).specs)
        model.is_quantized = False  # the weights are not quantized: .half() and .float() are fine
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        assert self.saving is not None  # record.py saves by way of this
        self.saving.write_beside()
        return self.saving.state_dict, {METHOD: self.quantization_config.metadata.to_json()}


def _check_shapes(model: Any, expected: dict[str, torch.Size]) -> None:
    """Raise a ValueError if a parameter has another shape than before it was loaded.

    Transformers 5.17 leaves this check to quantizers. A parameter that is split over processes is only partly here.
    """
    for name, x in model.named_parameters() if model._tp_size is None else ():
        if x.shape != expected.get(name, x.shape):
            raise ValueError(
                f"{model.name_or_path}: {name}: expected {list(expected[name])}, as the config says, got {list(x.shape)}; the "
                "weights are not those of the config"
            )


def _new_names(model: Any, metadata: AttentionMetadata) -> Callable[[str], str] | None:
    """How to rename modules if a model is loaded without its head or with another one (`AutoModel` of a language model)."""
    names = {name for name, _ in model.named_modules()}
    if metadata.specs.keys() <= names:
        return None
    prefix = f"{model.base_model_prefix}."
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: name.partition(".")[2],
        lambda name: prefix + name,
        lambda name: prefix + name.partition(".")[2],
    )
    return next((rename for rename in ways if names.issuperset(map(rename, metadata.specs))), None)


def _beside_the_weights(model: Any, name: str) -> Path:
    """A file from the folder or Hub repository that a model was loaded from."""
    config = model.config
    found = cached_file(
        config._name_or_path, name, revision=getattr(config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    return Path(found or Path(config._name_or_path) / name)
