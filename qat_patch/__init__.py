"""4-bit attention for Diffusers and Transformers that can be trained: `patch_model(model)`, fine-tune, export."""

from qat_kernels import NVFP4, QuantSpec
from qat_patch.checkpoint.export import export_checkpoint
from qat_patch.checkpoint.hub import push_to_hub
from qat_patch.checkpoint.load import load_checkpoint
from qat_patch.checkpoint.registration import register_when_imported
from qat_patch.checkpoint.verify import verify_checkpoint
from qat_patch.linear.config import LinearQATConfig
from qat_patch.linear.handle import LinearHandle, get_linear_handle, quantize_linears, unquantize_linears
from qat_patch.measure.calibrate import Limits, calibrate
from qat_patch.measure.sensitivity import SensitivityReport, sensitivity

from .config import AttnQATConfig
from .handle import PatchHandle
from .patch import get_handle, patch_model, unpatch_model
from .version import __version__

__all__ = [
    "NVFP4",
    "AttnQATConfig",
    "Limits",
    "LinearHandle",
    "LinearQATConfig",
    "PatchHandle",
    "QuantSpec",
    "SensitivityReport",
    "__version__",
    "calibrate",
    "export_checkpoint",
    "get_handle",
    "get_linear_handle",
    "load_checkpoint",
    "patch_model",
    "push_to_hub",
    "quantize_linears",
    "sensitivity",
    "unpatch_model",
    "unquantize_linears",
    "verify_checkpoint",
]

register_when_imported()
