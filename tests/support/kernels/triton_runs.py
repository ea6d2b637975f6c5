"""The Triton attention and the eager one in float32, run on the same problems, and how far apart they may be."""

import pytest
import torch

from qat_kernels import reference
from qat_kernels.mask import Bounds
from support.kernels.cases import SPECS, Case, error, lse_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = {"lq": 37, "lk": 37, "batch": 1, "heads": (2, 1), "coarse": True}
CASES = [
    Case(**{**SMALL, **options})
    for options in (
        *(spec | {"lq": 75, "lk": 75} for spec in SPECS),
        {"lq": 5, "lk": 83, "causal": True, "head_dim": 64},
        {"lq": 83, "lk": 21, "causal": True, "mask": "right", "heads": (3, 1)},
        {"lq": 1, "lk": 1, "causal": True, "head_dim": 16},
        {"lq": 18, "lk": 130, "head_dim": 48, "scale": -0.3},
        {"lq": 33, "lk": 40, "head_dim": 80, "causal": True, "batch": 2, "mask": "empty row"},
        {"head_dim": 128, "causal": True, "mask": "holes", "rotate": True},
        {"head_dim": 256, "lq": 20, "lk": 20},
        {"head_dim": 48, "head_dim_v": 32, "causal": True, "heads": (2, 1)},
        {"head_dim": 32, "head_dim_v": 80, "lq": 20, "mask": "left"},
        {"preset": "nvfp4_qk", "mask": "left", "batch": 2},
        {"size": 3.0, "causal": True, "lk": 65, "lq": 65},
        {"preset": "fa4_fp4", "causal": True, "mask": "left"},
        {"preset": "sage3", "head_dim": 64, "heads": (2, 2), "lq": 150, "lk": 75},
        {"preset": "sage3", "head_dim": 128, "heads": (1, 1), "lq": 33, "lk": 140},
    )
]
Q_SHIFTED = [
    Case(**{**SMALL, **options, "q_shifted": True})
    for options in (
        {"lq": 40, "lk": 90},
        {"causal": True, "rotate": True, "shift": True, "lq": 75, "lk": 75, "heads": (4, 2)},
        {"causal": True, "mask": "left", "batch": 2, "scale": -0.3, "head_dim": 80},
        {"rotate": True, "mask": "holes", "scale": -0.3, "head_dim": 64, "lk": 70},
        {"preset": "nvfp4_qk", "causal": True, "heads": (3, 1), "lk": 65},
    )
]
DOCUMENTS = ((33, 33), (1, 1), (5, 40), (0, 0), (130, 130), (20, 3), (7, 0), (0, 9))


def run_kernels(case: Case, tensors: list[torch.Tensor], *, device: str, key_mask: torch.Tensor | None = None) -> tuple:
    """O, O' (O with BF16 PV), LSE and the list of gradients, on the CPU."""
    from qat_kernels.triton import launch as training_launch

    q, k, v, grad_out = (x.to(device) for x in tensors)
    masks = [None if x is None else x.to(device) for x in (case.key_mask() if key_mask is None else key_mask, case.k_shift())]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options = {"spec": case.spec(), "mask": case.seen(), "scale": scale, "softcap": case.softcap, **on_device(case, device)}
    options["q_shift"] = None if case.q_shift() is None else case.q_shift().to(device)
    key_mask, k_shift = masks
    result = training_launch.forward(q, k, v, key_mask, k_shift, with_gradient=True, **options)
    spec = case.spec()
    out_hp = result.out_hp if spec.quantizes_pv else result.out
    saved = (v if spec.reads_value(case.seen().hides_keys) else None, out_hp, result.stats, result.codes)
    options |= {"query": q, "key": k} if spec.reads_query else {}
    grads = training_launch.backward(grad_out, *saved, key_mask, key_shape=k.shape, **options)
    return result.out.cpu(), out_hp.cpu(), result.lse.cpu(), [x.cpu() for x in grads[: 3 + case.sinks]]


def on_device(case: Case, device: str | torch.device) -> dict:
    """The tensors of a case that few cases have: bounds and sinks."""
    bounds, sinks = case.bound_tensors(), case.sink_logits()
    return {
        "bounds": None if bounds is None else Bounds(*(x.to(device) for x in bounds)),
        "sinks": None if sinks is None else sinks.to(device),
    }


def run_reference(case: Case, tensors: list[torch.Tensor]) -> tuple:
    """The same in eager float32."""
    # SageAttention3's smoothing rounds to the dtype of its inputs.
    q, k, v, grad_out = tensors if case.spec().reads_query else (x.float() for x in tensors)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options = {"spec": case.spec(), "mask": case.seen(), "scale": scale, "softcap": case.softcap, **on_device(case, q.device)}
    masks = tuple(None if x is None else x.to(q.device) for x in (case.key_mask(), case.k_shift(), case.q_shift()))
    out, out_hp, lse = reference.forward(q, k, v, *masks, with_out_hp=True, **options)
    grads = reference.backward(grad_out, q, k, v, out_hp, *masks, **options)
    return out, out_hp, lse, list(grads[: 3 + case.sinks])


BOUNDS = {torch.bfloat16: (3e-3, 1e-2), torch.float16: (3e-3, 1e-2), torch.float32: (1e-5, 1e-5)}
"""Of O and O', and of the gradients. Operands are bfloat16, but under the interpreter those of float32 inputs stay float32."""


def size_of_sink_terms(case: Case, tensors: list[torch.Tensor], expected: tuple) -> torch.Tensor:
    """Root of the summed squares of what the gradient of the sinks sums over queries; the sum nearly vanishes."""
    out_hp, lse, sinks = (x.double() for x in (expected[1], expected[2], case.sink_logits()))
    shares = torch.exp(sinks[:, None] - lse.where(lse != -torch.inf, torch.inf))
    return (shares * (tensors[3].double() * out_hp).sum(3)).norm()


def assert_within_bounds(
    actual: tuple, expected: tuple, dtype: torch.dtype, device: str, *, sink_terms: float | torch.Tensor = 0.0
) -> None:
    """Section 7's bounds; `sink_terms` as `size_of_sink_terms` returns it, where there are sinks."""
    bound, bound_of_gradients = BOUNDS[torch.bfloat16 if device == "cuda" else dtype]
    assert {x.dtype for x in (actual[0], actual[1], *actual[3][:3])} == {dtype}
    assert actual[2].dtype == torch.float32
    for x, wanted in zip(actual[:2], expected[:2], strict=True):
        assert error(x, wanted) < bound
    assert lse_error(actual[2], expected[2]) < 1e-4
    for x, wanted in zip(actual[3][:3], expected[3][:3], strict=True):
        assert error(x, wanted) < bound_of_gradients
    for x, wanted in zip(actual[3][3:], expected[3][3:], strict=True):
        assert error(x, wanted, sink_terms) < bound_of_gradients
