"""Our entry among transformers' quantizers: `from_pretrained` on an export gives a patched model, `save_pretrained` keeps it.

Importing this module imports transformers; `register_when_imported` is how the package brings it in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat_patch.metadata import METHOD, AttentionMetadata
from qat_patch.patch import patch_model

from .k_shift import K_SHIFT, read_k_shift


@register_quantization_config(METHOD)
class QATPatchConfig(QuantizationConfigMixin):
    """The attention metadata as transformers carries it; read once, before any weight is."""

    def __init__(self, **values: Any) -> None:
        self.metadata = AttentionMetadata.from_dict({"quant_method": METHOD} | values)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return self.metadata.to_dict()


@register_quantizer(METHOD)
class QATPatchQuantizer(HfQuantizer):
    """Patches the model once its weights, which are ordinary ones, are loaded."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        metadata = self.quantization_config.metadata
        shifts = {} if metadata.k_shift is None else read_k_shift(_beside_the_weights(model, K_SHIFT), metadata)
        metadata.check_patched(patch_model(model, metadata.config, k_shift=shifts).specs)
        model.is_quantized = False  # the weights are not: .half() and .float() are fine
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        metadata = self.quantization_config.metadata
        if metadata.k_shift is not None:
            raise ValueError("save_pretrained: it would leave the K shifts of this model behind; use qat_patch.export_checkpoint")
        return None, {METHOD: metadata.to_json()}


def _beside_the_weights(model: Any, name: str) -> Path:
    """A file of the folder, or of the repository on the Hub, that a model was loaded from."""
    config = model.config
    found = cached_file(
        config._name_or_path, name, revision=getattr(config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    return Path(found or Path(config._name_or_path) / name)
