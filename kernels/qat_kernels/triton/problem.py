"""One call of attention as the kernels see it: sizes, options, and where codes lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from qat_kernels.mask import Mask
from qat_kernels.reference import LOG2_E, scale_of_quantized
from qat_kernels.spec import GROUP_SIZE, NVFP4Format, QuantSpec
from qat_kernels.varlen import Packing

from .layout import PAD
from .operands import Codes, Sequences


class Problem(NamedTuple):
    """One call's sizes and options; what forward and backward have in common."""

    query: Sequences
    key: Sequences
    head_dim: int
    spec: QuantSpec
    mask: Mask
    scale: float
    """As the caller gave it."""
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        query: torch.Size,
        key: torch.Size,
        packing: Packing | None,
        *,
        spec: QuantSpec,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
    ) -> Problem:
        """From the shapes [B, H, L, D], or [total, H, D] of packed sequences."""
        lead = PAD - GROUP_SIZE if spec.keeps_groups(mask.hides_keys) else 0
        if packing is None:
            (batch, num_heads, seqlen_q, head_dim), (_, num_heads_k, seqlen_k, _) = query, key
            sides = (
                Sequences(batch, num_heads, seqlen_q, seqlen_q),
                Sequences(batch, num_heads_k, seqlen_k, seqlen_k, lead=lead),
            )
        else:
            (total_q, num_heads, head_dim), (total_k, num_heads_k, _) = query, key
            batch = packing.cu_seqlens_q.shape[0] - 1
            sides = (
                Sequences(batch, num_heads, packing.max_seqlen_q, total_q, packing.cu_seqlens_q),
                Sequences(batch, num_heads_k, packing.max_seqlen_k, total_k, packing.cu_seqlens_k, lead),
            )
        return cls(*sides, head_dim, spec, mask, scale, softcap)

    @property
    def causal(self) -> bool:
        """Whether a query may not see the last key."""
        return self.mask.hides_keys

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.query.batch * self.query.num_heads * self.query.max_seqlen * self.key.max_seqlen)

    @staticmethod
    def rounding(how: NVFP4Format | str | None) -> dict[str, Any]:
        """The options of `quantize_rows` and `quantize_tokens` for a tensor of this format."""
        if not isinstance(how, NVFP4Format):
            return {}
        return {"four_over_six": how.four_over_six, "reciprocal": how.scale == "reciprocal"}

    @property
    def softmax_scale(self) -> float:
        """Of the scores of the quantized Q and K; its sign is in the operand of Q."""
        return scale_of_quantized(abs(self.scale), self.head_dim, self.spec)

    @property
    def softmax_scale_log2(self) -> float:
        """The same for base 2."""
        return self.softmax_scale * LOG2_E

    @property
    def block_d(self) -> int:
        """Columns of an operand: the head dim, padded to a power of two."""
        return triton.next_power_of_2(self.head_dim)

    @property
    def constants(self) -> dict[str, Any]:
        """What all attention kernels are compiled for."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "LEAD": self.key.lead,
            "CAUSAL": self.causal,
            "VARLEN": self.query.cu_seqlens is not None,
            "enable_fp_fusion": True,
        }

    @property
    def variants(self) -> list[str]:
        """What tiles may depend on besides (tiles.py)."""
        has = {"bounds": not self.mask.is_plain, "softcap": self.softcap is not None}
        return [name for name, yes in has.items() if yes]

    @property
    def options(self) -> dict[str, Any]:
        """What the training kernels are compiled for besides (scores.py)."""
        mask = self.mask
        return {
            "MASKED": not mask.is_plain,
            "WINDOW": mask.window or 0,
            "BLOCK_SIZE": mask.block_size,
            "PREFIX": mask.prefix,
            "BOUNDED": mask.bounded,
            "SOFTCAP": self.softcap or 0.0,
        }

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """`num_heads`, `num_heads_k`, `seqlen_q` and `seqlen_k` of a kernel."""
        return self.query.num_heads, self.key.num_heads, self.query.max_seqlen, self.key.max_seqlen

    def code_shapes(self) -> list[tuple[int, int]]:
        """Of codes and scales of Q, K and, unless V itself is kept, V."""
        shapes = [
            *Codes.shapes(self.query, self.head_dim, along_tokens=False),
            *Codes.shapes(self.key, self.head_dim, along_tokens=False),
        ]
        if not self.spec.reads_value(self.causal):
            shapes += Codes.shapes(self.key, self.head_dim, along_tokens=True)
        return shapes

    def code_bytes(self) -> int:
        """How much memory they take."""
        return sum(rows * columns for rows, columns in self.code_shapes())

    def codes_in(self, codes: torch.Tensor) -> tuple[Codes, Codes, Codes | None]:
        """Views of Q, K and, unless V itself is kept, V."""
        shapes = self.code_shapes()
        views = [x.view(shape) for x, shape in zip(codes.split([a * b for a, b in shapes]), shapes, strict=True)]
        return Codes(*views[:2]), Codes(*views[2:4]), Codes(*views[4:]) if len(views) > 4 else None
