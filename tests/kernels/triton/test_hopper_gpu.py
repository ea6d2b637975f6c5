"""The kernels of hopper/ against the Triton kernels, on the GPU that they are for: docs/NUMERICS.md, section 7.

Compilation takes most of the time: a test has one set of constants and many shapes, so that `pytest -n 22 --dist worksteal`
compiles all sets at once. Lengths that are odd keep the Triton kernels at one compilation too.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from unittest import mock

import pytest
import torch

from qat_kernels.varlen import Packing
from support.kernels.cases import Case, error, lse_error
from support.kernels.triton_runs import BOUNDS, on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="these kernels are for sm_90"
    ),
]


@pytest.fixture(autouse=True)
def all_that_they_compute(monkeypatch):
    """What has not been compared on a GPU is not served: this is where it is compared."""
    from qat_kernels.triton import tiles

    monkeypatch.setattr(tiles, "is_compared", lambda *_: True)
    monkeypatch.setattr(tiles, "_MOST_KEYS", 0)  # the forward over few keys has its own tests
    tiles.choose.cache_clear()
    forget_plans()
    yield
    tiles.choose.cache_clear()
    forget_plans()


# Tails, a second tile of 128, few keys, few queries, many tiles, and with a causal mask more queries than keys and fewer.
SHAPES = ((777, 531), (131, 131), (301, 5), (7, 301), (301, 801), (801, 301), (2049, 2049))
DOCUMENTS = ((33, 33), (1, 1), (5, 40), (0, 0), (130, 130), (20, 3), (7, 0), (0, 9), (401, 513), (193, 65))
MASKS = ("holes", "left", "right", "empty row")


def cases(case: Case, *, aligned: bool = False) -> list[Case]:
    """Of all shapes, grouped heads and not; `aligned`: of whole tiles too."""
    found = [replace(case, lq=lq, lk=lk, heads=heads) for lq, lk in SHAPES for heads in ((4, 2), (3, 3))]
    if aligned:
        found += [replace(case, lq=length, lk=length, batch=1) for length in (64, 256)]
    return [replace(each, seed=n, size=(1.0, 3.0)[n % 3 == 1]) for n, each in enumerate(found)]


class Call:
    """The tensors and options of a case on the GPU: packed documents, or a batch, every other one with the heads inside."""

    def __init__(self, case: Case, dtype: torch.dtype, documents: tuple[tuple[int, int], ...] | None = None) -> None:
        self.case, self.packing = case, None
        if documents is not None:
            lengths = list(zip(*documents, strict=True))
            case = replace(case, batch=1, lq=sum(lengths[0]), lk=sum(lengths[1]))
            starts = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in lengths)
            self.packing = Packing(*starts, *map(max, lengths))
        self.tensors = [x.cuda() for x in case.tensors(dtype)]
        if documents is not None:
            self.tensors = [x[0].transpose(0, 1).contiguous() for x in self.tensors]
        elif case.seed % 2:
            self.tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in self.tensors]
        self.key_mask, self.k_shift = (None if x is None else x.cuda() for x in (case.key_mask(), case.k_shift()))
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        self.options = {"spec": case.spec(), "mask": case.seen(), "scale": scale, **on_device(case, "cuda")}

    def forward(self, with_gradient: bool = True):
        from qat_kernels.triton import launch

        poison()
        q, k, v, _ = self.tensors
        return launch.forward(q, k, v, self.key_mask, self.k_shift, self.packing, with_gradient=with_gradient, **self.options)

    def backward(self, saved):
        from qat_kernels.triton import launch

        poison()
        _, k, v, grad_out = self.tensors
        value = v if self.case.spec().reads_value(self.case.seen().hides_keys) else None
        saved = (value, saved.out_hp, saved.stats, saved.codes)
        return launch.backward(grad_out, *saved, self.key_mask, self.packing, key_shape=k.shape, **self.options)


def poison() -> None:
    """What is not written is seen: the memory that is free is full of NaN."""
    for size in (2**8, 2**12, 2**16, 2**20, 2**22):
        torch.full((size,), float("nan"), device="cuda")


@contextmanager
def in_triton() -> Iterator[None]:
    """As if there were no Gluon. Calls that are planned already are planned anew, before and after."""
    from qat_kernels.triton import backward_launch, forward_launch

    forget_plans()
    with (
        mock.patch.object(forward_launch, "gluon_version", lambda: None),
        mock.patch.object(backward_launch, "gluon_version", lambda: None),
    ):
        yield
    forget_plans()


def forget_plans() -> None:
    from qat_kernels.triton import backward_launch, forward_launch

    for launch in (forward_launch, backward_launch):
        launch._plan.cache_clear()


def assert_same(a, b) -> None:
    for n, (x, y) in enumerate(zip(a, b, strict=True)):
        if x is not None or y is not None:
            assert torch.equal(x, y), f"result {n}: {(x != y).sum()} of {x.numel()} differ, by {error(x, y):.1e} of the whole"


def check_forward(call: Call, with_gradient: bool, *, few_keys: bool = False) -> None:
    from qat_kernels.triton.hopper.forward_launch import Attend, AttendToAll

    runs = AttendToAll if few_keys else Attend
    with mock.patch.object(runs, "__call__", autospec=True, side_effect=runs.__call__) as attend:
        actual, again = call.forward(with_gradient), call.forward(with_gradient)
        assert attend.call_count == 2
        with in_triton():
            expected = call.forward(with_gradient)
        assert attend.call_count == 2
    assert_same(actual, again)
    bound = BOUNDS[torch.bfloat16][0]
    assert error(actual.out, expected.out) < bound
    assert lse_error(actual.lse, expected.lse) < 1e-4
    if actual.out_hp is not None:
        assert error(actual.out_hp, expected.out_hp) < bound
    if with_gradient:
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.stats[0], expected.stats[0])  # m, an integer
        rows, wanted = actual.stats[1], expected.stats[1]
        assert torch.equal(rows == torch.inf, wanted == torch.inf)
        assert lse_error(rows[rows != torch.inf], wanted[wanted != torch.inf]) < 1e-4


def check_backward(call: Call, *, same_bits: bool = True) -> None:
    from qat_kernels.triton.hopper.backward_launch import GradKeyValue, GradQuery

    saved = call.forward()
    with (
        mock.patch.object(GradQuery, "__call__", autospec=True, side_effect=GradQuery.__call__) as grad_query,
        mock.patch.object(GradKeyValue, "__call__", autospec=True, side_effect=GradKeyValue.__call__) as grad_key_value,
    ):
        actual, again = call.backward(saved), call.backward(saved)
        assert grad_query.call_count == grad_key_value.call_count == 2
        with in_triton():
            expected = call.backward(saved)
        assert grad_query.call_count == grad_key_value.call_count == 2
    assert_same(actual, again)
    if same_bits:
        assert_same(actual, expected)
    else:
        assert torch.equal(actual[0], expected[0])
        for x, wanted in zip(actual[1:3], expected[1:3], strict=True):
            assert error(x, wanted) < BOUNDS[torch.bfloat16][1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_forward(head_dim, causal):
    for case in cases(Case(head_dim=head_dim, causal=causal), aligned=head_dim == 128):
        for with_gradient in (True, False):
            check_forward(Call(case, torch.bfloat16), with_gradient)
    call = Call(Case(head_dim=head_dim, causal=causal, lq=301, lk=301), torch.bfloat16)
    check_not_finite(call)
    if causal:
        check_future_tokens(call)


@pytest.fixture
def few_keys(monkeypatch):
    """Where all queries see all keys, and these are few, the forward quantizes Q itself."""
    from qat_kernels.triton import tiles

    monkeypatch.setattr(tiles, "_MOST_KEYS", 1024)
    forget_plans()
    yield
    forget_plans()


# One query, tails of 64 and of 128 keys and none, and programs that have many tiles of queries.
FEW_KEYS = ((1, 1), (7, 257), (131, 77), (777, 512), (64, 128), (301, 801), (2049, 1024), (20_000, 512))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_forward_over_few_keys(head_dim, with_gradient, few_keys):
    for n, ((lq, lk), heads) in enumerate(itertools.product(FEW_KEYS, ((4, 2), (3, 3)))):
        case = Case(head_dim=head_dim, lq=lq, lk=lk, heads=heads, seed=n, size=(1.0, 3.0, 0.01)[n % 3])
        call = Call(case, torch.bfloat16)
        if n % 4 > 1:  # rows of Q, K and V that lie side by side
            call.tensors[:3] = [torch.cat([x, x, x], -1)[..., head_dim : 2 * head_dim] for x in call.tensors[:3]]
        check_forward(call, with_gradient, few_keys=True)
    check_not_finite(Call(Case(head_dim=head_dim, lq=301, lk=301), torch.bfloat16), with_gradient)
    if with_gradient:
        call = Call(Case(head_dim=head_dim, lq=777, lk=512), torch.bfloat16)
        check_backward(call)
        check_graph(call)


def check_not_finite(call: Call, with_gradient: bool = True) -> None:
    """What is not finite in Q shows in its row, and in K or V in the rows that see it, where the Triton kernel shows it."""
    for index, bad in itertools.product(range(3), (torch.nan, torch.inf)):
        good = call.tensors[index].clone()
        call.tensors[index][0, 1, 77, 7] = bad
        actual = call.forward(with_gradient).out.isfinite().all(-1)
        with in_triton():
            expected = call.forward(with_gradient).out.isfinite().all(-1)
        assert not actual.all() and actual[1].all()
        if not (call.case.causal and index == 2):  # there earlier rows of a tile skip the token as 0 * v
            assert torch.equal(actual, expected)
        call.tensors[index].copy_(good)


def check_future_tokens(call: Call) -> None:
    before = call.forward()
    for position in (1, 16, 63, 64, 130, 200, 300):
        good = [x.clone() for x in call.tensors]
        for x in call.tensors[:3]:
            x[:, :, position:] = x[:, :, position:].flip(2) * 20 + 1
        after = call.forward()
        for a, b in zip((after.out, after.out_hp), (before.out, before.out_hp), strict=True):
            assert torch.equal(a[:, :, :position], b[:, :, :position])
            assert not torch.equal(a[:, :, position:], b[:, :, position:])
        for x, wanted in zip(call.tensors, good, strict=True):
            x.copy_(wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_forward_of_packed_documents(head_dim, causal):
    """With a K shift for head dim 128. The last document gets the bits that it gets alone."""
    for heads in ((4, 2), (3, 3)):
        case = Case(head_dim=head_dim, causal=causal, heads=heads, shift=head_dim == 128)
        call = Call(case, torch.bfloat16, DOCUMENTS)
        for with_gradient in (True, False):
            check_forward(call, with_gradient)
    (lq, lk), packed = DOCUMENTS[-1], call.forward()
    alone = Call(replace(case, batch=1, lq=lq, lk=lk), torch.bfloat16)
    alone.tensors = [x[-n:].transpose(0, 1)[None] for x, n in zip(call.tensors, (lq, lk, lk, lq), strict=True)]
    result = alone.forward()
    assert torch.equal(packed.out[-lq:].transpose(0, 1)[None], result.out)
    assert torch.equal(packed.lse[None, :, -lq:], result.lse)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_forward_rotated_and_shifted(head_dim, causal, with_gradient):
    options = {"rotate": True, "four_over_six": True, "shift": True, "scale": -0.2}
    for case in cases(Case(head_dim=head_dim, causal=causal, **options)):
        check_forward(Call(case, torch.float16), with_gradient)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_backward_rotated(head_dim, causal):
    """Packed documents too, and both forwards."""
    options = {"head_dim": head_dim, "causal": causal, "rotate": True}
    for case in cases(Case(**options))[::3]:
        check_backward(Call(case, torch.bfloat16), same_bits=head_dim == 128 or not causal or case.heads[0] == case.heads[1])
    packed = Call(Case(**options, heads=(3, 3)), torch.bfloat16, DOCUMENTS)
    check_backward(packed)
    for call, with_gradient in itertools.product((packed, Call(case, torch.bfloat16)), (True, False)):
        check_forward(call, with_gradient)


@pytest.mark.parametrize(("head_dim", "options"), [(128, {}), (64, {}), (128, {"window": 200}), (128, {"mask": "left"})], ids=str)
def test_recommended_training(head_dim, options):
    """Causal, with a rotation, two scales to choose from, and a K shift: packed documents, else a window or padding.

    The forward with a key mask is the Triton kernel.
    """
    settings = {"head_dim": head_dim, "causal": True, "rotate": True, "four_over_six": True, "shift": True, **options}
    calls = [Call(Case(**settings), torch.bfloat16, DOCUMENTS)]
    if options:
        calls = [Call(case, torch.bfloat16) for case in cases(Case(**settings))[::3]]
    for call in calls:
        for with_gradient in {"window": [True], "mask": []}.get(next(iter(options), ""), [True, False]):
            check_forward(call, with_gradient)
        same_order = (head_dim == 128 and "window" not in options) or call.case.heads[0] == call.case.heads[1]
        check_backward(call, same_bits=same_order)


def test_forward_with_bf16_p_and_v():
    for causal in (False, True):
        for case in cases(Case(head_dim=128, causal=causal, preset="nvfp4_qk")):
            for with_gradient in (True, False):
                check_forward(Call(case, torch.float32), with_gradient)


@pytest.mark.parametrize("causal", [False, True])
def test_backward(causal):
    for case in cases(Case(head_dim=128, causal=causal), aligned=True):
        check_backward(Call(case, torch.bfloat16))
    check_graph(Call(Case(head_dim=128, causal=causal, lq=777, lk=777), torch.bfloat16))


@pytest.mark.parametrize("causal", [False, True])
def test_backward_for_head_dim_64(causal):
    """Packed documents too. Causal heads that share a key head are summed in another order than by the Triton kernel."""
    for case in cases(Case(head_dim=64, causal=causal)):
        check_backward(Call(case, torch.bfloat16), same_bits=not causal or case.heads[0] == case.heads[1])
    for heads in ((4, 2), (3, 3)):
        call = Call(Case(head_dim=64, causal=causal, heads=heads), torch.bfloat16, DOCUMENTS)
        check_backward(call, same_bits=not causal or heads[0] == heads[1])


@pytest.mark.parametrize("causal", [False, True])
def test_backward_of_packed_documents(causal):
    """Forward without a K shift, and backward."""
    for heads in ((4, 2), (3, 3)):
        call = Call(Case(head_dim=128, causal=causal, heads=heads), torch.bfloat16, DOCUMENTS)
        for with_gradient in (True, False):
            check_forward(call, with_gradient)
        check_backward(call)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_backward_with_a_key_mask(head_dim, causal):
    for n, mask in enumerate(MASKS):
        for lq, lk in ((777, 777), (301, 801), (801, 301)):
            heads = (3, 3) if causal and head_dim == 64 else (4, 2)
            case = Case(head_dim=head_dim, causal=causal, mask=mask, lq=lq, lk=lk, heads=heads, seed=n)
            check_backward(Call(case, torch.bfloat16))


# Windows and blocks that end within tiles, and longer ones; what the kernels are compiled for is the same for all lengths.
BOUNDED_CASES = (
    {"causal": True, "window": 200},
    {"causal": True, "block_size": 150},
    {"causal": True, "window": 90, "block_size": 20, "prefix": 70},
    {"bounds": "images"},
    {"bounds": "random", "prefix": 30},
)


@pytest.mark.parametrize("options", BOUNDED_CASES, ids=str)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_bounds(head_dim, options):
    """Forward with and without O', and backward. A window leaves alone what no query may see."""
    for case in cases(Case(head_dim=head_dim, **options)):
        call = Call(case, torch.bfloat16)
        for with_gradient in (True, False):
            check_forward(call, with_gradient)
        check_backward(call, same_bits=case.heads[0] == case.heads[1])


@pytest.mark.parametrize("options", BOUNDED_CASES[:3], ids=str)
def test_bounds_of_packed_documents(options):
    call = Call(Case(head_dim=128, heads=(3, 3), **options), torch.bfloat16, DOCUMENTS)
    check_forward(call, True)
    check_backward(call)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_few_keys_and_many_queries_are_summed_in_parts(head_dim, rotate):
    """In another order than by the Triton kernel."""
    from qat_kernels.triton.hopper.backward_launch import GradKeyValue

    call = Call(Case(head_dim=head_dim, lq=17_000, lk=301, heads=(2, 1), batch=1, rotate=rotate), torch.bfloat16)
    with mock.patch.object(GradKeyValue, "__call__", autospec=True, side_effect=GradKeyValue.__call__) as launched:
        call.backward(call.forward())
    assert launched.call_args.args[0].splits > 1
    check_backward(call, same_bits=False)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 200}], ids=str)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_backward_with_sinks_in_float16(head_dim, options):
    for case in cases(Case(head_dim=head_dim, sinks=True, **options)):
        same_order = (head_dim == 128 and "window" not in options) or not options or case.heads[0] == case.heads[1]
        check_backward(Call(case, torch.float16), same_bits=same_order)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 80, 96])
def test_backward_for_a_padded_head_dim(head_dim, causal):
    for case in cases(Case(head_dim=head_dim, causal=causal)):
        same_order = head_dim > 64 or not causal or case.heads[0] == case.heads[1]
        check_backward(Call(case, torch.float32 if causal else torch.float16), same_bits=same_order)


def check_graph(call: Call) -> None:
    """A CUDA graph that is replayed on other inputs returns what eager calls return."""

    def run() -> list[torch.Tensor]:
        saved = call.forward()
        return [saved.out, saved.lse, *call.backward(saved)[:3]]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in call.tensors:
        x.mul_(0.7).add_(0.1)
    expected = [x.clone() for x in run()]
    graph.replay()
    assert_same(captured, expected)
