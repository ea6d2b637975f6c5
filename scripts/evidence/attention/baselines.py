"""Attention as others define it, and with ablated gradients, for experiments: what each computes. No product code imports this.

`Baseline()` is the definition of docs/NUMERICS.md; every field changes one thing about it.

Sources: SageAttention3 (arXiv 2505.11594, section 3, and its public preprocessing); Attn-QAT (arXiv 2603.00040, Algorithms 1
to 3) and its public training kernel; docs/NUMERICS.md, sections 5 and 6, for where they differ.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from qat_kernels.spec import P_GLOBAL_SCALE

ValueAxis = Literal["tokens", "head_dim"]
Delta = Literal["twin", "out"]
ValueGradient = Literal["forward", "unquantized", "normalized"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one attention call quantizes, on which grid, and which of its gradients are ablated.

    Raises:
        ValueError: a field has an unknown value, or has no effect because P is not quantized.
    """

    quantize_qk: bool = True
    """Whether Q and K are rounded to NVFP4."""
    quantize_p: bool = True
    """Whether the probabilities are."""
    quantize_v: bool = True
    """Whether V is."""
    rotate: bool = False
    """`QuantSpec.rotate`."""
    four_over_six: bool = False
    """`QuantSpec.four_over_six`."""
    smooth_q: bool = False
    """SageAttention3: subtract from Q the mean of each block of 128 queries before it is quantized, and add the product of
    that mean with the unquantized (smoothed) K to the scores. A last, shorter block has the mean of its own queries."""
    smooth_k: bool = False
    """SageAttention3: subtract from K its mean over the tokens that may be seen. Not causal: later keys move earlier codes."""
    value_axis: ValueAxis = "tokens"
    """The axis of the groups of V."""
    kept_groups: bool = True
    """Causal calls: whether the open and the sink group stay in high precision (docs/NUMERICS.md, section 4)."""
    integer_max: bool = True
    """Whether P~ = 2^(S - m) is taken against the ceiled maximum m; the public kernels take the maximum itself. (Theirs is a
    running one, that of the tiles so far; here it is that of the row.)"""
    p_global_scale: float = P_GLOBAL_SCALE
    """g of P~: 2688 is two-level quantization, 1 the single level of the paper's algorithms."""
    scale_floor: bool = True
    """Whether scales are at least 2^-9. Without, a group whose scale rounds to zero is zero (Q, K, V and P)."""
    delta: Delta = "twin"
    """D = rowsum(dO * O') from the high-precision `twin` O', or from the quantized `out` O."""
    value_gradient: ValueGradient = "forward"
    """dV = X^T dO, where X is the P that the `forward` multiplied V by, the `unquantized` P, or the `normalized` P rounded again
    as the public kernel does: g = 1, no floor of the scales."""

    def __post_init__(self) -> None:
        choices = {"value_axis": ValueAxis, "delta": Delta, "value_gradient": ValueGradient}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                expected = ", ".join(get_args(choice))
                raise ValueError(f"Baseline.{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if not self.p_global_scale > 0:
            raise ValueError(f"Baseline.p_global_scale: expected a positive number, got {self.p_global_scale!r}")
        if not self.quantize_p:
            for name in ("integer_max", "p_global_scale", "delta", "value_gradient"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"Baseline.{name}: has no effect with quantize_p=False; leave it out")


_PUBLIC = {"kept_groups": False, "integer_max": False, "p_global_scale": 1.0, "scale_floor": False}
BASELINES: dict[str, Baseline] = {
    "definition": Baseline(),
    "sage3": Baseline(smooth_q=True, smooth_k=True, kept_groups=False, integer_max=False, scale_floor=False),
    "public_training": Baseline(**_PUBLIC, value_axis="head_dim", value_gradient="normalized"),
    "public_training_exact": Baseline(**_PUBLIC, value_axis="head_dim"),
    "public_serving": Baseline(**_PUBLIC, value_gradient="normalized"),
    "single_level": Baseline(p_global_scale=1.0),
    "single_level_no_floor": Baseline(p_global_scale=1.0, scale_floor=False),
    "v_along_head_dim": Baseline(value_axis="head_dim"),
    "no_kept_groups": Baseline(kept_groups=False),
    "d_from_o": Baseline(delta="out"),
    "p_unquantized_in_dv": Baseline(value_gradient="unquantized"),
    "normalized_p_backward": Baseline(value_gradient="normalized"),
    "p_only": Baseline(quantize_qk=False, quantize_v=False),
    "v_only": Baseline(quantize_qk=False, quantize_p=False),
}
"""By name. `definition` is what the others are compared with, in the same implementation. The next four are what others
publish, forward and backward, one of them with the exact straight-through gradient of its forward; then four that change the
definition's grid; three ablate its gradient; two quantize a part. SageAttention3 has no backward: here it is straight-through,
from the twin."""
