"""The presets of servers on a GPU at the sizes of real models (docs/NUMERICS.md, sections 7 and 9), and what a GPU rounds."""

import dataclasses
import functools

import pytest
import torch

from qat_kernels import QuantSpec, attention
from support.kernels.cases import Case, error
from support.kernels.oracle import E4M3

pytestmark = pytest.mark.gpu
OUTPUT, GRADIENT = 3e-3, 1e-2


def run(case: Case, tensors: list[torch.Tensor], impl: str, **packed) -> list[torch.Tensor]:
    """Output and gradients."""
    q, k, v, grad_out = tensors
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.options().items()}
    out = attention(*leaves, **options, impl=impl, **packed)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_close(case: Case, tensors: list[torch.Tensor], **packed) -> None:
    actual = run(case, tensors, "auto", **packed)
    expected = run(case, [x.float() for x in tensors], "eager", **packed)
    for index, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert error(ours, exact) < (GRADIENT if index else OUTPUT)
    for ours, again in zip(run(case, tensors, "auto", **packed), actual, strict=True):
        assert case.preset == "kv_nvfp4" or torch.equal(ours, again)  # the gradients of PyTorch's kernels need not repeat


@pytest.mark.parametrize("length", [64, 1000, 8192])
@pytest.mark.parametrize("size", [1.0, 3.0], ids=["gaussian", "peaky"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sage3(head_dim, size, length):
    case = Case(preset="sage3", head_dim=head_dim, heads=(2, 2), lq=length, lk=length, batch=1)
    tensors = [x.cuda() for x in case.tensors(torch.bfloat16)]
    tensors[0] *= size
    assert_close(case, tensors)
    assert_close(dataclasses.replace(case, lk=300), [x if i in (0, 3) else x[:, :, :300] for i, x in enumerate(tensors)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "mask": "left"},
        {"mask": "empty row"},
        {"causal": True, "lq": 300},
        {"causal": True, "lq": 1},
    ],
    ids=str,
)
def test_kv_nvfp4(options, dtype):
    case = Case(**{"preset": "kv_nvfp4", "head_dim": 128, "heads": (8, 2), "lq": 2100, "lk": 2100} | options)
    assert_close(case, [x.cuda() for x in case.tensors(dtype)])


def test_kv_nvfp4_of_packed_documents():
    lengths = [1000, 1, 0, 2500, 77]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 2500, "max_seqlen_k": 2500}
    case = Case(preset="kv_nvfp4", causal=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 128) for heads in (8, 2, 2, 8)]
    assert_close(case, [torch.randn(shape, generator=generator).bfloat16().cuda() for shape in shapes], **packed)


@pytest.mark.parametrize("causal", [False, True])
def test_fa4_fp4(causal):
    case = Case(preset="fa4_fp4", head_dim=128, heads=(4, 2), lq=3000, lk=3000, causal=causal, mask="left")
    assert_close(case, [x.cuda() for x in case.tensors(torch.bfloat16)])


@pytest.mark.parametrize("preset", ["kv_nvfp4", "sage3"])
def test_compiled_equals_eager(preset):
    case = Case(preset=preset, head_dim=64, heads=(2, 2), lq=200, lk=200)
    q, k, v, grad_out = (x.cuda() for x in case.tensors(torch.bfloat16))
    attend = functools.partial(attention, spec=QuantSpec(preset=preset))
    results = []
    for call in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for ours, compiled in zip(*results, strict=True):
        assert error(compiled, ours) < 1e-3


def test_the_reciprocal_of_servers_is_correctly_rounded():
    """Their kernels take `rcp.approx.ftz` of 6 and of scales, and under fast math amax / 6 as `div.full`: the bits are ours."""
    import triton
    import triton.language as tl

    @triton.jit
    def approximate(x_ptr, inverse_ptr, sixth_ptr, n, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < n, other=1.0)
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
        sixth = tl.inline_asm_elementwise(
            "div.full.ftz.f32 $0, $1, 0f40C00000;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        tl.store(inverse_ptr + index, inverse, mask=index < n)
        tl.store(sixth_ptr + index, sixth, mask=index < n)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse, sixth = torch.empty_like(x), torch.empty_like(x)
        approximate[(triton.cdiv(x.numel(), 256),)](x, inverse, sixth, x.numel(), BLOCK=256)
        return inverse, sixth

    scales = torch.cat((E4M3[1:].float(), torch.tensor([6.0]))).cuda()
    assert scales.numel() == 127 and torch.equal(both(scales)[0], 1 / scales)
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        amax = bits.view(dtype)
        amax = amax[amax.isfinite() & (amax <= 6 * 448)].float().cuda()
        ours = (amax * (1 / 6)).to(torch.float8_e4m3fn)
        assert torch.equal(both(amax)[1].to(torch.float8_e4m3fn).view(torch.uint8), ours.view(torch.uint8))
