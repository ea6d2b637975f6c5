"""The gradient of the eager attention (docs/NUMERICS.md, section 5), and the op under PyTorch's machinery."""

import os
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qat_kernels import QuantSpec, attention
from support.kernels import oracle
from support.kernels.cases import (
    SPECS,
    UNEQUAL_HEAD_DIMS,
    Case,
    assert_same_bits,
    error,
    exact_problem,
    forward_op,
    plain_attention,
    random_cases,
    run,
    run_case,
)


def errors(grads, expected, case: Case, tensors) -> list[float]:
    """Of dQ, dK and dV; those of dQ and dK relative to what would be there without cancellation, if that is more."""
    return [
        error(grad, wanted, at_least)
        for grad, wanted, at_least in zip(
            grads, expected, [*oracle.uncancelled(*tensors, **case.oracle_options()), 0.0], strict=True
        )
    ]


@pytest.mark.parametrize("case", [*random_cases(64), *UNEQUAL_HEAD_DIMS], ids=str)
def test_gradients_equal_the_oracle(case):
    tensors = case.tensors()
    formulas = oracle.backward(*tensors, **case.oracle_options())
    autograd = oracle.autograd_backward(*tensors, **case.oracle_options())
    assert max(errors(autograd, formulas, case, tensors)) < 1e-12
    _, _, grads = run(*tensors, **case.options())
    tolerance = 1e-10 if case.size <= 1e2 else 1e-8
    assert max(errors(grads, formulas, case, tensors)) < tolerance
    assert max(errors(grads, autograd, case, tensors)) < tolerance


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_unsaturated_gradients_equal_the_oracle_without_allowance(options):
    """Nothing cancels here, so that the plain relative error is a bound."""
    case = Case(lq=75, lk=90, coarse=True, seed=10, **options)
    tensors = case.tensors()
    _, _, grads = run(*tensors, **case.options())
    for grad, expected in zip(grads, oracle.backward(*tensors, **case.oracle_options()), strict=True):
        assert error(grad, expected) < 1e-13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"rotate": True}, {"four_over_six": True}, {"rotate": True, "four_over_six": True}], ids=str)
def test_sums_that_round_differently_flip_few_codes(options, causal):
    case = Case(lq=90, lk=90, head_dim=64, causal=causal, shift=True, mask="holes", seed=3, **options)
    tensors = case.tensors()
    _, _, grads = run(*tensors, **case.options())
    for grad, expected in zip(grads, oracle.backward(*tensors, **case.oracle_options()), strict=True):
        assert error(grad, expected) < 3e-2


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
@pytest.mark.parametrize("mask", [None, "holes", "left"])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_inputs_give_the_gradients_of_plain_attention(causal, mask, preset):
    """D comes from O', dP from V: where only P is rounded, dQ and dK are exact, and dV is that of the rounded P."""
    case, (q, k, v), allowed = exact_problem(causal, mask, shift=True)
    grad_out = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(plain_attention(*leaves, allowed, case.scale)[0], leaves, grad_out)
    _, _, (dq, dk, dv) = run(q, k, v, grad_out, **case.options() | {"spec": QuantSpec(preset=preset)})
    assert error(dq, expected[0]) < 1e-12
    assert error(dk, expected[1]) < 1e-12
    if preset == "nvfp4_qk":
        assert error(dv, expected[2]) < 1e-12
    else:
        assert 1e-3 < error(dv, expected[2]) < 0.2


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_gradients_are_contiguous_whatever_the_strides_of_the_inputs(options):
    case = Case(seed=11, **options)
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(torch.float32))
    assert all(x.is_contiguous() for x in run(q, k, v, grad_out, **case.options())[2])


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_expanded_and_broadcast_gradients(options):
    """`out.sum().backward()` hands over a gradient with all strides zero."""
    case = Case(seed=12, **options)
    q, k, v, grad_out = case.tensors(torch.float32)
    for expanded in (torch.ones(()).expand(q.shape), grad_out[:, :1, :1].expand(q.shape)):
        assert_same_bits(run(q, k, v, expanded, **case.options()), run(q, k, v, expanded.contiguous(), **case.options()))


OPCHECK_CASES = [
    (Case(batch=1, lq=20, lk=20, causal=True), torch.float32),
    (Case(batch=2, lq=5, lk=37, mask="holes", shift=True), torch.bfloat16),
    (Case(batch=1, lq=17, lk=17, preset="nvfp4_qk", causal=True, rotate=True), torch.float16),
    (Case(batch=1, lq=3, lk=0, four_over_six=True), torch.float64),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("case", "dtype"), OPCHECK_CASES, ids=str)
def test_opcheck(case, dtype, transposed):
    tensors = case.tensors(dtype)
    if transposed:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    q, k, v, grad_out = tensors
    rest = (case.key_mask(), case.k_shift(), case.spec().to_json(), case.seen().to_json(), 0.2)
    op = torch.ops.qat_kernels
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op.attention_forward.default, (*leaves, *rest, True, "eager"))
    torch.library.opcheck(op.attention_forward.default, (q, k, v, *rest, False, "eager"))
    out, out_hp, _, stats, codes = op.attention_forward(q, k, v, *rest, True, "eager")
    out_hp = out if case.preset == "nvfp4_qk" else out_hp
    rest = (*rest[:2], k.shape[2], k.shape[1], *rest[2:])
    torch.library.opcheck(op.attention_backward.default, (grad_out, q, k, v, out_hp, stats, codes, *rest, "eager"))


def without_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is None


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(without_compiler(), reason="inductor needs a C++ compiler"))],
)
@pytest.mark.parametrize(
    "options", [{"causal": True, "mask": "holes"}, {"preset": "nvfp4_qk", "rotate": True, "shift": True}], ids=str
)
def test_compiled_equals_eager(backend, options):
    """One graph, forward and backward, transposed views included; a second length and spec take another graph."""
    torch._dynamo.reset()

    def function(q, k, v, **keywords):
        q, k, v = (x.transpose(1, 2) for x in (q * 2, k, v + v))
        out, lse = attention(q, k, v, return_lse=True, **keywords)
        return out.transpose(1, 2) * 2, lse

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for case in (Case(lq=33, lk=33, **options), Case(lq=40, lk=40, **{**options, "four_over_six": True})):
        results = []
        for each in (function, compiled):
            *tensors, grad_out = (x.transpose(1, 2).contiguous() for x in case.tensors(torch.float32))
            leaves = [x.requires_grad_() for x in tensors]
            out, lse = each(*leaves, **case.options())
            results.append((out, lse, torch.autograd.grad(out, leaves, grad_out)))
        assert_same_bits(results[1], results[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_autocast_changes_nothing(options):
    """The op keeps the dtype of its inputs and its float32 arithmetic, forward and backward."""
    case = Case(seed=13, **options)
    expected = run_case(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run_case(case, torch.float32), expected)


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_without_gradients_the_output_is_the_same(options):
    case = Case(seed=14, **options)
    q, k, v, _ = case.tensors(torch.float32, requires_grad=True)
    with_gradient = attention(q, k, v, return_lse=True, **case.options())
    assert with_gradient[0].requires_grad
    assert not with_gradient[1].requires_grad  # LSE is not differentiable
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_same_bits(attention(q, k, v, return_lse=True, **case.options()), with_gradient)
    assert_same_bits(attention(*(x.detach() for x in (q, k, v)), return_lse=True, **case.options()), with_gradient)


def test_the_twin_is_computed_for_gradients_only():
    case = Case()
    q, k, v, _ = case.tensors(torch.float32)
    assert forward_op(case, q, k, v, needs_gradient=True)[1].shape == q.shape
    assert forward_op(case, q, k, v, needs_gradient=False)[1].numel() == 0


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_inputs_require_gradients(wanted, options):
    case = Case(seed=15, **options)
    *qkv, grad_out = case.tensors()
    _, _, expected = run(*qkv, grad_out, **case.options())
    inputs = [x.requires_grad_(index in wanted) for index, x in enumerate(qkv)]
    out = attention(*inputs, **case.options())
    out.backward(grad_out)
    for index, x in enumerate(inputs):
        assert x.grad is None if index not in wanted else torch.equal(x.grad, expected[index])


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_gradient_checkpointing_gives_equal_gradients(options):
    case = Case(seed=16, **options)
    *leaves, grad_out = case.tensors(torch.float32, requires_grad=True)
    plain = attention(*leaves, **case.options())
    checkpointed = checkpoint(lambda *x: attention(*x, **case.options()), *leaves, use_reentrant=False)
    assert_same_bits(checkpointed, plain)
    assert_same_bits(torch.autograd.grad(checkpointed, leaves, grad_out), torch.autograd.grad(plain, leaves, grad_out))


def test_double_backward_raises():
    q, k, v, grad_out = Case().tensors(requires_grad=True)
    (dq,) = torch.autograd.grad(attention(q, k, v), q, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(ValueError, match="attention: .* no second derivative"):
        dq.sum().backward()


def test_inputs_are_left_alone():
    case = Case(causal=True, mask="holes", shift=True, rotate=True)
    tensors = case.tensors(torch.float32)
    copies = [x.clone() for x in tensors]
    options = case.options()
    mask, shift = options["key_mask"].clone(), options["k_shift"].clone()
    run(*tensors, **options)
    assert_same_bits((*tensors, options["key_mask"], options["k_shift"]), (*copies, mask, shift))
