"""Our entry among transformers' quantizers: `from_pretrained` on an export gives a patched model, `save_pretrained` keeps it.

Importing this module imports transformers; `register_when_imported` is how the package brings it in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .block import METHOD, AttentionBlock
from .k_shift import K_SHIFT, read_k_shift
from .patch import patch_model


@register_quantization_config(METHOD)
class QATPatchConfig(QuantizationConfigMixin):
    """The attention block as transformers carries it: the keys of the block are its attributes."""

    def __init__(self, **block: Any) -> None:
        AttentionBlock.from_dict({"quant_method": METHOD} | block)  # refuse a bad block before any weight is read
        self.__dict__.update(block)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class QATPatchQuantizer(HfQuantizer):
    """Patches the model once its weights, which are ordinary ones, are loaded."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        block = AttentionBlock.from_dict(self.quantization_config.to_dict())
        shifts = {} if block.k_shift is None else read_k_shift(_beside_the_weights(model, K_SHIFT), block)
        block.check_handle(patch_model(model, block.config, k_shift=shifts))
        model.is_quantized = False  # the weights are not: .half() and .float() are fine
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: torch.nn.Module) -> tuple[None, dict[str, str]]:
        block = AttentionBlock.from_dict(self.quantization_config.to_dict())
        if block.k_shift is not None:
            raise ValueError("save_pretrained: it would leave the K shifts of this model behind; use qat_patch.export_checkpoint")
        return None, {METHOD: block.to_json()}


def _beside_the_weights(model: torch.nn.Module, name: str) -> Path:
    """A file of the folder, or of the repository on the Hub, that a model was loaded from."""
    config = model.config
    found = cached_file(
        config._name_or_path, name, revision=getattr(config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    return Path(found or Path(config._name_or_path) / name)
