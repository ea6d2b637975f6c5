"""The inference kernel's emulation against the eager forward: the option grid, under Triton's interpreter or on a GPU."""

from unittest import mock

import pytest
import torch

from cases import Case, assert_same_bits, error, lse_error
from interpreter import on
from qat_kernels import attention
from test_triton_attention import CASES, run_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run_inference(case: Case, tensors, *, device: str):
    """Twice output and log-sum-exp."""
    q, k, v = (x.to(device) for x in tensors[:3])
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options().items()}
    results = [attention(q, k, v, **options, return_lse=True, impl="fp4") for _ in range(2)]
    return [(out.cpu(), lse.cpu()) for out, lse in results]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_bounds_of_the_forward_and_bit_equal_twice(case, device):
    tensors = case.tensors(torch.bfloat16)
    (out, lse), again = on(device, run_inference, case, tensors)
    assert_same_bits(again, (out, lse))
    expected, _, expected_lse, _ = run_reference(case, tensors)
    assert out.dtype == torch.bfloat16
    assert error(out, expected) < 3e-3
    assert lse_error(lse, expected_lse) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "mask": "left"}, {"pv": "bf16"}], ids=str)
def test_products_with_scales_agree_with_their_emulation(options):
    """`tl.dot_scaled` itself, which Triton takes apart where there are no FP4 units; from 3.8 on it can do so on sm_90."""
    from triton.runtime.jit import JITFunction

    from qat_kernels import triton_inference

    if torch.cuda.get_device_capability() < (10, 0) and triton_inference.TRITON < (3, 8):
        pytest.skip(f"Triton {triton_inference.TRITON} compiles tl.dot_scaled for GPUs with FP4 units only; 3.8 for this one too")
    case = Case(lq=700, lk=700, head_dim=128, heads=(4, 2), **options)
    tensors = case.tensors(torch.bfloat16)
    (emulated, emulated_lse), _ = run_inference(case, tensors, device="cuda")
    run, products = JITFunction.run, []

    def watched(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        if self.__name__ == "inference_kernel":
            products.append(kernel.asm["ttir"].count("tt.dot_scaled"))
        return kernel

    with (
        mock.patch.object(triton_inference, "why_not_native", lambda arch, head_dim: None),
        mock.patch.object(JITFunction, "run", watched),
    ):
        (out, lse), again = run_inference(case, tensors, device="cuda")
    # Two kernels ran, and each of their loops multiplied so, P by V too if these are quantized.
    assert len(products) == 2 and min(products) >= (1 if case.pv == "bf16" else 2)
    assert_same_bits(again, (out, lse))
    assert error(out, emulated) < 3e-3
    assert lse_error(lse, emulated_lse) < 1e-4
