"""Derivatives of attention beside `backward`: forward mode, torch.func, vmap, torch.compile around them, and what is refused."""

import logging
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from qat_kernels import KVCache, QuantSpec, attention, dequantize, fake_quantize, quantize
from support.kernels import oracle
from support.kernels.cases import (
    SPECS,
    UNEQUAL_HEAD_DIMS,
    Case,
    assert_same_bits,
    error,
    exact_problem,
    plain_attention,
    random_cases,
)
from support.kernels.interpreter import interpreted, on
from support.kernels.packed_cases import problem as packed_problem
from support.kernels.triton_runs import DEVICES, SMALL

SECOND = "expected one derivative: .* no second derivative"
Q, K, V, ALONG = (torch.randn(2, 2, 20, 32, generator=torch.Generator().manual_seed(n)) for n in range(4))


def directions(tensors, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in tensors]


def along(function, tensors, tangents) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function computes, and its tangent; by torch.func and by a level of forward mode, which have to agree."""
    out, tangent = jvp(function, tuple(tensors), tuple(tangents))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, tensors, tangents)))
    assert_same_bits(dual, (out, tangent))
    return out, tangent


@pytest.mark.parametrize(
    "case",
    [*random_cases(40), *UNEQUAL_HEAD_DIMS, *(Case(lq=75, lk=90, coarse=True, **spec) for spec in SPECS)],
    ids=str,
)
def test_tangents_equal_the_oracle(case):
    tensors = case.tensors()[:3]
    tangents = directions(tensors)
    out, tangent = along(partial(attention, **case.options()), tensors, tangents)
    assert_same_bits(out, attention(*tensors, **case.options()))
    expected = oracle.tangent(*tensors, tangents, **case.oracle_options())
    assert error(tangent, expected) < 1e-12


@pytest.mark.parametrize("moved", range(3))
@pytest.mark.parametrize("options", SPECS[:4], ids=str)
def test_tangents_of_one_input_are_the_transpose_of_its_gradient(options, moved):
    case = Case(lq=37, lk=37, **options)
    *tensors, grad_out = case.tensors()
    tangents = directions(tensors)

    def function(x):
        return attention(*tensors[:moved], x, *tensors[moved + 1 :], **case.options())

    _, tangent = along(function, tensors[moved : moved + 1], tangents[moved : moved + 1])
    (gradient,) = vjp(function, tensors[moved])[1](grad_out)
    torch.testing.assert_close((tangent * grad_out).sum(), (gradient * tangents[moved]).sum(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_inputs_give_the_tangents_of_plain_attention(causal):
    case, tensors, allowed = exact_problem(causal, "holes", shift=True)
    tangents = directions(tensors)
    expected = jvp(lambda *x: plain_attention(*x, allowed, case.scale)[0], tensors, tuple(tangents))[1]
    _, tangent = along(partial(attention, **case.options() | {"spec": QuantSpec(preset="nvfp4_qk")}), tensors, tangents)
    assert error(tangent, expected) < 1e-12


def test_a_tangent_predicts_a_difference():
    """Rounding hides small steps, so the step is large: the straight-through tangent is right on average."""
    difference = (attention(Q, K, V + ALONG) - attention(Q, K, V - ALONG)) / 2
    assert error(along(partial(attention, Q, K), [V], [ALONG])[1], difference) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", SPECS, ids=str)
def test_dtype_strides_and_bits(options, dtype):
    case = Case(lq=40, lk=40, **options)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(dtype)[:3]]
    tangents = directions(tensors)
    call = partial(attention, **case.options())
    out, tangent = along(call, tensors, tangents)
    assert_same_bits(out, call(*tensors))
    assert (tangent.dtype, tangent.stride()) == (dtype, out.stride())
    exact = jvp(call, tuple(x.double() for x in tensors), tuple(t.double() for t in tangents))[1]
    assert error(tangent, exact) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(along(call, tensors, tangents), (out, tangent))


@pytest.mark.parametrize("options", [{}, {"causal": True, "shift": True}, {"causal": True, "head_dim_v": 48}], ids=str)
def test_packed_documents_are_as_if_alone_to_the_bit(options):
    _, alone, together, keywords, packing = packed_problem(torch.float64, ((33, 33), (1, 1), (5, 40), (0, 0), (7, 0)), **options)
    tangents = directions(together[:3])
    out, tangent = along(partial(attention, **keywords, **packing), together[:3], tangents)
    start_q = start_k = 0
    for tensors in alone:
        lengths = (tensors[0].shape[2], tensors[1].shape[2])
        rows, keys = slice(start_q, start_q + lengths[0]), slice(start_k, start_k + lengths[1])
        own = [t[where].transpose(0, 1)[None] for t, where in zip(tangents, (rows, keys, keys), strict=True)]
        each = jvp(partial(attention, **keywords), tuple(tensors[:3]), tuple(own))
        assert_same_bits([x[rows].transpose(0, 1)[None] for x in (out, tangent)], each)
        start_q, start_k = start_q + lengths[0], start_k + lengths[1]


def loss(*tensors: torch.Tensor) -> torch.Tensor:
    return attention(*tensors, causal=True).square().sum()


def ordinary_gradient(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_gradients_of_torch_func_are_those_of_backward():
    expected = ordinary_gradient(Q, K, V)
    assert_same_bits(grad(loss, (0, 1, 2))(Q, K, V), expected)
    out, transpose = vjp(partial(attention, causal=True), Q, K, V)
    assert_same_bits(transpose(2 * out), expected)
    with torch.no_grad():  # torch.func asks for a gradient by itself
        assert_same_bits(grad(loss, (0, 1, 2))(Q, K, V), expected)


@pytest.mark.parametrize("head_dim_v", [32, 16])
def test_vmap_over_everything_equals_single_calls(head_dim_v):
    value, direction = V[..., :head_dim_v], ALONG[..., :head_dim_v]
    q, k, v, t = (torch.stack([x, x.flip(0), 2 * x]) for x in (Q, K, value, direction))
    call = partial(attention, causal=True)
    assert_same_bits(vmap(call)(q, k, v), torch.stack(list(map(call, q, k, v))))
    expected = [torch.stack(x) for x in zip(*map(ordinary_gradient, q, k, v), strict=True)]
    assert_same_bits(vmap(grad(loss, (0, 1, 2)))(q, k, v), expected)

    def tangent(q, k, v, t):
        return jvp(partial(attention, q, k), (v,), (t,))[1]

    expected = torch.stack(list(map(tangent, q, k, v, t)))
    assert_same_bits(vmap(tangent)(q, k, v, t), expected)
    assert_same_bits(jvp(vmap(attention), (q, k, v), (0 * q, 0 * k, t))[1], expected)
    leaf = value.clone().requires_grad_()
    grad_outs = torch.stack([value, direction])
    batched = torch.autograd.grad(attention(Q, K, leaf), leaf, grad_outs, is_grads_batched=True)[0]
    assert_same_bits(batched, torch.stack([torch.autograd.grad(attention(Q, K, leaf), leaf, g)[0] for g in grad_outs]))


def test_jacobians_of_both_modes_agree():
    def scaled(factor):
        return attention(Q.double() * factor[0], K.double() * factor[1], V.double() * factor[2], causal=True)

    factors = torch.ones(3, dtype=torch.float64)
    assert error(jacfwd(scaled)(factors), jacrev(scaled)(factors)) < 1e-12
    assert error(linearize(scaled, factors)[1](factors), jacfwd(scaled)(factors).sum(-1)) < 1e-12


def test_a_loss_with_a_detached_tangent_trains():
    """As MeanFlow and consistency distillation do: the tangent is a target, and the gradient goes through the output."""
    model = torch.nn.Linear(32, 32).double()
    x, t = V.double(), ALONG.double()

    def objective(parameters):
        def call(x):
            return attention(*(functional_call(model, parameters, (x,)) for _ in range(3)), causal=True)

        out, tangent = jvp(call, (x,), (t,))
        return (out - tangent.detach()).square().sum(), (out, tangent)

    parameters = dict(model.named_parameters())
    value, (_, tangent) = objective(parameters)
    grads = torch.autograd.grad(value, list(parameters.values()))
    target = attention(*(model(x) for _ in range(3)), causal=True)
    expected = torch.autograd.grad((target - tangent.detach()).square().sum(), list(parameters.values()))
    for got, wanted, under_grad in zip(grads, expected, grad(lambda p: objective(p)[0])(parameters).values(), strict=True):
        assert max(error(got, wanted), error(under_grad, wanted)) < 1e-13
    with pytest.raises(ValueError, match=SECOND):
        objective(parameters)[1][1].sum().backward()


def gradient_of_the_gradient():
    leaf = V.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(Q, K, leaf), leaf, create_graph=True)
    return torch.autograd.grad(first.sum(), leaf)


def tangent_of_the_gradient():
    leaf = V.clone().requires_grad_()
    with forward_ad.dual_level():
        return torch.autograd.grad(attention(Q, K, leaf), leaf, forward_ad.make_dual(V, ALONG))


def tangent_of_the_tangent(v):
    return jvp(lambda v: jvp(partial(attention, Q, K), (v,), (ALONG,))[1], (v,), (ALONG,))


@pytest.mark.parametrize(
    "call",
    [
        gradient_of_the_gradient,
        tangent_of_the_gradient,
        lambda: torch.autograd.functional.hvp(partial(loss, Q, K), V, ALONG),
        lambda: torch.autograd.functional.jvp(partial(attention, Q, K), V, ALONG),  # as the gradient of a gradient
        lambda: torch.autograd.functional.hessian(lambda x: loss(Q, K, V * x), torch.ones(1)),
        lambda: hessian(lambda x: loss(Q, K, V * x))(torch.ones(1)),
        lambda: jacrev(jacfwd(lambda x: attention(Q, K, V * x)))(torch.ones(1)),
        lambda: jvp(grad(partial(loss, Q, K)), (V,), (ALONG,)),
        lambda: grad(lambda v: grad(partial(loss, Q, K))(v).sum())(V),
        lambda: tangent_of_the_tangent(V),
        lambda: vmap(tangent_of_the_tangent)(V[None]),
    ],
)
def test_second_derivatives_are_refused_by_name(call):
    with pytest.raises(ValueError, match=SECOND):
        call()


def test_the_log_sum_exp_has_no_tangent():
    with pytest.raises(ValueError, match="the log-sum-exp has no tangent"):
        jvp(lambda v: attention(Q, K, v, return_lse=True)[0], (V,), (ALONG,))
    out, lse = vmap(partial(attention, return_lse=True))(Q[None], K[None], V[None])
    assert_same_bits((out[0], lse[0]), attention(Q, K, V, return_lse=True))
    assert not vjp(partial(attention, return_lse=True), Q, K, V)[0][1].requires_grad


@pytest.mark.parametrize("function", [fake_quantize, quantize])
def test_rounding_alone_has_no_derivative(function):
    x = ALONG.clone().requires_grad_()
    for call in (
        lambda: function(x),
        lambda: jvp(lambda x: dequantize(*function(x)) if function is quantize else function(x), (V,), (ALONG,)),
        lambda: grad(lambda x: function(x)[0].sum())(V),
    ):
        with pytest.raises(ValueError, match="rounding has no derivative; detach it"):
            call()
    with torch.no_grad():
        assert_same_bits(function(x), function(x.detach()))
    batch = torch.stack([V, ALONG])
    assert_same_bits(vmap(fake_quantize)(batch), torch.stack(list(map(fake_quantize, batch))))


def test_a_cache_has_no_tangent():
    cache = KVCache()
    with pytest.raises(ValueError, match="no derivative; expected a call outside of torch.func"):
        jvp(lambda q: cache.attention(q, K, V), (Q,), (ALONG,))
    assert cache.length == 0


@pytest.mark.parametrize("transform", ["jvp", "dual level", "grad", "jvp of compiled"])
def test_compiled_code_leaves_derivatives_to_eager(transform):
    """A graph of the op alone would have a tangent of zero; compiled before or not, a level of forward mode is seen."""

    def call(v):
        return attention(Q, K, v, causal=True)

    compiled = torch.compile(call, backend="aot_eager")
    assert_same_bits(compiled(V), call(V))

    def dual(function, v):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(v, ALONG))).tangent

    if transform == "dual level":
        assert_same_bits(dual(compiled, V), dual(call, V))
        outer = partial(dual, call)
    elif transform == "grad":
        outer = grad(lambda v: call(v).sum())
    elif transform == "jvp":
        outer = lambda v: jvp(call, (v,), (ALONG,))[1]  # noqa: E731
    else:
        assert_same_bits(jvp(compiled, (V,), (ALONG,)), jvp(call, (V,), (ALONG,)))
        return
    assert_same_bits(torch.compile(outer, backend="aot_eager")(V), outer(V))
    torch._dynamo.reset()  # it has learned to leave the function to eager
    with pytest.raises(torch._dynamo.exc.Unsupported, match="torch.func and forward mode through 4-bit attention run outside"):
        torch.compile(outer, backend="aot_eager", fullgraph=True)(V)


def run_tangent(case: Case, *, device: str) -> torch.Tensor:
    tensors = [x.to(device) for x in case.tensors(torch.bfloat16)[:3]]
    tangents = directions(case.tensors(torch.bfloat16)[:3])
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options().items()}
    out, tangent = jvp(partial(attention, impl="triton", **options), tuple(tensors), tuple(x.to(device) for x in tangents))
    assert torch.equal(out, attention(*tensors, impl="triton", **options))
    gradient = grad(lambda *x: attention(*x, impl="triton", **options).float().sum(), (0, 1, 2))(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(attention(*leaves, impl="triton", **options).float().sum(), leaves)
    assert all(map(torch.equal, gradient, expected))
    return tangent.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"causal": True, "shift": True}, {"preset": "nvfp4_qk", "mask": "holes"}], ids=str)
def test_tangents_of_the_kernels_are_those_of_eager(options, device):
    case = Case(**{**SMALL, **options})
    tensors = tuple(case.tensors(torch.bfloat16)[:3])
    _, expected = jvp(partial(attention, impl="eager", **case.options()), tensors, tuple(directions(tensors)))
    assert error(on(device, run_tangent, case), expected) < 3e-3


def refusal_of_fp4(transform: str) -> str:
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    call = partial(attention, q, k, impl="fp4")
    try:
        jvp(call, (v,), (v,)) if transform == "jvp" else grad(lambda v: call(v).sum())(v)
    except ValueError as refusal:
        return str(refusal)
    return "it ran"


def test_fp4_has_no_tangent():
    assert "impl='fp4' has no derivative" in interpreted(refusal_of_fp4, "jvp")
    assert "impl='fp4' has no gradient" in interpreted(refusal_of_fp4, "grad")


def messages_of_the_kernels() -> list[str]:
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("qat_kernels.derivatives").addHandler(handler)
    from qat_kernels import derivatives

    derivatives._say_that_tangents_are_slow.cache_clear()
    for _ in range(2):
        jvp(partial(attention, q, k, impl="triton"), (v,), (v,))
    return said


def test_kernels_say_once_that_their_tangents_are_slow():
    assert [("eager" in text, "slow" in text) for text in interpreted(messages_of_the_kernels)] == [(True, True)]


@pytest.mark.parametrize("options", [{"causal": True, "shift": True}, {"mask": "holes", "preset": "nvfp4_qk"}], ids=str)
def test_opcheck(options):
    case = Case(lq=20, lk=20, **options)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(torch.float32)[:3]]
    rest = (case.key_mask(), case.k_shift(), case.spec().to_json(), case.seen().to_json(), 0.2)
    torch.library.opcheck(torch.ops.qat_kernels.attention_tangent.default, (*tensors, *directions(tensors), *rest))
