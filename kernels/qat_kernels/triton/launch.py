"""The attention of docs/NUMERICS.md as Triton kernels: what this room offers.

`forward` and `backward` take what reference.py and varlen.py take and return the same, plus what the backward reads. They need an
NVIDIA GPU from sm_80 on (or Triton's interpreter).
"""

from __future__ import annotations

import torch

from qat_kernels.spec import Formats

from . import operands, tiles
from .backward_launch import backward as backward
from .device import TRITON, arch_of, check_device, on_device
from .forward_launch import Forward as Forward
from .forward_launch import forward as forward
from .forward_launch import output_shapes as output_shapes


def fake_quantize_kv(
    key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, formats: Formats
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V fake-quantized, for attention that quantizes nothing else (`operands.fake_quantize_kv`).

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(key.device)
    with on_device(key.device):
        return operands.fake_quantize_kv(key, value, key_mask, formats)


def remark(device: torch.device) -> str:
    """What `explain` adds about the installed Triton on this GPU: a phrase in brackets, or nothing."""
    arch = arch_of(device)
    if tiles.entry_of(arch) not in tiles.SPILLS.get(TRITON, ()):
        return ""
    return f" (slower than they could be: Triton {'.'.join(map(str, TRITON))} spills registers on sm_{arch}, 3.8 does not)"
