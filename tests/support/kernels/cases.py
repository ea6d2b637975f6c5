"""Attention problems for the tests: seeded shapes, masks and tensors, and the measures of error."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from qat_kernels import QuantSpec, attention
from qat_kernels.mask import Mask
from support.kernels import oracle

LENGTHS = (1, 15, 16, 17, 33, 48, 90, 150)
HEAD_DIMS = (16, 32, 48, 64, 80, 128, 256)
HEADS = ((1, 1), (2, 2), (4, 2), (3, 1), (6, 3))
MASKS = (None, "holes", "left", "right", "empty row")
SPECS = (
    {},
    {"causal": True, "heads": (2, 2)},
    {"preset": "nvfp4_qk", "causal": True},
    {"causal": True, "rotate": True, "four_over_six": True, "shift": True},
    {"heads": (3, 1), "mask": "holes"},
    {"causal": True, "mask": "left", "shift": True},
)
"""Fields of a `Case` that together switch everything on, for tests of a property that always holds."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem; `tensors` and `options` build it, the same every time."""

    lq: int = 33
    lk: int = 33
    head_dim: int = 32
    head_dim_v: int | None = None
    """None: the same."""
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    causal: bool = False
    mask: str | None = None
    preset: str = "nvfp4"
    rotate: bool = False
    four_over_six: bool = False
    shift: bool = False
    q_shifted: bool = False
    scale: float | None = None
    size: float = 1.0
    window: int | None = None
    block_size: int = 1
    prefix: int = 0
    bounds: str | None = None
    softcap: float | None = None
    sinks: bool = False
    coarse: bool = False
    """Inputs in multiples of 1/8: then rotations and sums of squared errors are exact in float32, in any order."""
    seed: int = 0

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case, name) and name != "seed"}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"

    def tensors(self, dtype: torch.dtype = torch.float64, *, requires_grad: bool = False) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        heads, key_heads = self.heads
        dims = (self.head_dim, self.head_dim_v or self.head_dim)
        shapes = [(heads, self.lq, 0), (key_heads, self.lk, 0), (key_heads, self.lk, 1), (heads, self.lq, 1)]
        tensors = []
        for n, length, of_value in shapes:
            x = torch.randn(self.batch, n, length, dims[of_value], dtype=torch.float64, generator=generator)
            x = ((x * 8).round() / 8 if self.coarse else x) * self.size
            tensors.append(x.to(dtype))
        return [x.requires_grad_(requires_grad) for x in tensors[:3]] + tensors[3:]

    def key_mask(self) -> torch.Tensor | None:
        if self.mask is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        mask = torch.ones(self.batch, self.lk, dtype=torch.bool)
        if self.mask in ("holes", "empty row"):
            mask = torch.rand(self.batch, self.lk, generator=generator) < 0.7
        for row in range(self.batch):
            pad = int(torch.randint(0, self.lk // 2 + 1, (), generator=generator))
            if self.mask == "left":
                mask[row, :pad] = False
            elif self.mask == "right":
                mask[row, self.lk - pad :] = False
        if self.mask == "empty row":
            mask[-1] = False
        return mask

    def k_shift(self) -> torch.Tensor | None:
        if not self.shift:
            return None
        x = torch.randn(self.heads[1], self.head_dim, generator=torch.Generator().manual_seed(self.seed + 2))
        return ((x * 8).round() / 8 if self.coarse else x) * self.size

    def q_shift(self) -> torch.Tensor | None:
        if not self.q_shifted:
            return None
        x = torch.randn(self.heads[1], self.head_dim, generator=torch.Generator().manual_seed(self.seed + 5))
        return ((x * 8).round() / 8 if self.coarse else x) * self.size

    def sink_logits(self) -> torch.Tensor | None:
        if not self.sinks:
            return None
        generator = torch.Generator().manual_seed(self.seed + 3)
        return torch.randn(self.heads[0], generator=generator) * 2

    def bound_tensors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`images`: causal with a window, and spans of tokens that see each other; `random`: anything, empty intervals too."""
        if self.bounds is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 4)
        if self.bounds == "random":
            lower = torch.randint(0, self.lk + 1, (self.batch, self.lq), generator=generator)
            upper = torch.randint(-1, self.lk, (1, self.lq), generator=generator)
            return lower.sort(1).values.int(), upper.sort(1).values.int()
        position = (torch.arange(self.lq) + self.lk - self.lq).expand(self.batch, -1)
        end_of_span = torch.where(position % 40 < 23, position, position // 40 * 40 + 39)
        lower = (end_of_span - 37).clamp(0, self.lk)
        return lower.int(), end_of_span.clamp(-1, self.lk - 1).int()

    def tensor_options(self) -> dict:
        options = {"causal": self.causal, "scale": self.scale, "key_mask": self.key_mask(), "k_shift": self.k_shift()}
        q_shift = {"q_shift": self.q_shift()} if self.q_shifted else {}
        return options | q_shift | self.features()

    def features(self) -> dict:
        """Of the arguments that not every implementation computes those that are not left out."""
        values = {name: getattr(self, name) for name in ("window", "block_size", "prefix", "softcap")}
        values = {name: value for name, value in values.items() if value != getattr(Case, name)}
        tensors = {"bounds": self.bound_tensors(), "sinks": self.sink_logits()}
        return values | {name: value for name, value in tensors.items() if value is not None}

    def options(self) -> dict:
        """The keywords of `qat_kernels.attention`."""
        return self.tensor_options() | {"spec": self.spec()}

    def oracle_options(self) -> dict:
        """The keywords of the oracle."""
        return self.tensor_options() | {"preset": self.preset, "rotate": self.rotate, "four_over_six": self.four_over_six}

    def seen(self) -> Mask:
        bounded = self.bounds is not None
        return Mask(causal=self.causal, window=self.window, block_size=self.block_size, prefix=self.prefix, bounded=bounded)

    def spec(self) -> QuantSpec:
        return QuantSpec(preset=self.preset, rotate=self.rotate, four_over_six=self.four_over_six)


UNEQUAL_HEAD_DIMS = (
    Case(lq=21, lk=37, head_dim=192, head_dim_v=128, heads=(2, 2), causal=True, mask="left"),  # DeepSeek V3
    Case(lq=35, lk=35, head_dim=192, head_dim_v=128, batch=1, causal=True, window=20),  # MiMo V2 Flash
    Case(head_dim=32, head_dim_v=80, mask="holes", rotate=True, four_over_six=True, shift=True),
    Case(head_dim=48, head_dim_v=16, preset="nvfp4_qk", causal=True),
)


def random_cases(count: int) -> list[Case]:
    """Causal or not, lengths and heads take turns, so that all of them occur; the rest is drawn."""
    cases = []
    for seed in range(count):
        rng = random.Random(seed)
        causal, lk = seed % 2 == 0, LENGTHS[seed // 2 % len(LENGTHS)]
        exotic = seed % 5 == 4
        mask = rng.choice((None, None, *MASKS))
        cases.append(
            Case(
                lq=lk if causal and rng.random() < 0.6 else rng.choice(LENGTHS),
                lk=lk,
                head_dim=rng.choice((16, 32, 64, 128) if exotic else HEAD_DIMS),
                heads=HEADS[seed % len(HEADS)],
                batch=2 if mask == "empty row" else rng.choice((1, 2)),
                causal=causal,
                mask=mask,
                preset="nvfp4_qk" if seed % 7 == 6 else "nvfp4",
                rotate=exotic and rng.random() < 0.6,
                four_over_six=exotic and rng.random() < 0.6,
                shift=rng.random() < 0.3,
                scale=rng.choice((None, None, 0.3, 1.0)),
                size=1.0 if exotic else rng.choice((1e-3, 0.1, 1.0, 1.0, 3.0, 10.0, 100.0, 1e3)),
                coarse=exotic,
                seed=seed,
            )
        )
    return cases


def exact_problem(causal: bool, mask: str | None, shift: bool) -> tuple[Case, tuple[torch.Tensor, ...], torch.Tensor]:
    """A case, inputs that NVFP4 holds exactly (each group of Q and K has a 6, each value of V is +-6), and who sees whom."""
    case = Case(lq=69, lk=69, causal=causal, mask=mask, shift=shift, coarse=True, scale=0.02)
    generator = torch.Generator().manual_seed(0)

    def exact(heads: int) -> torch.Tensor:
        x = torch.randint(-7, 8, (2, heads, 69, 32), generator=generator)
        x[..., ::16] = 7
        return oracle.E2M1[x.abs()] * x.sign()

    q, k, v = exact(4), exact(2), torch.where(exact(2) > 0, 6.0, -6.0).double()
    if shift:
        k = k + case.k_shift()[:, None]
    allowed = torch.ones(2, 1, 69, 69, dtype=torch.bool)
    if mask is not None:
        allowed &= case.key_mask()[:, None, None]
    return case, (q, k, v), allowed.tril() if causal else allowed


def plain_attention(q, k, v, allowed: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention without any quantization, and the log-sum-exp of its scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    p = torch.where(allowed, scores.masked_fill(~allowed, -1e300).softmax(-1), 0.0)
    return p @ v, scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)


def error(actual: torch.Tensor, expected: torch.Tensor, at_least: float | torch.Tensor = 0.0) -> float:
    """||actual - expected|| / ||expected||, the relative L2 of docs/NUMERICS.md; `at_least` bounds the divisor from below."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    size = max(float(expected.norm()), float(at_least))
    difference = float((actual - expected).norm())
    return difference / size if size else difference


def lse_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest magnitude above 1. -inf must be in the same places."""
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual == -torch.inf, expected == -torch.inf)
    finite = expected != -torch.inf
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1.0))


def run(q, k, v, grad_out, **options) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, log-sum-exp and the gradients of fresh leaves with the strides of q, k and v, and of the sinks if there are any."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if options.get("sinks") is not None:
        leaves.append(options["sinks"].detach().requires_grad_())
        options["sinks"] = leaves[3]
    out, lse = attention(*leaves[:3], return_lse=True, **options)
    return out.detach(), lse, list(torch.autograd.grad(out, leaves, grad_out))


def run_case(case: Case, dtype: torch.dtype = torch.float64):
    """`run` with the tensors and options of a case."""
    return run(*case.tensors(dtype), **case.options())


def forward_op(case: Case, q, k, v, *, needs_gradient: bool = True, impl: str = "eager"):
    """O, O' and LSE."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return torch.ops.qat_kernels.attention_forward(
        q, k, v, case.key_mask(), case.k_shift(), case.spec().to_json(), case.seen().to_json(), scale, needs_gradient, impl,
        None, None, 0, 0, *(case.bound_tensors() or (None, None)), case.softcap, case.sink_logits(), case.q_shift(),
    )[:3]  # fmt: skip


def assert_same_bits(actual, expected) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
