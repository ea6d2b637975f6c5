"""Windows, blocks, prefixes, bounds, soft caps and sinks: docs/NUMERICS.md, sections 3 to 5, in eager, against the oracle."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

from qat_kernels import KVCache, QuantSpec, attention, dispatch, explain, reference
from qat_kernels.mask import Bounds, Mask
from qat_kernels.verdicts import Case as Checked
from qat_kernels.verdicts import Verdict, Verdicts
from support.kernels import oracle
from support.kernels.cases import Case, assert_same_bits, error, forward_op, lse_error, plain_attention, run, run_case
from support.kernels.packed_cases import problem as packed_problem
from support.kernels.packed_cases import unpacked
from tests.kernels.test_attention import PeakMemory

MASKS = (
    {"causal": True, "window": 24},
    {"causal": True, "window": 1},
    {"causal": True, "block_size": 20},
    {"causal": True, "block_size": 12, "window": 40},
    {"causal": True, "window": 19, "prefix": 5},
    {"causal": True, "prefix": 21},
    {"causal": True, "block_size": 10, "window": 20, "prefix": 20},
    {"bounds": "images"},
    {"bounds": "random"},
    {"bounds": "random", "prefix": 18},
)
SCORES = ({"softcap": 1.5}, {"sinks": True}, {"sinks": True, "softcap": 4.0, "causal": True})
SHAPES = (
    {"lq": 90, "lk": 90, "mask": None},
    {"lq": 75, "lk": 90, "mask": "left", "heads": (3, 1)},
    {"lq": 90, "lk": 75, "mask": "right", "batch": 3},
    {"lq": 47, "lk": 61, "mask": "holes", "heads": (2, 2)},
    {"lq": 33, "lk": 50, "mask": "empty row", "preset": "nvfp4_qk"},
)
CASES = [Case(**mask, **shape, seed=7 * n + 1) for n, shape in enumerate(SHAPES) for mask in (*MASKS, *SCORES)]
CASES += [
    Case(lq=90, lk=90, causal=True, window=30, softcap=2.0, sinks=True, mask="left", seed=1),
    Case(lq=40, lk=40, sinks=True, size=3.0, causal=True, seed=2),
    Case(lq=90, lk=90, causal=True, window=40, rotate=True, four_over_six=True, coarse=True, seed=3),
    Case(lq=90, lk=90, causal=True, window=40, shift=True, mask="left", seed=4),
    Case(lq=50, lk=50, causal=True, window=20, softcap=3.0, preset="kv_nvfp4", seed=5),
    Case(lq=1, lk=70, causal=True, window=20, sinks=True, seed=6),
    Case(lq=20, lk=20, causal=True, block_size=64, prefix=100, seed=7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_gradients_and_tangents_equal_the_oracle(case):
    *tensors, grad_out = case.tensors()
    options = case.oracle_options()
    expected = oracle.attention(*tensors, **options)
    out, lse, grads = run(*tensors, grad_out, **case.options() | {"impl": "eager"})
    assert error(out, expected["out"]) < 1e-10
    assert lse_error(lse, expected["lse"]) < 1e-10
    out_hp = forward_op(case, *tensors)[1]
    assert not out_hp.numel() if not case.spec().quantizes_pv else error(out_hp, expected["out_hp"]) < 1e-10
    formulas = oracle.backward(*tensors, grad_out, **options)
    autograd = oracle.autograd_backward(*tensors, grad_out, **options)
    sizes = [*oracle.uncancelled(*tensors, grad_out, **options), 0.0, 0.0]
    assert len(grads) == len(formulas) == 3 + case.sinks
    for grad, by_hand, by_autograd, size in zip(grads, formulas, autograd, sizes, strict=False):
        tolerance = 1e-10 if grad.dtype == torch.float64 else 1e-6  # sinks are float32
        assert error(by_hand, by_autograd, size) < 1e-12
        assert error(grad, by_hand, size) < tolerance
    inputs = [*tensors, *([case.sink_logits()] if case.sinks else [])]
    generator = torch.Generator().manual_seed(5)
    tangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in inputs]
    keywords = {name: value for name, value in case.options().items() if name != "sinks"} | {"impl": "eager"}

    def call(q, k, v, sinks=None):
        return attention(q, k, v, sinks=sinks, **keywords)

    primal, tangent = jvp(call, tuple(inputs), tuple(tangents))
    assert torch.equal(primal, out)
    assert error(tangent, oracle.tangent(*tensors, tangents, **options)) < 1e-10


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_exact_inputs_give_plain_attention_with_a_cap_and_a_sink(preset):
    """Where nothing is rounded but P: the textbook formula, with the sink as one more column that has no value."""
    case = Case(lq=45, lk=45, heads=(2, 2), preset=preset, softcap=2.0, sinks=True, scale=0.02)
    q, k = (oracle.E2M1[torch.randint(0, 8, (2, 2, 45, 32), generator=torch.Generator().manual_seed(n))] for n in range(2))
    q[..., ::16], k[..., ::16] = 6.0, 6.0
    v = torch.where(torch.randn(q.shape, generator=torch.Generator().manual_seed(2)) > 0, 6.0, -6.0).double()
    scores = 2.0 * torch.tanh(q @ k.mT * 0.02 / 2.0)
    with_sink = torch.cat((scores, case.sink_logits().double()[:, None, None].expand(2, -1, 45, 1)), -1)
    expected = with_sink.softmax(-1)[..., :-1] @ v
    out, lse = attention(q, k, v, return_lse=True, **case.options())
    assert lse_error(lse, with_sink.logsumexp(-1)) < 1e-12
    if preset == "nvfp4_qk":
        assert error(out, expected) < 1e-12
    else:
        assert error(forward_op(case, q, k, v)[1], expected) < 1e-12
        assert 1e-3 < error(out, expected) < 0.2


@pytest.mark.parametrize("mask", [None, "left"])
@pytest.mark.parametrize("options", MASKS[:8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_a_query_may_not_see_does_not_show_in_its_bits(dtype, options, mask):
    """Tokens after upper(i), and tokens before the group of lower(i) but the prefix and its group."""
    case = Case(lq=90, lk=90, mask=mask, seed=1, **options)
    q, k, v, _ = case.tensors(dtype)
    first = torch.zeros(2, dtype=torch.long) if mask is None else case.key_mask().int().argmax(1)
    given = None if case.bounds is None else Bounds(*case.bound_tensors())
    lower, upper = case.seen().bounds(90, 90, None if mask is None else first[:, None], given, q.device)
    lower, upper = (first[:, None] * 0 + x if x is not None else None for x in (lower, upper))
    before = attention(q, k, v, return_lse=True, **case.options())
    sees_a_change = 0
    for token in (1, 4, 5, 15, 16, 17, 21, 31, 32, 40, 47, 63, 64, 79, 89):
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, :, token] = -7 * x[:, :, token].flip(-1) - 3
        after = attention(q, *changed, return_lse=True, **case.options())
        key = token - first  # of each sequence
        blind = upper < key[:, None]
        if lower is not None:
            head = -(-case.prefix // 16) * 16
            blind = blind | ((key[:, None] < lower // 16 * 16) & (key[:, None] >= head))
        rows = blind[:, None].expand(-1, 4, -1)
        for a, b in zip(after, before, strict=True):
            assert torch.equal(a[rows], b[rows])
        if bool((key > 0).all()) and not bool(blind.all()):
            assert not torch.equal(after[0], before[0])
            sees_a_change += 1
    assert sees_a_change >= 5


def test_the_group_of_the_lower_bound_is_not_kept_and_its_unseen_tokens_act_through_one_scale():
    case = Case(lq=1, lk=60, batch=1, heads=(1, 1), causal=True, window=25)
    q, k, v, _ = case.tensors()
    call = partial(attention, q, **case.options())
    out = call(k, v)  # it sees 35 to 59, of which 48 to 59 are kept
    for token, shows in ((34, True), (32, True), (31, False), (48, True)):
        louder = v.clone()
        louder[:, :, token] *= 50
        assert torch.equal(call(k, louder), out) != shows
    changed = k.clone()
    changed[:, :, 34] *= 50  # K has a scale for each token: an unseen one does not act at all
    assert torch.equal(call(changed, v), out)


@pytest.mark.parametrize("mask", [None, "left", "holes"])
@pytest.mark.parametrize(
    "options", [{"window": 24}, {"block_size": 20}, {"block_size": 12, "window": 40, "prefix": 17}, {"prefix": 9}, {}], ids=str
)
def test_bounds_say_the_same_as_numbers(options, mask):
    case = Case(lq=70, lk=90, causal=True, mask=mask, seed=2, **options)
    tensors = case.tensors()
    first = torch.zeros(2, 1, dtype=torch.long) if mask is None else case.key_mask().int().argmax(1, keepdim=True)
    lower, upper = replace(case.seen(), prefix=0).bounds(70, 90, first, None, tensors[0].device)
    lower = torch.zeros_like(upper) if lower is None else lower
    # In the caller's positions; blocks count from the first allowed key, and so did these.
    limits = tuple((x + first).clamp(least, 90 + least).int() for x, least in ((lower, 0), (upper, -1)))
    keywords = case.options() | {"causal": False, "window": None, "block_size": 1, "bounds": limits}
    assert_same_bits(run(*tensors, **keywords), run_case(case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"mask": "left"}, {"preset": "nvfp4_qk"}, {"lq": 40, "sinks": True}], ids=str)
def test_a_window_over_all_keys_is_plain_causal_to_the_bit(options, dtype):
    case = Case(**{"lq": 300, "lk": 300, "causal": True} | options)
    expected = run_case(case, dtype)
    for window in (300, 301, 5000):
        assert_same_bits(run_case(replace(case, window=window), dtype), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 20},
        {"causal": True, "window": 20, "prefix": 3, "sinks": True},
        {"causal": True, "block_size": 12, "softcap": 2.0},
        {"sinks": True, "preset": "nvfp4_qk", "heads": (3, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_packed_documents_are_as_if_alone_to_the_bit(dtype, options):
    _, alone, together, keywords, packing = packed_problem(dtype, **options)
    results = run(*together, **keywords, **packing)
    of_sinks = [run(*tensors, **keywords) for tensors in alone]
    parts = unpacked((*results[:2], results[2][:3]), packing)
    for part, (out, lse, grads) in zip(parts, of_sinks, strict=True):
        assert_same_bits(part, (out, lse, grads[:3]))
    if "sinks" in options:
        assert error(results[2][3], sum(each[2][3].double() for each in of_sinks)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"window": 37}, {"block_size": 24, "window": 48}, {"window": 37, "prefix": 20}, {"sinks": True, "softcap": 2.0}]
)
@pytest.mark.parametrize(("scores", "rows"), [(1, 128), (2777, 7), (1 << 24, 33)])
def test_chunks_change_nothing_beyond_rounding(monkeypatch, scores, rows, options):
    case = Case(lq=90, lk=110, seed=9, coarse=True, causal=True, mask="left", **options)
    whole = run_case(case)
    monkeypatch.setattr(reference, "_SCORES_PER_CHUNK", scores)
    monkeypatch.setattr(reference, "_CAUSAL_ROWS", rows)
    out, lse, grads = run_case(case)
    assert error(out, whole[0]) < 1e-12 and lse_error(lse, whole[1]) < 1e-12
    for grad, expected in zip(grads, whole[2], strict=True):
        assert error(grad, expected) < (1e-12 if grad.dtype == torch.float64 else 1e-6)


def test_keys_outside_of_all_bounds_are_never_touched(monkeypatch):
    """Memory and scores are linear in the length: no chunk has more keys than window, prefix and rows ask for."""
    widths, chunk, peaks = [], reference._chunk, []

    def spy(ops, rows):
        result = chunk(ops, rows)
        widths.append(result.p.shape[-1])
        return result

    monkeypatch.setattr(reference, "_chunk", spy)
    for length in (512, 2048):
        q, k, v, grad_out = Case(lq=length, lk=length, head_dim=16, heads=(1, 1), batch=1).tensors(torch.float32)
        options = {"spec": QuantSpec(), "mask": Mask(causal=True, window=100, prefix=40), "scale": 0.25}
        with PeakMemory() as memory:
            _, out_hp, _ = reference.forward(q, k, v, None, None, None, with_out_hp=True, **options)
            reference.backward(grad_out, q, k, v, out_hp, None, None, None, **options)
        peaks.append(memory.peak)
    assert len(widths) == 2 * (512 + 2048) // 128
    assert max(widths) <= 48 + 100 + 128 + 16
    assert peaks[1] < 4 * peaks[0]


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_rows_without_keys_are_zero(preset):
    """By bounds and by masks; with a sink their log-sum-exp is the sink, and they have no gradient."""
    case = Case(lq=30, lk=33, preset=preset, batch=2, sinks=True)
    lower, upper = torch.zeros(1, 30, dtype=torch.int32), torch.arange(30, dtype=torch.int32)[None]
    lower[:, 20:], upper[:, :4] = 33, -1
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1, :9] = False
    empty = torch.zeros(2, 30, dtype=torch.bool)
    empty[:, 20:], empty[:, :4], empty[1, :9] = True, True, True
    rows = empty[:, None].expand(2, 4, 30)
    keywords = {"bounds": (lower, upper), "key_mask": mask, "spec": case.spec()}
    for sinks in (None, case.sink_logits()):
        out, lse, grads = run(*case.tensors(), **keywords, sinks=sinks)
        assert not out[rows].any() and out[~rows].any(-1).all() and not grads[0][rows].any()
        expected = torch.full_like(lse, -torch.inf) if sinks is None else sinks[:, None].expand(2, 4, 30).double()
        assert lse_error(lse[rows], expected[rows]) < 1e-12
        assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("options", [{"window": 5}, {"sinks": True}, {"block_size": 4, "prefix": 2}, {"softcap": 1.0}], ids=str)
@pytest.mark.parametrize(("batch", "lq", "lk"), [(2, 5, 0), (2, 0, 5), (0, 5, 5)])
def test_empty_dimensions(batch, lq, lk, options):
    case = Case(batch=batch, lq=lq, lk=lk, causal=True, **options)
    out, lse, grads = run_case(case, torch.float32)
    assert out.shape == (batch, 4, lq, 32) and not out.any()
    assert torch.equal(lse, case.sink_logits()[:, None].expand(lse.shape) if case.sinks else torch.full_like(lse, -torch.inf))
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize(
    "options",
    [{"causal": True, "window": 9, "prefix": 3}, {"sinks": True, "softcap": 2.0}, {"bounds": "images", "preset": "nvfp4_qk"}],
    ids=str,
)
def test_opcheck(options):
    case = Case(lq=20, lk=20, batch=1, **options)
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(torch.float32))
    numbers = (case.spec().to_json(), case.seen().to_json(), 0.2)
    more = (None, None, 0, 0, *(case.bound_tensors() or (None, None)), case.softcap)
    sinks, op = case.sink_logits(), torch.ops.qat_kernels
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    leaf = None if sinks is None else sinks.clone().requires_grad_()
    torch.library.opcheck(op.attention_forward.default, (*leaves, None, None, *numbers, True, "eager", *more, leaf))
    out, out_hp, _, stats, codes = op.attention_forward(q, k, v, None, None, *numbers, True, "eager", *more, sinks)
    out_hp = out_hp if out_hp.numel() else out
    rest = (None, None, 20, 2, *numbers, "eager", *more, sinks)
    torch.library.opcheck(op.attention_backward.default, (grad_out, q, k, v, out_hp, stats, codes, *rest))
    rest = (None, None, *numbers, *more, sinks, sinks)
    torch.library.opcheck(op.attention_tangent.default, (q, k, v, q, k, v, *rest))


def test_compiled_equals_eager():
    """One graph, forward and backward; the length and the window may change."""
    torch._dynamo.reset()

    def function(q, k, v, sinks, **keywords):
        return attention(q * 2, k, v + v, sinks=sinks, **keywords) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length, window in ((33, 8), (40, 8), (50, 12)):
        case = Case(lq=length, lk=length, causal=True, window=window, block_size=4, prefix=2, softcap=3.0, sinks=True)
        keywords = {name: value for name, value in case.options().items() if name not in ("sinks", "k_shift")}
        results = []
        for each in (function, compiled):
            *tensors, grad_out = case.tensors(torch.float32)
            leaves = [x.requires_grad_() for x in (*tensors, case.sink_logits())]
            out = each(*leaves, **keywords)
            results.append((out, torch.autograd.grad(out, leaves, grad_out)))
        assert_same_bits(results[1], results[0])
    torch._dynamo.reset()


def test_checkpointing_autocast_vmap_and_inference():
    case = Case(causal=True, window=12, sinks=True, softcap=2.0)
    *tensors, grad_out = case.tensors(torch.float32)
    expected = run_case(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(*tensors, grad_out, **case.options()), expected)
    leaves = [x.requires_grad_() for x in (*tensors, case.sink_logits())]
    keywords = {name: value for name, value in case.options().items() if name != "sinks"}

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **keywords)

    out = checkpoint(call, *leaves, use_reentrant=False)
    assert_same_bits((out, list(torch.autograd.grad(out, leaves, grad_out))), (expected[0], expected[2]))
    with torch.inference_mode():
        assert torch.equal(call(*leaves), expected[0])
    stacked = [torch.stack((x, 0.5 * x)).detach() for x in leaves]
    each = [torch.func.grad(lambda *x: call(*x).square().sum(), (0, 1, 2, 3))(*x) for x in zip(*stacked, strict=True)]
    together = torch.vmap(torch.func.grad(lambda *x: call(*x).square().sum(), (0, 1, 2, 3)))(*stacked)
    assert_same_bits(together, [torch.stack(x) for x in zip(*each, strict=True)])


Q, KV = torch.zeros(2, 4, 5, 32), torch.zeros(2, 2, 7, 32)
LIMITS = (torch.zeros(1, 5, dtype=torch.int32), torch.full((2, 5), 3, dtype=torch.int32))
WRONG_CALLS = [
    ({"window": 0, "causal": True}, r"window: expected an int from 1 on, how many keys .*, got 0"),
    ({"window": 4.0, "causal": True}, r"window: expected an int from 1 on, .*, got 4.0"),
    ({"window": True, "causal": True}, r"window: expected an int from 1 on, .*, got True"),
    ({"block_size": 0, "causal": True}, r"block_size: expected an int from 1 on, .*, got 0"),
    ({"prefix": -1, "causal": True}, r"prefix: expected an int from 0 on, .*, got -1"),
    ({"block_size": True, "causal": True}, r"block_size: expected an int from 1 on, .*, got True"),
    ({"window": 4}, r"window without causal: expected causal=True; .*, got causal=False"),
    ({"block_size": 4}, r"block_size without causal: expected causal=True"),
    ({"prefix": 4}, r"prefix without causal: expected causal=True"),
    ({"bounds": LIMITS, "causal": True}, r"causal with bounds: expected it left out: bounds alone say .*, got both"),
    ({"bounds": LIMITS, "window": 3}, r"window with bounds: expected it left out"),
    ({"bounds": LIMITS, "block_size": 3}, r"block_size with bounds: expected it left out"),
    ({"bounds": LIMITS[0]}, r"bounds: expected \(lower, upper\), two tensors, got tensor"),
    ({"bounds": (LIMITS[0], 3)}, r"bounds: upper: expected torch.int32 \[2 or 1, 5\] on cpu, got 3"),
    (
        {"bounds": (LIMITS[0].long(), LIMITS[1])},
        r"bounds: lower: expected torch.int32 \[2 or 1, 5\] on cpu, got torch.int64 \[1, 5\]",
    ),
    ({"bounds": (LIMITS[0][:, :4], LIMITS[1])}, r"bounds: lower: expected .*, got torch.int32 \[1, 4\]"),
    ({"bounds": (LIMITS[0] - 1, LIMITS[1])}, r"bounds: expected lower bounds from 0 to 7 for 7 keys .*, got -1 to -1"),
    ({"bounds": (LIMITS[0], LIMITS[1] + 4)}, r"bounds: expected upper bounds from -1 to 6 for 7 keys .*, got 7 to 7"),
    (
        {"bounds": (torch.tensor([[0, 1, 2, 1, 3]], dtype=torch.int32), LIMITS[1])},
        r"bounds: expected lower bounds that never decrease along the queries, got 2 for query 2, then 1 \(row 0\)",
    ),
    ({"softcap": 0.0}, r"softcap: expected a positive number, .*, got 0.0"),
    ({"softcap": -1}, r"softcap: expected a positive number, .*, got -1"),
    ({"softcap": float("inf")}, r"softcap: expected a positive number, .*, got inf"),
    (
        {"sinks": torch.zeros(2)},
        r"sinks: expected torch.float32 or torch.float32 \[4\] on cpu, .*, got torch.float32 \[2\] on cpu",
    ),
    ({"sinks": torch.zeros(4).half()}, r"sinks: expected .* got torch.float16 \[4\]"),
    ({"sinks": [0.0] * 4}, r"sinks: expected .* got \[0.0, 0.0, 0.0, 0.0\]"),
    ({"softcap": 2.0, "k_shift": torch.zeros(2, 32)}, r"k_shift with softcap: expected None: softcap would see the constant"),
    ({"sinks": torch.zeros(4), "k_shift": torch.zeros(2, 32)}, r"k_shift with sinks: expected None"),
    *(
        (
            {name: value, "causal": name != "bounds" and causal, "spec": QuantSpec(preset=preset)},
            rf"{name} with preset='{preset}'",
        )
        for preset, causal in (("fa4_fp4", True), ("kv_nvfp4_fp8", True), ("kv_nvfp4", True))
        for name, value in (("block_size", 4), ("prefix", 2), ("bounds", LIMITS), ("sinks", torch.zeros(4)), ("window", 2))
        if name != "window" or preset == "fa4_fp4"
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_CALLS)
def test_wrong_calls_say_what_was_expected(changes, message):
    attention(Q, KV, KV, causal=True)  # a right one; its block size is 1, and True is not
    with pytest.raises(ValueError, match=rf"^attention: ({message})"):
        attention(Q, KV, KV, **changes)


@pytest.mark.parametrize("preset", ["sage3", "fastvideo_sm120"])
def test_servers_without_masks_take_none_of_it(preset):
    x = torch.zeros(1, 1, 7, 64)
    for changes in ({"softcap": 2.0}, {"sinks": torch.zeros(1)}, {"bounds": tuple(torch.zeros(2, 1, 7, dtype=torch.int32))}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))} with preset='{preset}': expected it left out"):
            attention(x, x, x, spec=QuantSpec(preset=preset), **changes)


@pytest.mark.parametrize("documents", [((5, 7), (2, 2))])
def test_bounds_do_not_go_with_packed_sequences(documents):
    _, _, together, keywords, packing = packed_problem(torch.float32, documents=documents)
    with pytest.raises(ValueError, match="bounds with packed sequences: expected None; use window, block_size and prefix"):
        attention(*together[:3], bounds=LIMITS, **keywords, **packing)


def test_fp4_and_sdpa_refuse_what_they_do_not_compute_and_explain_says_so():
    q, kv = Q.bfloat16(), KV.bfloat16()
    features = {"window": 4, "block_size": 2, "prefix": 2, "softcap": 3.0, "sinks": torch.zeros(4)}
    for name, value in features.items():
        with pytest.raises(ValueError, match=rf"{name} with impl='fp4': expected it left out, or impl='auto'"):
            attention(q, kv, kv, causal=True, impl="fp4", **{name: value})
        *_, fp4, triton, eager = explain(q, kv, kv, causal=True, **{name: value}).splitlines()
        assert f"fp4: cannot run: it does not compute {name}" in fp4
        assert "triton: cannot run: expected tensors on an NVIDIA GPU" in triton and "eager: runs" in eager
    with pytest.raises(ValueError, match="bounds with impl='fp4'"):
        attention(q, kv, kv, bounds=LIMITS, impl="fp4")
    kv_nvfp4 = QuantSpec(preset="kv_nvfp4")
    with pytest.raises(ValueError, match="window with impl='sdpa'"):
        attention(q, kv, kv, causal=True, window=3, spec=kv_nvfp4, impl="sdpa")
    text = explain(q, kv, kv, causal=True, window=3, spec=kv_nvfp4)
    assert "sdpa: cannot run: it does not compute window" in text and "eager: runs" in text


def test_auto_takes_the_kernels_where_they_compute_it_and_never_fp4(caplog):
    gpu = torch.device("cuda")
    with mock.patch("qat_kernels.triton.launch.check_device", lambda device: None):
        dispatch._resolve.cache_clear()
        assert dispatch.resolve(gpu, torch.bfloat16, "nvfp4", False, ("window", "sinks")) == "triton"
        assert not caplog.text
        assert dispatch.resolve(gpu, torch.bfloat16, "kv_nvfp4", False, ("window",)) == "eager"
        assert "slow ('sdpa' does not compute window)" in caplog.text
    dispatch._resolve.cache_clear()
    verdict = Verdict(Q.device, Checked(32, True, QuantSpec().to_json(), torch.float32), (1, 1), "right")
    with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU"):  # without the window it would be taken
        attention(Q, KV, KV, causal=True, impl=Verdicts((verdict,)))
    assert attention(Q, KV, KV, causal=True, window=3, impl=Verdicts((verdict,))).shape == Q.shape


@pytest.mark.parametrize("name", ["block_size", "prefix", "bounds"])
def test_a_cache_does_not_take_everything(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        KVCache().attention(KV, KV, KV, **{name: 2})


def test_masks_as_json():
    for mask in (Mask(), Mask(causal=True, window=7, block_size=3, prefix=2), Mask(bounded=True, prefix=1)):
        assert Mask.from_json(mask.to_json()) == mask


def test_plain_attention_agrees_about_who_sees_whom():
    """Transformers' convention: a query sees `sliding_window` keys, its own among them (kv_idx > q_idx - sliding_window)."""
    case = Case(lq=40, lk=40, heads=(2, 2), preset="nvfp4_qk", causal=True, window=7, batch=1)
    q, k, v, _ = case.tensors()
    q_idx, kv_idx = torch.arange(40)[:, None], torch.arange(40)[None]
    allowed = (kv_idx <= q_idx) & (kv_idx > q_idx - 7)
    quantized = [oracle.phi(x, -1)[0] for x in (q, k)]
    expected, lse = plain_attention(*quantized, v, allowed.expand(1, 2, 40, 40), 32**-0.5)
    out, lse_out = attention(q, k, v, return_lse=True, **case.options())
    assert error(out, expected) < 1e-12 and lse_error(lse_out, lse) < 1e-12
