"""The Triton attention against the eager one in float32: docs/NUMERICS.md, sections 3 to 7.

On a CPU Triton's interpreter runs small, odd shapes; on a GPU the same tests run natively, and larger problems beside them.
"""

import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from cases import SPECS, Case, assert_same_bits, error, lse_error, run
from interpreter import interpreted, on
from qat_kernels import QuantSpec, attention, reference
from test_packed import problem as packed_problem
from test_packed import unpacked

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
        {"pv": "bf16", "mask": "left", "batch": 2},
        {"size": 3.0, "causal": True, "lk": 65, "lq": 65},
    )
]


def run_kernels(case: Case, tensors: list[torch.Tensor], *, device: str, key_mask: torch.Tensor | None = None) -> tuple:
    """O, O' (O with BF16 PV), LSE and the list of gradients, on the CPU."""
    from qat_kernels import triton_attention

    q, k, v, grad_out = (x.to(device) for x in tensors)
    masks = [None if x is None else x.to(device) for x in (case.key_mask() if key_mask is None else key_mask, case.k_shift())]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options = {"spec": case.spec(), "causal": case.causal, "scale": scale}
    key_mask, k_shift = masks
    result = triton_attention.forward(q, k, v, key_mask, k_shift, with_gradient=True, **options)
    twin = result.twin if case.pv == "nvfp4" else result.out
    value = v if case.causal or case.pv == "bf16" else None
    saved = (value, twin, result.stats, result.codes)
    grads = triton_attention.backward(grad_out, *saved, key_mask, key_shape=k.shape, **options)
    return result.out.cpu(), twin.cpu(), result.lse.cpu(), [x.cpu() for x in grads]


def run_reference(case: Case, tensors: list[torch.Tensor]) -> tuple:
    """The same in eager float32."""
    q, k, v, grad_out = (x.float() for x in tensors)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options = {"spec": case.spec(), "causal": case.causal, "scale": scale}
    masks = tuple(None if x is None else x.to(q.device) for x in (case.key_mask(), case.k_shift()))
    out, twin, lse = reference.forward(q, k, v, *masks, with_twin=True, **options)
    return out, twin, lse, reference.backward(grad_out, q, k, v, twin, *masks, **options)


BOUNDS = {torch.bfloat16: (3e-3, 1e-2), torch.float16: (3e-3, 1e-2), torch.float32: (1e-5, 1e-5)}
"""Of O and O', and of the gradients. Operands are bfloat16, but under the interpreter those of float32 inputs stay float32."""


def assert_within_bounds(actual: tuple, expected: tuple, dtype: torch.dtype, device: str) -> None:
    bound, bound_of_gradients = BOUNDS[torch.bfloat16 if device == "cuda" else dtype]
    assert {x.dtype for x in (actual[0], actual[1], *actual[3])} == {dtype}
    assert actual[2].dtype == torch.float32
    for x, wanted in zip(actual[:2], expected[:2], strict=True):
        assert error(x, wanted) < bound
    assert lse_error(actual[2], expected[2]) < 1e-4
    for x, wanted in zip(actual[3], expected[3], strict=True):
        assert error(x, wanted) < bound_of_gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_results_stay_within_the_bounds(index, device):
    """Dtypes take turns under the interpreter."""
    case = CASES[index]
    for dtype in DTYPES if device == "cuda" else [DTYPES[index % 3], torch.float32][: 1 + (index % 3 != 2)]:
        tensors = case.tensors(dtype)
        actual = on(device, run_kernels, case, tensors)
        if case.lk == 1:  # dQ and dK are zeros: softmax over one key is constant
            assert all(x.abs().max() < 1e-2 for x in actual[3][:2])
            actual = (*actual[:3], actual[3][2:])
            expected = run_reference(case, tensors)
            assert_within_bounds(actual, (*expected[:3], expected[3][2:]), dtype, device)
        else:
            assert_within_bounds(actual, run_reference(case, tensors), dtype, device)


def run_poisoned(case: Case, tensors: list[torch.Tensor], *, device: str) -> tuple:
    """`run_kernels` twice: as it is, and with every new buffer full of NaN."""

    def poisoned(new):
        def call(*args, **kwargs):
            x = new(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 99)

        return call

    plain = run_kernels(case, tensors, device=device)
    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        return plain, run_kernels(case, tensors, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", SPECS, ids=str)
def test_twice_the_same_bits_whatever_new_memory_holds(options, device):
    case = Case(**{**SMALL, **options, "lk": 45})
    plain, again = on(device, run_poisoned, case, case.tensors(torch.bfloat16))
    assert_same_bits(again, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [None, "left"])
def test_future_tokens_leave_earlier_outputs_bit_identical(mask, device):
    case = Case(**{**SMALL, "lq": 50, "lk": 50, "causal": True, "mask": mask})
    tensors = case.tensors(torch.bfloat16)
    before = on(device, run_kernels, case, tensors)
    for position in (1, 15, 16, 33, 49):
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[:, :, position:] = x[:, :, position:].flip(2) * 20 + 1
        after = on(device, run_kernels, case, changed)
        for a, b in zip(after[:3], before[:3], strict=True):
            assert torch.equal(a[:, :, :position], b[:, :, :position])
            assert not torch.equal(a[:, :, position:], b[:, :, position:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "pv": "bf16"}], ids=str)
@pytest.mark.parametrize("mask", ["holes", "left"])
def test_what_masked_slots_hold_has_no_effect(mask, options, device):
    case = Case(**{**SMALL, **options, "mask": mask})
    q, k, v, grad_out = case.tensors(torch.bfloat16)
    excluded = ~case.key_mask()[:, None, :, None].expand(k.shape)
    zeroed = on(device, run_kernels, case, [q, k.masked_fill(excluded, 0.0), v.masked_fill(excluded, 0.0), grad_out])
    for grad in zeroed[3][1:]:
        assert not grad[excluded].any()
    result = on(device, run_kernels, case, [q, k.masked_fill(excluded, torch.nan), v.masked_fill(excluded, torch.inf), grad_out])
    assert_same_bits(result, zeroed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"causal": True, "mask": "holes"}, {"pv": "bf16"}], ids=str)
def test_strides_do_not_show_in_the_bits(options, device):
    case = Case(**{**SMALL, **options})
    tensors = case.tensors(torch.bfloat16)
    expected = on(device, run_kernels, case, tensors)
    fused = torch.full((1, 2, 37, 3 * case.head_dim), torch.nan, dtype=torch.bfloat16)
    for strided in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors],
        [x.mT.contiguous().mT for x in tensors],
        [torch.cat((fused[:, : x.shape[1], :, :32], x), -1)[..., 32:] for x in tensors],
    ):
        result = on(device, run_kernels, case, strided)
        assert_same_bits(result, expected)
        assert result[0].stride() == torch.empty_like(strided[0]).stride()
        assert all(x.is_contiguous() for x in result[3])
    broadcast = torch.ones((), dtype=torch.bfloat16).expand(tensors[0].shape)
    actual = on(device, run_kernels, case, [*tensors[:3], broadcast])
    assert_same_bits(actual, on(device, run_kernels, case, [*tensors[:3], broadcast.contiguous()]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pv", ["nvfp4", "bf16"])
def test_rows_without_keys_are_zero(pv, device):
    """A sequence with no key at all; and causal rows before the first key, by left padding or because Lq > Lk."""
    case = Case(**{**SMALL, "lq": 40, "lk": 33, "causal": True, "pv": pv, "batch": 3})
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1], mask[2, :9] = False, False
    empty = torch.zeros(3, 40, dtype=torch.bool)
    empty[:, :7], empty[1], empty[2, : 7 + 9] = True, True, True
    out, twin, lse, (dq, dk, dv) = on(device, run_kernels, case, case.tensors(torch.bfloat16), key_mask=mask)
    empty = empty[:, None].expand(lse.shape)
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert not twin[empty].any()
    assert out[~empty].any(-1).all()
    assert not dq[empty].any()
    assert not dk[1].any()
    assert not dv[1].any()
    assert all(x.isfinite().all() for x in (out, twin, dq, dk, dv))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_dimensions(causal, device):
    for batch, lq, lk in ((2, 5, 0), (2, 0, 5), (0, 5, 5), (0, 0, 0)):
        case = Case(batch=batch, lq=lq, lk=lk, causal=causal, mask="left", shift=True)
        out, twin, lse, grads = on(device, run_kernels, case, case.tensors(torch.bfloat16))
        assert lse.shape == (batch, 4, lq)
        assert (lse == -torch.inf).all()
        assert [x.shape for x in (out, *grads)] == [(batch, 4, lq, 32), (batch, 4, lq, 32), *[(batch, 2, lk, 32)] * 2]
        assert not any(x.any() for x in (out, twin, *grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_not_finite_inputs_stay_visible(causal, bad, device):
    """In q the row, in k and v the rows that see the token; nothing else, but for v that earlier rows of a tile skip as 0 * v."""
    case = Case(**{**SMALL, "lq": 50, "lk": 50, "causal": causal})
    tensors = case.tensors(torch.bfloat16)
    clean = on(device, run_kernels, case, tensors)[0]
    for index, head in ((0, 1), (1, 0), (2, 0)):
        broken = [x.clone() for x in tensors]
        broken[index][0, head, 20, 7] = bad
        out = on(device, run_kernels, case, broken)[0]
        affected = torch.zeros(out.shape[:3], dtype=torch.bool)
        if index == 0:
            affected[0, 1, 20] = True
        else:
            affected[0, :, 20 if causal else 0 :] = True
        assert (~out.isfinite()).any(-1)[affected].all()
        if not (causal and index == 2):
            assert torch.equal(out[~affected], clean[~affected])


def run_with_tiles(case: Case, tensors: list[torch.Tensor], sizes: list[tuple[int, int]], *, device: str) -> list[tuple]:
    from qat_kernels import tiles

    results = []
    for queries, keys in sizes:
        tile = tiles.Tile(queries=queries, keys=keys, warps=4, stages=1)
        chosen = tiles.Tiles(forward=tile, grad_query=tile, grad_key_value=tile)
        with mock.patch.object(tiles, "choose", lambda *_, chosen=chosen: chosen):
            results.append(run_kernels(case, tensors, device=device))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "mask": "holes", "shift": True}], ids=str)
def test_tiles_change_nothing_beyond_rounding(options, device):
    """Neither what is quantized nor what is kept depends on them: codes that differed would show as 1e-2."""
    case = Case(**{**SMALL, **options, "lq": 83, "lk": 90})
    first, *others = on(device, run_with_tiles, case, case.tensors(torch.float32), [(32, 64), (16, 128), (64, 32)])
    bound = 1e-2 if device == "cuda" else 1e-5
    for other in others:
        for a, b in zip((*other[:2], *other[3]), (*first[:2], *first[3]), strict=True):
            assert error(a, b) < bound
        assert lse_error(other[2], first[2]) < 1e-6


def run_public(case: Case, tensors: list[torch.Tensor], *, device: str, compiled: bool = False) -> tuple:
    """`attention(impl="triton")` with autograd."""
    q, k, v, grad_out = (x.to(device) for x in tensors)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options().items()}

    def function(q, k, v):
        return attention(q, k, v, return_lse=True, impl="triton", **options)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_out)
    with torch.no_grad():
        without_gradient = attention(q, k, v, impl="triton", **options)
    assert torch.equal(without_gradient, out)
    return out.detach().cpu(), lse.cpu(), [x.cpu() for x in grads]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"causal": True, "shift": True}, {"pv": "bf16", "mask": "holes"}], ids=str)
def test_the_public_function_runs_the_kernels(options, compiled, device):
    case = Case(**{**SMALL, **options})
    tensors = case.tensors(torch.bfloat16)
    out, lse, grads = on(device, run_public, case, tensors, compiled=compiled)
    assert_same_bits((out, lse, grads), [x for i, x in enumerate(on(device, run_kernels, case, tensors)) if i != 1])


DOCUMENTS = ((33, 33), (1, 1), (5, 40), (0, 0), (130, 130), (20, 3), (7, 0), (0, 9))


def run_packed(*, device: str, **options) -> tuple[tuple, list[tuple]]:
    """The documents packed, and each alone; O, LSE and gradients, on the CPU."""
    _, alone, together, keywords, packing = packed_problem(torch.bfloat16, DOCUMENTS, **options)
    keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()} | {"impl": "triton"}
    packing = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    packed = run(*(x.to(device) for x in together), **keywords, **packing)
    packing = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    separate = [run(*(x.to(device) for x in tensors), **keywords) for tensors in alone]
    return unpacked(tree_map(torch.Tensor.cpu, packed), packing), [tree_map(torch.Tensor.cpu, each) for each in separate]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "shift": True}, {"causal": True, "pv": "bf16", "heads": (3, 1)}], ids=str
)
def test_packed_documents_are_as_if_alone_to_the_bit(options, device):
    packed, alone = on(device, run_packed, **options)
    assert len(packed) == len(DOCUMENTS)
    for each, wanted in zip(packed, alone, strict=True):
        assert_same_bits(each, wanted)


def run_opcheck(case: Case, *, device: str) -> None:
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in case.tensors(torch.bfloat16))
    masks = [None if x is None else x.to(device) for x in (case.key_mask(), case.k_shift())]
    rest = (*masks, case.spec().to_json(), case.causal, 0.2)
    op = torch.ops.qat_kernels
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op.attention_forward.default, (*leaves, *rest, True, "triton"))
    torch.library.opcheck(op.attention_forward.default, (q, k, v, *rest, False, "triton"))
    out, twin, _, stats, codes = op.attention_forward(q, k, v, *rest, True, "triton")
    twin = out if case.pv == "bf16" else twin
    rest = (*masks, k.shape[2], k.shape[1], case.spec().to_json(), case.causal, 0.2)
    torch.library.opcheck(op.attention_backward.default, (grad_out, None, None, v, twin, stats, codes, *rest, "triton"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"causal": True, "lq": 9}, {"pv": "bf16", "mask": "holes", "shift": True, "lk": 9}], ids=str)
def test_opcheck(options, device):
    on(device, run_opcheck, Case(**{**SMALL, **options}))


def test_wrong_calls_say_what_was_expected():
    q, k, v, _ = Case().tensors(torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton': expected tensors on an NVIDIA GPU, got cpu; use impl='eager'"):
        attention(q, k, v, impl="triton")
    with pytest.raises(
        ValueError, match=r"dtype with impl='triton': expected float32, float16 or bfloat16; .*, got torch.float64"
    ):
        attention(q.double(), k.double(), v.double(), impl="triton")


def no_gpu_of(device: str) -> str:
    from qat_kernels import triton_attention

    with (
        mock.patch.object(triton_attention, "INTERPRET", mock.Mock(value=False)),
        mock.patch.object(triton_attention, "_arch", lambda _: 75),
    ):
        try:
            triton_attention.check_device(torch.device(device))
        except ValueError as refusal:
            return str(refusal)


def test_old_gpus_are_refused():
    assert "expected sm_80 or later, got sm_75" in interpreted(no_gpu_of, "cuda")


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
    bf16_values = dataclasses.replace(case, pv="bf16")
    tensors = bf16_values.tensors(torch.bfloat16)
    expected = run_reference(bf16_values, tensors)
    assert_within_bounds(run_kernels(bf16_values, tensors, device="cuda"), expected, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_checkpointing_and_autocast_change_nothing():
    case = Case(lq=300, lk=300, causal=True)
    q, k, v, grad_out = (x.cuda() for x in case.tensors(torch.bfloat16))

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    def call(q, k, v):
        return attention(q, k, v, causal=True)

    expected = gradients(call)
    assert_same_bits(gradients(lambda *x: checkpoint(call, *x, use_reentrant=False)), expected)
    with torch.autocast("cuda", dtype=torch.float16):
        assert_same_bits(gradients(call), expected)


@pytest.mark.gpu
def test_forward_without_gradient_runs_in_a_cuda_graph():
    q, k, v, _ = (x.cuda() for x in Case(lq=300, lk=300, causal=True).tensors(torch.bfloat16))
    expected = attention(q, k, v, causal=True, spec=QuantSpec(), impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = attention(q, k, v, causal=True, spec=QuantSpec(), impl="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
