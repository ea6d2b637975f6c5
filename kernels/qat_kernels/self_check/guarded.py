"""Memory for outputs in which a kernel cannot hide what it leaves out, or writes where nothing is its own."""

from __future__ import annotations

import torch

from qat_kernels.fp4.launch import Outputs, new_outputs
from qat_kernels.varlen import Packing

BAND, SENTINEL = 1 << 16, -7.0
"""Elements on both sides of an output, and what they hold."""


class Guarded:
    """In place of `launch.new_outputs`, for one call: outputs full of NaN, between bands that hold a known value."""

    def __init__(self) -> None:
        self._outputs: dict[str, torch.Tensor] = {}
        self._whole: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, packing: Packing | None) -> Outputs:
        """O and LSE in the shapes and strides that they always have."""
        out, lse = (self._guarded(x, query.device) for x in new_outputs(query.to("meta"), packing))
        self._outputs = {"O": out, "the log-sum-exp": lse}
        return out, lse

    def _guarded(self, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        whole = torch.full((like.numel() + 2 * BAND,), torch.nan, dtype=like.dtype, device=device)
        whole[:BAND] = whole[-BAND:] = SENTINEL
        self._whole.append(whole)
        return whole.as_strided(like.shape, like.stride(), BAND)

    def problem(self) -> str | None:
        """What a kernel did wrong to this memory, or None."""
        for (name, output), whole in zip(self._outputs.items(), self._whole, strict=True):
            if not bool((whole[:BAND] == SENTINEL).all() and (whole[-BAND:] == SENTINEL).all()):
                return f"it wrote beside {name}"
            inside = whole[BAND : BAND + output.numel()]
            if any(bool(part.isnan().any()) for part in inside.split(1 << 26)):
                return f"it left or computed NaN in {name}"
        return None
