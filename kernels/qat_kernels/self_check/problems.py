"""Random problems for the self-check: what calls of attention look like, small, long and larger than 32 bits can count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from qat_kernels.mask import Mask
from qat_kernels.spec import QuantSpec
from qat_kernels.varlen import Packing
from qat_kernels.verdicts import Case

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

LONG = 75_600
"""Tokens of a 720p video of Wan."""
MANY = 2**31
"""Elements that 32 bits cannot count."""
_DOCUMENTS = ((1, 1), (130, 130), (0, 16), (77, 300), (300, 77), (18, 18))
"""Queries and keys of packed sequences."""


class Attended(NamedTuple):
    """One call of attention."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spec: QuantSpec
    causal: bool
    key_mask: torch.Tensor | None = None
    k_shift: torch.Tensor | None = None
    q_shift: torch.Tensor | None = None
    packing: Packing | None = None
    sampled: bool = False
    """Too large to compute twice: some rows are compared with the definition."""

    def run(self, forward: Any, **options: Any) -> Any:
        """What a launcher's forward makes of it."""
        options |= {"spec": self.spec, "mask": Mask(causal=self.causal), "scale": self.q.shape[-1] ** -0.5}
        if self.q_shift is not None:  # not all launchers take one
            options["q_shift"] = self.q_shift
        return forward(self.q, self.k, self.v, self.key_mask, self.k_shift, self.packing, **options)


def large(head_dim: int) -> tuple[int, int, int, int]:
    """A shape [batch, 32, 8192, head_dim] with just more than `MANY` elements."""
    return MANY // (32 * 8192 * head_dim) + 1, 32, 8192, head_dim


def problems(
    case: Case,
    device: torch.device,
    *,
    tensors: int,
    long: int = LONG,
    largest: tuple[int, int, int, int] | None = None,
) -> Iterator[Attended]:
    """One after the other, so that one at a time takes memory. What the servers of a spec refuse is left out.

    Args:
        case: what is checked.
        device: where.
        tensors: so many of the size of Q, in its dtype, a call takes, codes of Q, K and V aside.
        long: tokens of the long one.
        largest: shape of the largest, if another than `large` says.
    """
    spec = QuantSpec.from_json(case.spec)
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    def inputs(queries: int, keys: int, batch: int = 1, heads: tuple[int, int] = (2, 2)) -> _Inputs:
        # [batch, tokens, heads, head_dim] in memory, as models have them
        key_heads = heads[1] if spec.rules.mask else heads[0]
        sizes = ((queries, heads[0]), (keys, key_heads), (keys, key_heads))
        q, k, v = (new(batch, tokens, count, case.head_dim).transpose(1, 2) for tokens, count in sizes)
        return q, k, v

    common: dict[str, Any] = {"spec": spec, "causal": case.causal}
    yield Attended("gaussian", *inputs(256, 384, heads=(4, 2)), **common)
    q, k, v = inputs(200, 200)
    yield Attended("peaky", q * 3, k, v, **common)
    yield Attended("odd lengths", *inputs(133, 269, batch=2, heads=(3, 1)), **common)
    yield Attended("one query", *inputs(1, 131, heads=(16, 16)), **common)
    yield Attended("more queries than keys", *inputs(150, 37), **common)
    if spec.rules.mask:
        mask = torch.rand(3, 210, generator=generator, device=device) < 0.8
        mask[0, :50], mask[1, :] = False, False  # padding on the left; a sequence without any key
        yield Attended("masked", *inputs(210, 210, batch=3), key_mask=mask, **common)
        yield _packed(new, case, device, common)
    q, k, v = inputs(160, 240)
    offset = 4 * new(2, case.head_dim)
    if spec.rules.options:
        yield Attended("shifted keys", q, k + offset[:, None], v, k_shift=offset.float(), **common)
        yield Attended("shifted queries", q + offset[:, None], k, v, q_shift=offset.float(), **common)
    if spec.formats.smooth is not None:  # without its smoothing, or the scores of the means, this comes out quite different
        yield Attended("shifted queries and keys", q + 2 * new(2, 1, case.head_dim), k + offset[:, None], v, **common)
    yield Attended("long", *inputs(long, long, heads=(2, 1)), sampled=True, **common)
    batch, heads, tokens, head_dim = largest or large(case.head_dim)
    if not _fits(batch * heads * tokens * head_dim, tensors, case.dtype, device):
        return
    # One tensor three times, in two layouts.
    x = new(batch, heads, tokens, head_dim)
    y = x.view(batch, tokens, heads, head_dim).transpose(1, 2)
    yield Attended("over 2^31 elements", x, y, y, sampled=True, **common)


def _packed(new: Any, case: Case, device: torch.device, common: dict[str, Any]) -> Attended:
    lengths = [[0, *(each[side] for each in _DOCUMENTS)] for side in (0, 1)]
    bounds = [torch.tensor(each, device=device).cumsum(0, dtype=torch.int32) for each in lengths]
    q, k, v = (new(sum(lengths[side]), heads, case.head_dim) for side, heads in ((0, 4), (1, 2), (1, 2)))
    return Attended("packed", q, k, v, packing=Packing(bounds[0], bounds[1], max(lengths[0]), max(lengths[1])), **common)


def _fits(elements: int, tensors: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such a call fits on the GPU: this many tensors, and codes of Q, K and V. If not, few calls of users do."""
    if device.type != "cuda":
        return True
    needed = elements * (tensors * dtype.itemsize + 3 * 9 / 16)
    return needed < 0.9 * torch.cuda.get_device_properties(device).total_memory
