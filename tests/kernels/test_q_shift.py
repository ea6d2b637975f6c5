"""`q_shift` (docs/NUMERICS.md, section 6): Q is shifted before it is quantized, and each key gets a bias that makes up for it."""

from dataclasses import replace

import pytest
import torch

from qat_kernels import QuantSpec, attention, explain, reference
from qat_kernels.nvfp4 import in_format
from support.kernels import oracle
from support.kernels.cases import Case, assert_same_bits, error, forward_op, lse_error, plain_attention, run, run_case
from support.kernels.packed_cases import problem, unpacked

CASES = [
    Case(q_shifted=True, seed=seed, **options)
    for seed, options in enumerate(
        (
            {"lq": 75, "lk": 90},
            {"causal": True, "lq": 75, "lk": 90, "heads": (6, 3)},
            {"shift": True, "mask": "left", "causal": True, "scale": 0.3},
            {"rotate": True, "coarse": True, "head_dim": 128},
            {"rotate": True, "shift": True, "coarse": True, "head_dim": 16, "four_over_six": True, "causal": True},
            {"rotate": True, "coarse": True, "scale": -0.2, "mask": "holes"},
            {"scale": -0.3, "mask": "empty row", "lq": 40},
            {"scale": 0.0},
            {"preset": "nvfp4_qk", "causal": True, "mask": "right", "shift": True},
            {"preset": "nvfp4_qk", "softcap": 2.0, "heads": (3, 1)},
            {"softcap": 1.5, "sinks": True, "causal": True, "window": 20, "mask": "left", "lq": 90, "lk": 90},
            {"rotate": True, "coarse": True, "softcap": 1.5, "sinks": True, "mask": "holes"},
            {"causal": True, "block_size": 8, "window": 24, "prefix": 5, "lq": 150, "lk": 150, "batch": 1},
            {"bounds": "images", "prefix": 3, "lq": 90, "lk": 90, "shift": True},
            {"head_dim": 48, "head_dim_v": 80, "size": 3.0},
            {"lq": 3, "lk": 0},
        )
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_equal_the_oracle(case):
    tensors = case.tensors()
    expected = oracle.attention(*tensors[:3], **case.oracle_options())
    out, lse, grads = run(*tensors, **case.options())
    assert error(out, expected["out"]) < 1e-10
    assert lse_error(lse, expected["lse"]) < 1e-10
    if case.preset == "nvfp4":
        assert error(forward_op(case, *tensors[:3])[1], expected["out_hp"]) < 1e-10
    formulas = oracle.backward(*tensors, **case.oracle_options())
    autograd = oracle.autograd_backward(*tensors, **case.oracle_options())
    for at, (grad, wanted, also) in enumerate(zip(grads, formulas, autograd, strict=True)):
        assert error(grad, wanted) < (1e-10 if at < 3 else 1e-6)  # sinks are float32
        assert error(also, wanted) < 1e-10


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_tangents_equal_the_oracle(case):
    tensors = case.tensors()[:3]
    generator = torch.Generator().manual_seed(9)
    tangents = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in tensors]
    options = case.options()
    moved, directions = list(tensors), list(tangents)
    if case.sinks:
        moved.append(options.pop("sinks").double())
        directions.append(torch.randn(moved[3].shape, dtype=torch.float64, generator=generator))

    def call(q, k, v, sinks=None):
        return attention(q, k, v, **options, **({} if sinks is None else {"sinks": sinks}))

    _, along = torch.func.jvp(call, tuple(moved), tuple(directions))
    keywords = case.oracle_options() | ({"sinks": moved[3]} if case.sinks else {})
    assert error(along, oracle.tangent(*tensors, directions, **keywords)) < 1e-10


def test_gradients_of_torch_func_and_vmap_are_those_of_backward():
    case = CASES[2]
    *tensors, grad_out = case.tensors()
    expected = run_case(case)[2]

    def loss(*tensors):
        return (attention(*tensors, **case.options()) * grad_out).sum()

    for grad, wanted in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        assert error(grad, wanted) < 1e-12
    options = case.options() | {"key_mask": None}
    batch = torch.vmap(lambda *x: attention(*(each[None] for each in x), **options)[0])(*tensors)
    assert error(batch, attention(*tensors, **options)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"causal": True, "rotate": True, "shift": True}, {"preset": "nvfp4_qk"}], ids=str)
def test_packed_documents_are_as_if_alone_to_the_bit(options):
    _, alone, together, keywords, packing = problem(q_shifted=True, **options)
    for tensors, found in zip(alone, unpacked(run(*together, **keywords, **packing), packing), strict=True):
        assert_same_bits(found, run(*tensors, **keywords))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "mask": "left", "shift": True}, {"rotate": True, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_shift_of_zero_changes_no_bit(options, dtype):
    case = Case(**options)
    tensors, keywords = case.tensors(dtype), case.options()
    zero = torch.zeros(case.heads[1], case.head_dim)
    assert_same_bits(run(*tensors, **keywords, q_shift=zero), run(*tensors, **keywords))


@pytest.mark.parametrize("spec", [QuantSpec(preset="nvfp4_qk"), QuantSpec(preset="nvfp4_qk", rotate=True)], ids=str)
def test_the_mean_of_queries_costs_less_if_it_is_subtracted(spec):
    """Q of one key head share a large mean, as those of language models do: then most of the rounding is that of the mean."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 64, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    mean = torch.randn(2, 64, generator=generator) * 6
    q = q + mean.repeat_interleave(2, 0)[:, None]
    scale = 0.02
    exact, exact_lse = plain_attention(q, k, v, torch.ones((), dtype=torch.bool), scale)
    without = attention(q, k, v, spec=spec, scale=scale)
    shifted, lse = attention(q, k, v, spec=spec, scale=scale, q_shift=mean, return_lse=True)
    assert error(shifted, exact) < 0.5 * error(without, exact)
    assert float((lse - exact_lse).abs().max()) < 0.2


def test_a_future_token_leaves_earlier_outputs_bit_identical():
    case = Case(causal=True, q_shifted=True, lq=50, lk=50)
    q, k, v, _ = case.tensors(torch.float32)
    before = attention(q, k, v, **case.options())
    k[:, :, 37], v[:, :, 37] = 50.0, 50.0
    assert_same_bits(attention(q, k, v, **case.options())[:, :, :37], before[:, :, :37])


@pytest.mark.parametrize("mask", ["holes", "left"])
def test_what_masked_slots_hold_has_no_effect(mask):
    case = Case(mask=mask, causal=True, shift=True, q_shifted=True)
    q, k, v, grad_out = case.tensors(torch.float32)
    excluded = ~case.key_mask()[:, None, :, None]
    expected = run(q, k, v, grad_out, **case.options())
    k, v = (x.masked_fill(excluded, torch.nan) for x in (k, v))
    assert_same_bits(run(q, k, v, grad_out, **case.options()), expected)


def test_cached_operands_give_the_same():
    case = Case(causal=True, q_shifted=True, shift=True, rotate=True, coarse=True, preset="nvfp4_qk", lk=40)
    q, k, v, _ = case.tensors()
    spec, shift, q_shift = case.spec(), case.k_shift(), case.q_shift()
    shifted = k.float() - shift[:, None]
    key_fq = in_format(reference.rotated(shifted, spec), spec.formats.key).double()
    bias = reference.key_bias(shifted, q_shift, spec, torch.float64)
    assert bias.dtype == torch.float32
    positions = torch.arange(case.lk - case.lq, case.lk)[None]
    out, lse = reference.forward_cached(
        q, key_fq, v, v, torch.ones(case.batch, case.lk, dtype=torch.bool), positions, shift, q_shift, bias,
        spec=spec, scale=0.2, window=None, softcap=None, sinks=None,
    )  # fmt: skip
    options = replace(case, scale=0.2).options()
    assert_same_bits((out, lse), attention(q, k, v, **options, return_lse=True))


def test_opcheck():
    case = Case(lq=20, lk=20, mask="holes", shift=True, q_shifted=True)
    q, k, v, grad_out = case.tensors(torch.bfloat16)
    first = (case.key_mask(), case.k_shift())
    plain = (case.spec().to_json(), case.seen().to_json(), 0.2)
    op, last = torch.ops.qat_kernels, {"q_shift": case.q_shift()}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op.attention_forward.default, (*leaves, *first, *plain, True, "eager"), last)
    _, out_hp, _, stats, codes = op.attention_forward(q, k, v, *first, *plain, True, "eager", **last)
    saved = (out_hp, stats, codes, *first, k.shape[2], k.shape[1])
    torch.library.opcheck(op.attention_backward.default, (grad_out, q, k, v, *saved, *plain, "eager"), last)
    torch.library.opcheck(op.attention_tangent.default, (q, k, v, q, k, v, *first, *plain), last)


REFUSED = [
    ({"q_shift": torch.zeros(4, 32)}, r"q_shift: expected torch.float32 \[2, 32\] on cpu, got torch.float32 \[4, 32\] on cpu"),
    ({"q_shift": torch.zeros(2, 32).bfloat16()}, r"q_shift: expected torch.float32 .*, got torch.bfloat16 \[2, 32\]"),
    ({"q_shift": torch.zeros(2, 32, device="meta")}, r"q_shift: expected .* on cpu, got .* on meta"),
    ({"spec": QuantSpec(preset="kv_nvfp4")}, r"q_shift with preset='kv_nvfp4': expected None: its servers subtract none"),
    ({"spec": QuantSpec(preset="fa4_fp4")}, r"q_shift with preset='fa4_fp4': expected None: its servers subtract none"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_wrong_calls_say_what_was_expected(changes, message):
    case = Case(q_shifted=True, lq=5, lk=7)
    q, k, v, _ = case.tensors(torch.float32)
    with pytest.raises(ValueError, match=rf"^attention: {message}"):
        attention(q, k, v, **case.options() | changes)


def test_explain_says_what_computes_it():
    case = Case(q_shifted=True)
    q, k, v, _ = case.tensors(torch.bfloat16)
    fp4, triton, eager = explain(q, k, v, q_shift=case.q_shift()).splitlines()
    assert "expected tensors on an NVIDIA GPU" in fp4 and "expected tensors on an NVIDIA GPU" in triton
    assert eager == "eager: runs, in PyTorch"
