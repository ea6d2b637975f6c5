"""The attention of docs/NUMERICS.md as Triton kernels: what this room offers.

`forward` and `backward` take what reference.py and varlen.py take and return the same, plus what the backward reads. They need an
NVIDIA GPU from sm_80 on (or Triton's interpreter).
"""

from __future__ import annotations

import torch

from qat_kernels.spec import Q_SHIFT, UNEQUAL_HEAD_DIMS, Formats, QuantSpec

from . import operands, tiles
from .backward_launch import backward as backward
from .device import TRITON, arch_of, check_device, on_device, why_no_gluon
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


def remark(
    device: torch.device, head_dim: int, causal: bool, spec: QuantSpec, asked: tuple[str, ...] = (), needs_gradient: bool = False
) -> str:
    """What `explain` adds about the kernels on this GPU: a phrase in brackets, or nothing.

    `asked` as in `dispatch.resolve`.
    """
    arch = arch_of(device)
    version = ".".join(map(str, TRITON))
    slow = f"slower than they could be: Triton {version} spills registers on sm_{arch}, 3.9 does not"
    spills = tiles.entry_of(arch) in tiles.SPILLS.get(TRITON, ())
    if arch != tiles.HOPPER:
        return f" ({slow})" if spills else ""
    kernels = tiles.Tiles._fields if needs_gradient else ("forward",)
    if reason := why_no_gluon():
        return f" (in Triton instead of Gluon: {reason}{f'; {slow}' if spills else ''})"
    of_values = {"softcap", "sinks", UNEQUAL_HEAD_DIMS, Q_SHIFT}
    options = tiles.options_of(
        spec, bounds=not of_values.issuperset(asked), irregular=not {"prefix", "bounds"}.isdisjoint(asked),
        q_shift=Q_SHIFT in asked, softcap="softcap" in asked, sinks="sinks" in asked, with_gradient=needs_gradient,
        unequal_head_dims=UNEQUAL_HEAD_DIMS in asked,
    )  # fmt: skip
    reasons = {kernel: tiles.why_not_hopper(kernel, TRITON, head_dim, causal, options) for kernel in kernels}
    in_gluon = [kernel for kernel, reason in reasons.items() if reason is None]
    parts = [f"in Gluon for sm_90: {', '.join(in_gluon)}"] if in_gluon else []
    parts += [f"{kernel} in Triton: Gluon's, {reason}" for kernel, reason in reasons.items() if reason is not None]
    if spills and len(in_gluon) < len(kernels):
        parts.append(slow)
    return f" ({'; '.join(parts)})"
