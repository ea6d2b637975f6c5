"""The constants of NVFP4 and the frozen description of what an attention call quantizes (docs/NUMERICS.md, 1, 6 and 9)."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

GROUP_SIZE = 16
"""Consecutive elements that share one E4M3 scale."""
E2M1_MAX = 6.0
"""Largest E2M1 magnitude."""
E4M3_MAX = 448.0
"""Largest finite E4M3 magnitude."""
SCALE_MIN = 2.0**-9
"""Smallest positive E4M3 value: the lower clamp of every scale of `divide`, so that no scale is zero."""
P_GLOBAL_SCALE = E4M3_MAX * E2M1_MAX
"""g of the probabilities: they are at most 1, so 2688 uses the whole range of the E4M3 scale."""
HADAMARD_ENTRY = 0.125
"""Magnitude of the entries of the rotation; a power of two, so that the products are exact."""
ERROR_ONE = 2**28
"""The value of 1 in the fixed-point sums of squared errors of `four_over_six`: 16 errors of at most 1/4 stay below 2^31."""
SMOOTH_BLOCK = 128
"""The number of queries from which SageAttention3 subtracts one mean."""
MAX_HEAD_DIM = 256
"""Head dims are multiples of GROUP_SIZE up to this one."""

FEATURES = ("window", "block_size", "prefix", "bounds", "softcap", "sinks")
"""Arguments of `attention` that change the mask or the softmax. Not every implementation computes them."""
UNEQUAL_HEAD_DIMS = "values of another head dim"
"""V has another head dim than Q and K, as in MLA. Not every implementation computes that either."""

Q_SHIFT = "q_shift"
"""Q is shifted before it is quantized, and a key bias is added to the scores. Not every implementation computes that either."""

Axis = Literal["head_dim", "keys"]
ScaleRule = Literal["divide", "reciprocal"]
InferenceKernel = Literal["fp4", "sageattn3"]
INFERENCE_KERNELS: tuple[InferenceKernel, ...] = get_args(InferenceKernel)
"""Implementations without a gradient, which `auto` takes if a self-check has passed: this package's kernel for FP4 units, and
SageAttention3 if it is installed."""
Preset = Literal[
    "nvfp4", "nvfp4_qk", "kv_nvfp4", "kv_nvfp4_fp8", "kv_nvfp4_4over6", "fa4_fp4", "sage3", "fastvideo_sm120"
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4Format:
    """How one tensor is quantized: E2M1 in groups of 16 that share an E4M3 scale."""

    axis: Axis = "head_dim"
    """The axis of the groups: the head dim, or the key tokens."""
    scale: ScaleRule = "divide"
    """`divide`: x / s, with s at least 2^-9. `reciprocal`: x * RN(1 / s), and a scale of zero gives zeros, as servers do."""
    four_over_six: bool = False
    """Choose amax/6 or amax/4 as the scale of each group, by the smaller squared error."""
    then_e4m3: bool = False
    """Round code * s once more, to E4M3, the input of the matrix units of sm_100."""


class Formats(NamedTuple):
    """What a spec does to each tensor; None: not quantized."""

    query: NVFP4Format | Literal["e4m3"] | None
    key: NVFP4Format
    value: NVFP4Format | None
    probabilities: Literal["two_level", "sage", "sage_one_level"] | None
    """`two_level`: g = 2688. `sage`: the same, but codes use the scale before its rounding. `sage_one_level`: that with g = 1."""
    smooth: Literal["sage3"] | None = None
    """`sage3`: subtract its mean from K, and from Q the mean of each 128 rows; add the part of Q's means back to the scores."""


class _Rules(NamedTuple):
    """A row of the table of presets: the formats, and which calls its servers support."""

    formats: Formats
    what: str
    """A description: what is quantized, and which server does so."""
    options: bool = False
    """Whether `rotate`, `four_over_six`, K shifts and Q shifts are allowed. No server has them."""
    causal: bool = True
    mask: bool = True
    """A key mask, packed sequences, and query heads that share a key head."""
    own_scale: bool = True
    """A scale of the scores other than D ** -0.5, and the log-sum-exp."""
    head_dims: tuple[int, ...] | None = None
    features: tuple[str, ...] = ()
    """The FEATURES that its servers compute."""
    impls: tuple[str, ...] = ("triton", "fp4")
    """The implementations that compute it besides `eager`."""


_DIVIDE = NVFP4Format()
_RECIPROCAL = NVFP4Format(scale="reciprocal")
_RECIPROCAL_KEYS = NVFP4Format(scale="reciprocal", axis="keys")
_RECIPROCAL_E4M3 = NVFP4Format(scale="reciprocal", then_e4m3=True)
_RECIPROCAL_4OVER6 = NVFP4Format(scale="reciprocal", then_e4m3=True, four_over_six=True)
_OF_CACHES = ("window", "softcap")

_TABLE: dict[str, _Rules] = {
    "nvfp4": _Rules(
        Formats(_DIVIDE, _DIVIDE, NVFP4Format(axis="keys"), "two_level"),
        "Q, K, P and V in NVFP4, on this package's own grid",
        options=True,
        features=FEATURES,
    ),
    "nvfp4_qk": _Rules(
        Formats(_DIVIDE, _DIVIDE, None, None),
        "Q and K in NVFP4, on this package's own grid, P and V unquantized",
        options=True,
        features=FEATURES,
    ),
    "kv_nvfp4": _Rules(
        Formats(None, _RECIPROCAL, _RECIPROCAL, None),
        "K and V in NVFP4 along the head dim, as the NVFP4 KV caches of vLLM and SGLang hold them",
        features=_OF_CACHES,
        impls=("sdpa",),
    ),
    "kv_nvfp4_fp8": _Rules(
        Formats("e4m3", _RECIPROCAL_E4M3, _RECIPROCAL_E4M3, None),
        "K and V in NVFP4, then in E4M3 with Q, as vLLM's NVFP4 KV cache is read on sm_100",
        features=_OF_CACHES,
        impls=(),
    ),
    "kv_nvfp4_4over6": _Rules(
        Formats("e4m3", _RECIPROCAL_4OVER6, _RECIPROCAL_4OVER6, None),
        "the same with four-over-six scales, as vLLM's nvfp4_4over6 on sm_100",
        features=_OF_CACHES,
        impls=(),
    ),
    "fa4_fp4": _Rules(
        Formats(_RECIPROCAL, _RECIPROCAL, None, None),
        "Q and K in NVFP4, P and V unquantized, as FlashAttention-4 with FP4 QK^T",
    ),
    "sage3": _Rules(
        Formats(_RECIPROCAL, _RECIPROCAL, _RECIPROCAL_KEYS, "sage", "sage3"),
        "Q, K, P and V in NVFP4, Q and K without their means, as SageAttention3",
        causal=False, mask=False, own_scale=False, head_dims=(64, 128), impls=("triton", "sageattn3"),
    ),
    "fastvideo_sm120": _Rules(
        Formats(_RECIPROCAL, _RECIPROCAL, _RECIPROCAL_KEYS, "sage_one_level"),
        "Q, K, P and V in NVFP4, P with one level of scales, as FastVideo's attn_qat_infer",
        causal=False, mask=False, impls=(),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """What one attention call quantizes: a row of the table of docs/NUMERICS.md, section 9, and two options.

    Train a model on the grid of its server: the preset names it. The default is the definition of docs/NUMERICS.md, sections 1
    to 5. Other combinations do not exist, because no server computes them.

    Raises:
        ValueError: a field has an unknown value, or an option is set with a server's preset, which does not compute it.
    """

    preset: Preset = "nvfp4"
    """Whose grid:

    - `nvfp4`: this package's own. Q, K, V and P in NVFP4, V and P along the key tokens; causal calls keep groups.
    - `nvfp4_qk`: this package's own, with P and V unquantized (FP4 QK^T, BF16 PV).
    - `kv_nvfp4`: an NVFP4 KV cache. K and V along the head dim; Q and P unquantized. vLLM's `--kv-cache-dtype nvfp4` on sm_80,
      sm_90 and sm_120 (equal except for ties; no head dim 64 and no sinks there); SGLang's `nvfp4` and FlashInfer (similar).
    - `kv_nvfp4_fp8`: the same on sm_100, where Q is E4M3 and code * scale is rounded to E4M3. Similar; eager only.
    - `kv_nvfp4_4over6`: vLLM's `nvfp4_4over6` on sm_100: the same with four-over-six scales. Similar; eager only.
    - `fa4_fp4`: FlashAttention-4 with FP4 QK^T on a B200 (FastVideo, xDiT): Q and K in NVFP4, P and V unquantized. Similar.
    - `sage3`: SageAttention3 on RTX 50 and B200, in diffusers and SGLang: all in NVFP4, K and Q without their means. Similar:
      codes of Q, K and V equal except for ties; the scale of P is rounded against the row's maximum, not the running one. Not
      causal, no mask, head dims 64 and 128.
    - `fastvideo_sm120`: FastVideo's `attn_qat_infer` on RTX 50: P with one level of scales. Similar; not causal; eager only.
    """
    rotate: bool = False
    """Multiply Q and K by a Hadamard matrix before quantization. Needs a head dim that is a power of two. No server has it."""
    four_over_six: bool = False
    """Choose amax/6 or amax/4 as the scale of each group of Q, K and V, by the smaller squared error. No server has it."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ValueError(f"QuantSpec.preset: expected one of {', '.join(get_args(Preset))}, got {self.preset!r}")
        for name in ("rotate", "four_over_six"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"QuantSpec.{name}: expected True or False, got {value!r}")
            if value and not self.rules.options:
                raise ValueError(
                    f"QuantSpec.{name}: expected False with preset={self.preset!r}, whose servers do not compute it, got True; "
                    "set it to False, or use preset='nvfp4' or 'nvfp4_qk'"
                )

    @property
    def rules(self) -> _Rules:
        """The row of the table."""
        return _TABLE[self.preset]

    @property
    def inference_kernel(self) -> InferenceKernel | None:
        """The one of `INFERENCE_KERNELS` that computes this spec, or None."""
        for name in INFERENCE_KERNELS:  # a loop, which torch.compile can trace
            if name in self.rules.impls:
                return name
        return None

    @cached_property
    def formats(self) -> Formats:
        """The format of each tensor."""
        formats = self.rules.formats
        if not self.four_over_six:
            return formats
        changed: dict[str, Any] = {
            name: dataclasses.replace(each, four_over_six=True)
            for name, each in formats._asdict().items()
            if isinstance(each, NVFP4Format)
        }
        return formats._replace(**changed)

    @property
    def quantizes_pv(self) -> bool:
        """Whether the probabilities and V along the key tokens are quantized, so that the gradient needs O' besides O."""
        return self.rules.formats.probabilities is not None

    @property
    def kv_only(self) -> bool:
        """Whether only K and V are quantized, so that any attention can compute the rest."""
        formats = self.rules.formats
        return formats.query is None and formats.probabilities is None

    def keeps_groups(self, causal: bool) -> bool:
        """Whether groups are kept (docs/NUMERICS.md, 4): if V is quantized along tokens, some of which are in the future."""
        return causal and self.quantizes_pv

    @property
    def reads_query(self) -> bool:
        """Whether the backward of the kernels reads Q and K themselves, besides their codes."""
        return self.rules.formats.smooth is not None

    def reads_value(self, causal: bool) -> bool:
        """Whether kernels read V itself, so that their backward needs it."""
        return causal or not self.quantizes_pv

    def to_json(self) -> str:
        """One line of JSON with every field; `from_json` is its inverse."""
        # Not json.dumps, which torch.compile cannot trace.
        four_over_six, rotate = str(self.four_over_six).lower(), str(self.rotate).lower()
        return f'{{"four_over_six": {four_over_six}, "preset": "{self.preset}", "rotate": {rotate}}}'

    @staticmethod
    @lru_cache
    def from_json(text: str) -> QuantSpec:
        """The spec that `to_json` wrote."""
        return QuantSpec(**json.loads(text))


NVFP4 = QuantSpec()
"""The default: Q, K, V and P in NVFP4, nothing else."""
