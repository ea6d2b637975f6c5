"""The presets of servers, forward, backward and tangent, against the oracle; what their servers cannot compute is refused.

docs/NUMERICS.md, section 9.
"""

import dataclasses
import functools

import pytest
import torch

from qat_kernels import QuantSpec, attention, explain
from qat_kernels.nvfp4 import p_in_format
from qat_kernels.ran import counted
from qat_kernels.spec import NVFP4Format
from support.kernels import oracle
from support.kernels.cases import Case, error

SAGE = {"head_dim": 64, "heads": (2, 2)}
CASES = [
    Case(**case)
    for case in (
        {"preset": "kv_nvfp4"},
        {"preset": "kv_nvfp4", "causal": True, "lq": 9, "scale": 0.3},
        {"preset": "kv_nvfp4", "causal": True, "mask": "left", "heads": (3, 1)},
        {"preset": "kv_nvfp4", "mask": "empty row", "size": 1e-3},
        {"preset": "kv_nvfp4", "causal": True, "lq": 1, "head_dim": 48},
        {"preset": "kv_nvfp4_fp8", "causal": True, "mask": "holes"},
        {"preset": "kv_nvfp4_fp8", "size": 300.0, "scale": 1e-6},
        {"preset": "kv_nvfp4_4over6", "causal": True, "coarse": True},
        {"preset": "fa4_fp4", "causal": True, "mask": "right"},
        {"preset": "fa4_fp4", "head_dim": 80, "scale": -0.2},
        {"preset": "sage3", **SAGE, "lq": 300, "lk": 140, "batch": 1},
        {"preset": "sage3", "head_dim": 128, "heads": (1, 1), "lq": 128, "lk": 31},
        {"preset": "sage3", **SAGE, "lq": 1, "lk": 40, "size": 10.0},
        {"preset": "fastvideo_sm120", "heads": (2, 2), "lk": 70},
        {"preset": "fastvideo_sm120", "heads": (1, 1), "size": 3.0},
    )
]
IDS = [str(case) for case in CASES]


def gradients(attend, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    q, k, v, grad_out = tensors
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attend(*leaves), leaves, grad_out)


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_output_and_gradients_equal_the_oracle(case, impl):
    """Straight through: the derivative of every rounding is 1, of those inside the smoothing too."""
    tensors = case.tensors()
    q, k, v, grad_out = tensors
    attend = functools.partial(attention, **case.options(), impl=impl)
    assert error(attend(q, k, v), oracle.attention(q, k, v, **case.oracle_options())["out"]) < 1e-10
    expected = oracle.autograd_backward(q, k, v, grad_out, **case.oracle_options())
    for ours, exact in zip(gradients(attend, tensors), expected, strict=True):
        assert error(ours, exact) < 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case.batch == 2 and case.lq < 100], ids=str)
def test_tangents_equal_the_oracle(case):
    q, k, v, _ = case.tensors()
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    _, tangent = torch.func.jvp(functools.partial(attention, **case.options()), (q, k, v), tangents)
    assert error(tangent, oracle.tangent(q, k, v, tangents, **case.oracle_options())) < 1e-9


@pytest.mark.parametrize("preset", ["kv_nvfp4", "kv_nvfp4_fp8", "fa4_fp4"])
def test_packed_documents_are_as_if_alone(preset):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 32, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 17, 17, 40], dtype=torch.int32)
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 23, "max_seqlen_k": 23}
    spec = QuantSpec(preset=preset)
    out = attention(q, k, v, spec=spec, causal=True, **packed)
    for start, stop in ((0, 17), (17, 40)):
        alone = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        assert error(out[start:stop].transpose(0, 1)[None], attention(*alone, spec=spec, causal=True)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sdpa_computes_with_the_quantized_values_in_any_dtype(dtype, causal):
    """They are exact in 16 bits, so nothing is lost but what SDPA itself rounds; also with strides, and compiled."""
    case = Case(preset="kv_nvfp4", causal=causal, lq=33, lk=47, heads=(4, 2))
    q, k, v, _ = case.tensors(dtype)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    expected = attention(q.float(), k.float(), v.float(), **case.options(), impl="eager")
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(attention(q, k, v, **case.options()), expected) < bound
    compiled = torch.compile(functools.partial(attention, **case.options()), fullgraph=True, backend="aot_eager")
    assert error(compiled(q, k, v), expected) < bound


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_what_a_mask_excludes_is_never_computed_with(impl):
    case = Case(preset="kv_nvfp4", mask="holes")
    q, k, v, grad_out = case.tensors(torch.float32)
    attend = functools.partial(attention, **case.options(), impl=impl)
    excluded = ~case.key_mask()[:, None, :, None]
    clean, grads = attend(q, k, v), gradients(attend, [q, k, v, grad_out])
    poisoned = [q, *(x.masked_fill(excluded, torch.nan) for x in (k, v)), grad_out]
    assert torch.equal(attend(*poisoned[:3]), clean)
    for ours, plain in zip(gradients(attend, poisoned), grads, strict=True):
        assert torch.equal(ours, plain)


def test_probabilities_of_sage():
    """Worked by hand: the largest is 6, however the scale is rounded; groups without a scale vanish."""
    p = torch.zeros(2, 32)
    p[0, :4] = torch.tensor([1.0, 0.5, 0.25, 0.04])
    p[0, 16], p[1, 0] = 2.0**-20, 0.013
    values, too_large = p_in_format(p, "sage")
    assert too_large == 2688 and torch.equal(values[0, :4], 448 * torch.tensor([6.0, 3.0, 1.5, 0.0]))
    assert values[0, 16] == 0  # 2^-20 * 448 is under half of the smallest scale
    assert values[1, 0] == 6 * torch.tensor(0.013 * 448).to(torch.float8_e4m3fn).float()
    values, too_large = p_in_format(p, "sage_one_level")
    scale = torch.tensor(1 / 6).to(torch.float8_e4m3fn).float()
    assert too_large == 1 and torch.equal(values[0, :4], scale * torch.tensor([6.0, 3.0, 1.5, 0.0]))


def test_every_preset_says_what_it_does_and_options_are_ours():
    for preset in oracle.PRESETS:
        spec = QuantSpec(preset=preset)
        assert QuantSpec.from_json(spec.to_json()) == spec and spec.rules.what
    spec = QuantSpec(preset="nvfp4", four_over_six=True)
    formats = [x for x in spec.formats if isinstance(x, NVFP4Format)]
    assert len(formats) == 3 and all(each.four_over_six for each in formats)
    assert dataclasses.replace(spec, four_over_six=False).formats == QuantSpec().formats


REFUSED = [
    ("sage3", {"causal": True}, "causal with preset='sage3': expected False"),
    ("fastvideo_sm120", {"causal": True, "heads": (2, 2)}, "causal with preset='fastvideo_sm120'"),
    ("sage3", {"mask": "left"}, "key_mask and cu_seqlens with preset='sage3'"),
    ("sage3", {"heads": (4, 2)}, "heads with preset='sage3': expected as many key heads"),
    ("sage3", {"head_dim": 32}, "head_dim with preset='sage3': expected 64 or 128, got 32"),
    ("sage3", {"scale": 0.3}, "scale with preset='sage3': expected None or 0.125"),
    ("sage3", {"shift": True}, "k_shift with preset='sage3': expected None"),
    ("kv_nvfp4", {"shift": True, **SAGE}, "k_shift with preset='kv_nvfp4': expected None"),
    ("sage3", {"return_lse": True}, "return_lse with preset='sage3'"),
    ("kv_nvfp4", {"return_lse": True}, "return_lse with preset='kv_nvfp4': expected False; or impl='eager'"),
    ("kv_nvfp4", {"impl": "triton"}, "impl with preset='kv_nvfp4': expected one of auto, eager, sdpa, got 'triton'"),
    ("nvfp4", {"impl": "sdpa"}, "impl with preset='nvfp4': expected one of auto, eager, triton, fp4, got 'sdpa'"),
    ("sage3", {"impl": "fp4"}, "impl with preset='sage3': expected one of auto, eager, triton, sageattn3, got 'fp4'"),
    ("kv_nvfp4_fp8", {"impl": "triton"}, "impl with preset='kv_nvfp4_fp8': expected one of auto, eager, got 'triton'"),
]


@pytest.mark.parametrize(("preset", "options", "message"), REFUSED)
def test_what_servers_cannot_compute_is_refused_by_name(preset, options, message):
    call = {name: options[name] for name in ("return_lse", "impl") if name in options}
    case = Case(**{"preset": preset, **SAGE} | {name: x for name, x in options.items() if name not in call})
    q, k, v, _ = case.tensors(torch.float32)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(q, k, v, **case.options(), **call)


def test_packed_documents_on_a_cpu_are_eager_and_sdpa_says_why():
    x = torch.randn(5, 2, 32)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(ValueError, match="impl='sdpa': PyTorch packs sequences on a GPU in 16 bits only; use impl='eager'"):
        attention(x, x, x, spec=QuantSpec(preset="kv_nvfp4"), impl="sdpa", **packed)


def test_explain_names_the_preset():
    x = torch.randn(1, 2, 16, 64)
    lines = explain(x, x, x, spec=QuantSpec(preset="kv_nvfp4")).splitlines()
    assert "triton: cannot run: it does not compute preset='kv_nvfp4'" in lines
    assert "sdpa: runs, as PyTorch's own attention, with K and V fake-quantized" in lines
    assert "fp4: cannot run: it does not compute preset='sage3'" in explain(x, x, x, spec=QuantSpec(preset="sage3"))


def test_sizes_may_be_symbolic():
    """One graph for all lengths, causal too: PyTorch's attention takes no symbolic bool."""
    spec = QuantSpec(preset="kv_nvfp4")
    attend = torch.compile(
        functools.partial(attention, spec=spec, causal=True), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (32, 48, 1):
        q, k, v, _ = Case(preset="kv_nvfp4", lq=length, lk=length).tensors(torch.float32)
        assert error(attend(q, k, v), attention(q, k, v, spec=spec, causal=True)) < 1e-6


@pytest.mark.parametrize("preset", ["kv_nvfp4", "sage3"])
def test_autocast_changes_nothing(preset):
    case = Case(preset=preset, **SAGE, lq=40, lk=40)
    tensors = case.tensors(torch.float32)
    attend = functools.partial(attention, spec=case.spec())
    plain = [attend(*tensors[:3]), *gradients(attend, tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [attend(*tensors[:3]), *gradients(attend, tensors)]
    for ours, expected in zip(inside, plain, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_second_derivatives_of_sdpa_are_refused_by_name(which):
    leaves = Case(preset="kv_nvfp4", lq=8, lk=8).tensors(torch.float64)[:3]
    leaves[which].requires_grad_()
    with pytest.raises(ValueError, match="expected one derivative"):
        torch.autograd.grad(attention(*leaves, spec=QuantSpec(preset="kv_nvfp4")).sum(), leaves[which], create_graph=True)


def test_what_ran_is_counted_once_for_everybody_who_counts():
    q, k, v, _ = Case(preset="kv_nvfp4").tensors(torch.float32)
    with counted() as outer, counted() as inner:
        attention(q, k, v, spec=QuantSpec(preset="kv_nvfp4"))
        with counted() as innermost:
            attention(q, k, v)
    assert (inner, outer, innermost) == ({"sdpa": 1, "eager": 1}, {"sdpa": 1, "eager": 1}, {"eager": 1})
