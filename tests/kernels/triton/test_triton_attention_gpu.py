"""The Triton attention on a GPU at the sizes of real models, also against FlashAttention-2: docs/NUMERICS.md, section 7."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from support.kernels.cases import Case, error
from support.kernels.triton_runs import BOUNDS, DTYPES, assert_within_bounds, run_kernels, run_reference


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", ["gaussian", "peaky", "constant v", "tiny v", "sink"])
@pytest.mark.parametrize("length", [64, 256, 1024, 4096, 16384, 32768])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_real_sizes_stay_within_the_bounds(head_dim, causal, length, inputs):
    case = Case(lq=length, lk=length, head_dim=head_dim, heads=(4, 2), batch=1, causal=causal)
    tensors = [x.cuda() for x in case.tensors(torch.bfloat16)]
    q, k, v, _ = tensors
    if inputs == "peaky":
        q *= 3
    elif inputs == "constant v":
        v[:] = v[:, :, :1]
    elif inputs == "tiny v":
        v *= 1e-2
    elif inputs == "sink":  # the first token takes most of every row and has next to no value
        k[:, :, 0] = q.mean((1, 2))[:, None] + q[:, ::2].sign().mean(2) * 4
        v[:, :, 0] *= 1e-2
    *expected, grads = (x.cpu() if isinstance(x, torch.Tensor) else [y.cpu() for y in x] for x in run_reference(case, tensors))
    *actual, actual_grads = run_kernels(case, tensors, device="cuda")
    if inputs == "constant v":  # dQ and dK cancel to nothing: measured against what other values of that size give
        changed = run_reference(case, [q, k, v * torch.randn_like(v).sign(), tensors[3]])[3]
        for x, wanted, size in zip(actual_grads[:2], grads[:2], changed[:2], strict=True):
            assert error(x, wanted, size.norm().cpu()) < BOUNDS[torch.bfloat16][1]
        actual_grads, grads = actual_grads[2:], grads[2:]
    assert_within_bounds((*actual, actual_grads), (*expected, grads), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 3.0], ids=["gaussian", "peaky"])
@pytest.mark.parametrize("length", [1024, 16384])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_err_at_most_twice_as_much_as_those_of_flash_attention(causal, length, size):
    """Ours against the exact gradient of the quantized problem, FlashAttention-2's against that of the unquantized one."""
    case = Case(lq=length, lk=length, head_dim=128, heads=(2, 2), batch=1, causal=causal)
    tensors = [x.cuda() for x in case.tensors(torch.bfloat16)]
    tensors[0] *= size
    actual, expected = run_kernels(case, tensors, device="cuda")[3], run_reference(case, tensors)[3]
    ours = [error(a, e.cpu()) for a, e in zip(actual, expected, strict=True)]

    def gradients(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, tensors[3].to(dtype))

    exact = gradients(torch.float32, SDPBackend.EFFICIENT_ATTENTION)
    theirs = [error(a, e) for a, e in zip(gradients(torch.bfloat16, SDPBackend.FLASH_ATTENTION), exact, strict=True)]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine < 2 * other, (ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 192, 256])
def test_every_head_dim_stays_within_the_bounds(head_dim, causal):
    case = Case(lq=700, lk=900, head_dim=head_dim, causal=causal, mask="left", shift=True)
    for dtype in DTYPES:
        tensors = case.tensors(dtype)
        assert_within_bounds(run_kernels(case, tensors, device="cuda"), run_reference(case, tensors), dtype, "cuda")
    bf16_values = dataclasses.replace(case, preset="nvfp4_qk")
    tensors = bf16_values.tensors(torch.bfloat16)
    expected = run_reference(bf16_values, tensors)
    assert_within_bounds(run_kernels(bf16_values, tensors, device="cuda"), expected, torch.bfloat16, "cuda")
