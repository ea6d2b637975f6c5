"""What the tests of model families share."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from qat_patch import AttnQATConfig, patch_model
from qat_patch.handle import PatchHandle


class Family(NamedTuple):
    """A kind of model as users meet it. A row of docs/MODELS.md."""

    name: str
    make: Callable[[], torch.nn.Module]
    """Builds a tiny one; the seed is set before."""
    inputs: Callable[[], dict[str, Any]] | None = None
    calls: int = 0
    """Calls of attention in a forward pass, as the architecture implies."""
    skipped: int = 0
    """Attention modules that cannot be patched."""
    mask: str = "none"
    """What it hands to attention: none, bool or additive."""
    config: AttnQATConfig = AttnQATConfig()
    """What one has to set for this family."""
    no_k_shift: tuple[str, ...] = ()
    """Patterns of modules that no K shift fits: they attend to several sets of keys in one call, or have a soft cap or sinks."""
    refused: str | None = None
    """Part of the message that refuses the whole family."""
    refused_modes: Mapping[str, str] = MappingProxyType({})
    """By mode: part of the message."""
    not_applicable: tuple[str, ...] = ()
    """Modes that this family does not have."""

    def build(self, dtype=torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        model = lively(self.make()).eval()
        return model if dtype == torch.float32 else model.to(dtype)

    def patched(self, dtype=torch.float32) -> torch.nn.Module:
        model = self.build(dtype)
        patch_model(model, self.config)
        return model

    def check_shifts(self, handle: PatchHandle) -> None:
        """`calibrate` gave every module a Q shift, and a K shift where one fits."""
        without = {name for name in handle.patched if any(fnmatchcase(name, pattern) for pattern in self.no_k_shift)}
        assert handle.q_shift.keys() == handle.patched.keys()
        assert handle.k_shift.keys() == handle.patched.keys() - without


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """As initialized, attention is next to uniform, gates are zero and outputs next to nothing: no error of it would show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
