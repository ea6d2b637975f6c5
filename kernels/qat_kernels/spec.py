"""The constants of NVFP4 and the frozen description of what an attention call quantizes (docs/NUMERICS.md, 1 and 6)."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Literal, get_args

GROUP_SIZE = 16
"""Consecutive elements that share one E4M3 scale."""
E2M1_MAX = 6.0
"""Largest E2M1 magnitude."""
E4M3_MAX = 448.0
"""Largest finite E4M3 magnitude."""
SCALE_MIN = 2.0**-9
"""Smallest positive E4M3 value: the lower clamp of every scale, so that no scale is zero."""
P_GLOBAL_SCALE = E4M3_MAX * E2M1_MAX
"""g of the probabilities: they are at most 1, so 2688 uses the whole range of the E4M3 scale."""
HADAMARD_ENTRY = 0.125
"""Magnitude of the entries of the rotation; a power of two, so that the products are exact."""
ERROR_ONE = 2**28
"""What 1 is in the fixed point in which `four_over_six` adds squared errors of at most 1/4: 16 of them stay below 2^31."""
MAX_HEAD_DIM = 256
"""Head dims are multiples of GROUP_SIZE up to this one."""

PVFormat = Literal["nvfp4", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """What one attention call quantizes. The default is the definition of docs/NUMERICS.md, sections 1 to 5.

    Raises:
        ValueError: a field has a value that the definition does not know.
    """

    pv: PVFormat = "nvfp4"
    """Format of the probabilities and of V: `nvfp4`, or `bf16` to leave both unquantized (FP4 QK^T, BF16 PV)."""
    rotate: bool = False
    """Multiply Q and K by a Hadamard matrix before quantization. Needs a head dim that is a power of two."""
    four_over_six: bool = False
    """For each group of Q, K and V choose between amax/6 and amax/4 as scale, by the smaller squared error."""

    def __post_init__(self) -> None:
        if self.pv not in get_args(PVFormat):
            raise ValueError(f"QuantSpec.pv: expected one of {', '.join(get_args(PVFormat))}, got {self.pv!r}")
        for name in ("rotate", "four_over_six"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"QuantSpec.{name}: expected True or False, got {getattr(self, name)!r}")

    def to_json(self) -> str:
        """One line of JSON with every field; `from_json` is its inverse."""
        # Written out because torch.compile can trace this and cannot trace json.dumps.
        four_over_six, rotate = str(self.four_over_six).lower(), str(self.rotate).lower()
        return f'{{"four_over_six": {four_over_six}, "pv": "{self.pv}", "rotate": {rotate}}}'

    @staticmethod
    @lru_cache
    def from_json(text: str) -> QuantSpec:
        """The spec that `to_json` wrote."""
        return QuantSpec(**json.loads(text))


def reads_value(spec: QuantSpec, causal: bool) -> bool:
    """Whether kernels read V as it is, so that their backward needs it: with BF16 PV, and where groups are kept."""
    return causal or spec.pv == "bf16"


NVFP4 = QuantSpec()
"""The default: Q, K, V and P in NVFP4, nothing else."""
