"""One call of attention as the kernels see it: sizes, options, and where codes lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from qat_kernels.mask import Mask
from qat_kernels.reference import LOG2_E, scale_of_quantized
from qat_kernels.spec import GROUP_SIZE, QuantSpec
from qat_kernels.varlen import Packing

from .layout import PAD
from .operands import Codes, Sequences


class PackedSizes(NamedTuple):
    """What is known of packed sequences without reading `cu_seqlens`."""

    documents: int
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, packing: Packing | None) -> PackedSizes | None:
        """Those of packed sequences, if they are packed."""
        return packing and cls(packing.cu_seqlens_q.shape[0] - 1, packing.max_seqlen_q, packing.max_seqlen_k)


def is_empty(query: torch.Size, key: torch.Size, packed: PackedSizes | None) -> bool:
    """Whether there is nothing to compute."""
    return 0 in (query[1], *((query[0], query[2], key[2]) if packed is None else packed))


class Problem(NamedTuple):
    """One call's sizes and options; what forward and backward have in common."""

    query: Sequences
    key: Sequences
    head_dim: int
    head_dim_v: int
    spec: QuantSpec
    mask: Mask
    scale: float
    """As the caller gave it."""
    softcap: float | None = None
    key_bias: bool = False
    """Whether Q is shifted, so that the scores of the operands get a number for each key."""

    @classmethod
    def of(
        cls,
        query: torch.Size,
        value: torch.Size,
        packed: PackedSizes | None,
        *,
        spec: QuantSpec,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        key_bias: bool = False,
    ) -> Problem:
        """From the shapes of Q, [B, H, Lq, D] or [total, H, D] of packed sequences, and V, which has the head dim Dv."""
        lead = PAD - GROUP_SIZE if spec.keeps_groups(mask.hides_keys) else 0
        if packed is None:
            (batch, num_heads, seqlen_q, _), (_, num_heads_k, seqlen_k, _) = query, value
            sides = (
                Sequences(batch, num_heads, seqlen_q, seqlen_q),
                Sequences(batch, num_heads_k, seqlen_k, seqlen_k, lead=lead),
            )
        else:
            (total_q, num_heads, _), (total_k, num_heads_k, _) = query, value
            documents, max_seqlen_q, max_seqlen_k = packed
            sides = (
                Sequences(documents, num_heads, max_seqlen_q, total_q, True),
                Sequences(documents, num_heads_k, max_seqlen_k, total_k, True, lead),
            )
        return cls(*sides, query[-1], value[-1], spec, mask, scale, softcap, key_bias)

    @property
    def causal(self) -> bool:
        """Whether a query may not see the last key."""
        return self.mask.hides_keys

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
        """Columns of the operands of Q and K: the head dim, padded to a power of two."""
        return triton.next_power_of_2(self.head_dim)

    @property
    def block_dv(self) -> int:
        """The same for V and dO."""
        return triton.next_power_of_2(self.head_dim_v)

    @property
    def constants(self) -> dict[str, Any]:
        """What attention kernels are compiled for; each takes those that it has."""
        mask = self.mask
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_DV": self.block_dv,
            "LEAD": self.key.lead,
            "CAUSAL": self.causal,
            "VARLEN": self.query.packed,
            "QUANTIZE_PV": self.spec.quantizes_pv,
            "ROTATE": self.spec.rotate,
            "KEY_BIAS": self.key_bias,
            "SAGE": self.spec.formats.smooth is not None,
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
            shapes += Codes.shapes(self.key, self.head_dim_v, along_tokens=True)
        return shapes

    def code_sizes(self) -> list[int]:
        """How many bytes each of them takes."""
        return [rows * columns for rows, columns in self.code_shapes()]

    def key_bias_size(self) -> int:
        """How many bytes the key bias takes, which lies behind the codes: float32 for each slot."""
        return 4 * self.key.all_rows if self.key_bias else 0
