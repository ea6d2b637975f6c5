"""4-bit attention for Diffusers and Transformers that can be trained: `patch_model(model)`, fine-tune, export."""

from qat_kernels import NVFP4, QuantSpec

from ._on_import import register_when_imported
from .calibrate import Limits, calibrate
from .config import AttnQATConfig
from .export import export_checkpoint
from .handle import PatchHandle
from .hub import push_to_hub
from .load import load_checkpoint
from .patch import get_handle, patch_model, unpatch_model
from .sensitivity import SensitivityReport, sensitivity
from .verify import verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "NVFP4",
    "AttnQATConfig",
    "Limits",
    "PatchHandle",
    "QuantSpec",
    "SensitivityReport",
    "calibrate",
    "export_checkpoint",
    "get_handle",
    "load_checkpoint",
    "patch_model",
    "push_to_hub",
    "sensitivity",
    "unpatch_model",
    "verify_checkpoint",
]

register_when_imported()
