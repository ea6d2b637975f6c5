"""Packed sequences: every document as if it were alone, to the bit; and the op under PyTorch's machinery."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qat_kernels import attention, reference
from qat_kernels.varlen import Packing
from support.kernels import oracle
from support.kernels.cases import assert_same_bits, error, lse_error, run
from support.kernels.packed_cases import DOCUMENTS, SPECS, as_batch, problem, unpacked


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_document_is_as_if_alone_to_the_bit(dtype, options):
    _, alone, together, keywords, packing = problem(dtype, **options)
    results = run(*together, **keywords, **packing)
    assert results[0].shape == together[3].shape and results[0].dtype == dtype
    assert results[1].shape == together[0].shape[1::-1]
    assert results[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for result, tensors in zip(unpacked(results, packing), alone, strict=True):
        assert_same_bits(result, run(*tensors, **keywords))


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_every_document_equals_the_oracle(options):
    case, alone, together, keywords, packing = problem(**options)
    results = run(*together, **keywords, **packing)
    wanted = case.oracle_options() | {"key_mask": None}
    for (out, lse, grads), tensors in zip(unpacked(results, packing), alone, strict=True):
        expected = oracle.attention(*tensors[:3], **wanted)
        assert error(out, expected["out"]) < 1e-12
        assert lse_error(lse, expected["lse"]) < 1e-12
        sizes = [*oracle.uncancelled(*tensors, **wanted), 0.0]
        for grad, gradient, size in zip(grads, oracle.backward(*tensors, **wanted), sizes, strict=True):
            assert error(grad, gradient, size) < 1e-12


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e4])
def test_nothing_reaches_another_document(bad, options):
    """Neither what a document holds nor the gradient that it is given, NaN included."""
    _, _, together, keywords, packing = problem(torch.float32, **options)
    before = unpacked(run(*together, **keywords, **packing), packing)
    changed = [x.clone() for x in together]
    hit = 4
    for x, name in zip(changed, "qkkq", strict=True):
        start, stop = packing[f"cu_seqlens_{name}"][hit : hit + 2].tolist()
        x[start:stop] = bad
    after = unpacked(run(*changed, **keywords, **packing), packing)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if number == hit:
            assert not torch.equal(new[0], old[0])
        else:
            assert_same_bits(new, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_future_tokens_leave_earlier_outputs_bit_identical(dtype):
    _, _, together, keywords, packing = problem(dtype, documents=((40, 40), (70, 70), (20, 20)), causal=True)
    before = attention(*together[:3], return_lse=True, **keywords, **packing)
    for position in (41, 55, 56, 57, 71, 109):
        changed = [x.clone() for x in together[:3]]
        for x in changed:
            x[position:110] = -20 * x[position:110].flip(-1)
        out, lse = attention(*changed, return_lse=True, **keywords, **packing)
        for a, b in ((out, before[0]), (lse.T, before[1].T)):
            assert torch.equal(a[:position], b[:position]) and torch.equal(a[110:], b[110:])
            assert not torch.equal(a[position:110], b[position:110])


def test_groups_of_values_and_the_sink_start_anew_in_every_document():
    """A document of 5 tokens before it moves the others off the multiples of 16, and changes nothing."""
    _, _, together, keywords, packing = problem(documents=((5, 5), (64, 64)), causal=True)
    out = attention(*together[:3], **keywords, **packing)
    later = [as_batch(x[5:]) for x in together[:3]]
    assert torch.equal(as_batch(out[5:]), attention(*later, **keywords))
    assert not torch.equal(as_batch(out), attention(*map(as_batch, together[:3]), **keywords))


def test_one_document_is_an_ordinary_call():
    _, alone, together, keywords, packing = problem(documents=((50, 50),), causal=True, shift=True)
    assert_same_bits(unpacked(run(*together, **keywords, **packing), packing), [run(*alone[0], **keywords)])


@pytest.mark.parametrize("documents", [((0, 0),), ((0, 5), (0, 0)), ((5, 0),)], ids=str)
def test_without_tokens(documents):
    _, _, together, keywords, packing = problem(torch.float32, documents=documents, causal=True, shift=True)
    out, lse, grads = run(*together, **keywords, **packing)
    assert not out.any() and (lse == -torch.inf).all() and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [x.shape for x in together[:3]]
    # no document at all
    if not (together[0].numel() or together[1].numel()):
        nothing = packing | {name: packing[name][:1] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        assert attention(*together[:3], **keywords, **nothing).shape == out.shape


def strided(x):
    """The same [total, H, D] values as slices of a fused projection."""
    fused = torch.full((*x.shape[:2], 3 * x.shape[2]), torch.nan, dtype=x.dtype)
    fused[..., x.shape[2] : 2 * x.shape[2]] = x
    return fused[..., x.shape[2] : 2 * x.shape[2]]


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_neither_strides_nor_what_new_memory_holds_show_in_the_bits(monkeypatch, options):
    _, _, together, keywords, packing = problem(torch.float32, **options)
    expected = run(*together, **keywords, **packing)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in together]
    for tensors in (by_head, [strided(x) for x in together]):
        result = run(*tensors, **keywords, **packing)
        assert_same_bits(result, expected)
        if result[0].shape == tensors[0].shape:
            assert result[0].stride() == torch.empty_like(tensors[0]).stride()
        assert all(grad.is_contiguous() for grad in result[2])

    def poisoned(new):
        def call(*args, **kwargs):
            x = new(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 99)

        return call

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert_same_bits(run(*together, **keywords, **packing), expected)


def test_inputs_are_seen_one_document_at_a_time(monkeypatch):
    """So memory is that of the longest document, and linear in the total for any documents."""
    seen, forward, backward = [], reference.forward, reference.backward
    monkeypatch.setattr(reference, "forward", lambda *x, **kw: seen.append(x[1].shape[2]) or forward(*x, **kw))
    monkeypatch.setattr(reference, "backward", lambda *x, **kw: seen.append(x[2].shape[2]) or backward(*x, **kw))
    _, _, together, keywords, packing = problem(torch.float32)
    run(*together, **keywords, **packing)
    assert seen == [keys for _, keys in DOCUMENTS] * 2


OPCHECK_CASES = [
    ({"causal": True}, torch.float32),
    ({"shift": True, "heads": (3, 1), "head_dim_v": 48}, torch.bfloat16),
    ({"preset": "nvfp4_qk", "causal": True, "rotate": True}, torch.float16),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("options", "dtype"), OPCHECK_CASES, ids=str)
def test_opcheck(options, dtype, transposed):
    case, _, tensors, keywords, packing = problem(dtype, documents=((20, 20), (0, 0), (3, 18)), **options)
    if transposed:
        tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    q, k, v, grad_out = tensors
    rest = (None, keywords["k_shift"], case.spec().to_json(), case.seen().to_json(), 0.2)
    packing = Packing(**packing)
    op = torch.ops.qat_kernels
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op.attention_forward.default, (*leaves, *rest, True, "eager", *packing))
    torch.library.opcheck(op.attention_forward.default, (q, k, v, *rest, False, "eager", *packing))
    out, out_hp, _, stats, codes = op.attention_forward(q, k, v, *rest, True, "eager", *packing)
    out_hp = out if case.preset == "nvfp4_qk" else out_hp
    rest = (*rest[:2], k.shape[0], k.shape[1], *rest[2:])
    inputs = (grad_out, q, k, v, out_hp, stats, codes, *rest, "eager", *packing)
    torch.library.opcheck(op.attention_backward.default, inputs, {"head_dim": k.shape[2]})


def test_compiled_equals_eager():
    """One graph, forward and backward; other documents, numbers and lengths of them too."""
    torch._dynamo.reset()

    def function(q, k, v, **keywords):
        out, lse = attention(q * 2, k, v + v, return_lse=True, **keywords)
        return out * 2, lse

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for documents in (((33, 33), (5, 5)), ((20, 20), (0, 0), (30, 30)), ((7, 7), (9, 9), (2, 2), (40, 40))):
        results = []
        for each in (function, compiled):
            _, _, (*tensors, grad_out), keywords, packing = problem(torch.float32, documents=documents, causal=True, shift=True)
            leaves = [x.requires_grad_() for x in tensors]
            out, lse = each(*leaves, **keywords, **packing)
            results.append((out, lse, torch.autograd.grad(out, leaves, grad_out)))
        assert_same_bits(results[1], results[0])
    # values are checked inside the op, in a compiled graph too
    packing["max_seqlen_q"] = 39
    with pytest.raises(ValueError, match="got 40 in document 3"):
        compiled(*tensors, **keywords, **packing)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_checkpointing_autocast_and_inference(options):
    _, _, (*tensors, grad_out), keywords, packing = problem(torch.float32, **options)
    keywords |= packing
    expected = run(*tensors, grad_out, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(*tensors, grad_out, **keywords), expected)
    leaves = [x.requires_grad_() for x in tensors]
    out = checkpoint(lambda *x: attention(*x, **keywords), *leaves, use_reentrant=False)
    assert_same_bits((out, list(torch.autograd.grad(out, leaves, grad_out))), (expected[0], expected[2]))
    with torch.inference_mode():
        assert torch.equal(attention(*leaves, **keywords), expected[0])
