"""Our entry among transformers' quantizers: `from_pretrained` on an export gives a patched model, `save_pretrained` keeps it.

Importing this module imports transformers; `register_when_imported` is how the package brings it in.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .block import METHOD, AttentionBlock
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
        block.check_modules(list(patch_model(model, block.config).patched))
        model.is_quantized = False  # the weights are not: .half() and .float() are fine
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: torch.nn.Module) -> tuple[None, dict[str, str]]:
        return None, {METHOD: AttentionBlock.from_dict(self.quantization_config.to_dict()).to_json()}
