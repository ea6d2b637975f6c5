"""KVCache: attention over packed keys and values, token by token, is causal attention over all of them."""

import pytest
import torch

from qat_kernels import KVCache, QuantSpec, attention
from support.kernels.cache_runs import run_cache
from support.kernels.cases import Case, error

STEPS = {
    "one by one": [1] * 75,
    "prompt, then tokens": [40, *[1] * 35],
    "chunks": [3, 20, 17, 1, 1, 30, 3],
    "a long chunk": [30, 45],
}


def case(**options) -> Case:
    return Case(**{"lq": 75, "lk": 75, "causal": True, "seed": 3} | options)


CASES = [
    case(),
    case(mask="left"),
    case(mask="holes", heads=(3, 1)),
    case(mask="right", head_dim=64),
    case(mask="empty row", head_dim=48),
    case(rotate=True, four_over_six=True, shift=True, mask="left", coarse=True),
    case(head_dim=80, scale=-0.3, shift=True),
    case(head_dim=16, size=10.0),
]


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_attention_over_all_tokens(case, steps):
    q, k, v, _ = case.tensors()
    out, lse, cache = run_cache(case, steps, (q, k, v))
    expected, expected_lse = attention(q, k, v, return_lse=True, **case.options())
    assert error(out, expected) < 1e-12
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert cache.length == 75


@pytest.mark.parametrize("mask", [None, "left"])
def test_crop_takes_tokens_back(mask):
    """Past the ends of groups, again and again; what cannot be restored is refused, and nothing has changed then."""
    problem = case(mask=mask)
    q, k, v, _ = problem.tensors()
    key_mask = problem.key_mask()

    def step(cache, stop):
        part = slice(cache.length, stop)
        wrong = [x[:, :, part].flip(2) * 7 + 1 for x in (q, k, v)]
        options = {"key_mask": None if key_mask is None else key_mask[:, :stop]}
        cache.attention(*wrong, **options)
        cache.crop(stop - part.start)
        return cache.attention(*(x[:, :, part] for x in (q, k, v)), **options)

    expected = attention(q, k, v, **problem.options())
    cache = KVCache()
    parts = [step(cache, 40), *(step(cache, stop) for stop in (41, 45, 58, 64, 75))]
    assert error(torch.cat(parts, 2), expected) < 1e-12


def test_crop_beyond_the_values_at_hand_is_refused():
    problem = case(lq=130, lk=130)
    q, k, v, _ = problem.tensors()
    cache = KVCache()
    cache.attention(*(x[:, :, :129] for x in (q, k, v)))
    with pytest.raises(ValueError, match="60 slots reach into a group of 16 whose values are only left in NVFP4"):
        cache.crop(60)
    with pytest.raises(ValueError, match="34 slots reach into a group"):
        cache.crop(34)  # to 95, and the values of 80 are gone
    with pytest.raises(ValueError, match="from 0 to 129, got 130"):
        cache.crop(130)
    out = cache.attention(*(x[:, :, 129:] for x in (q, k, v)))
    assert error(out, attention(q, k, v, causal=True)[:, :, 129:]) < 1e-12
    cache.crop(34)  # to 96: no group is open
    assert cache.length == 96
    cache.crop(80)  # into the sink group, whose values are always at hand
    out = cache.attention(*(x[:, :, 16:] for x in (q, k, v)))
    assert error(out, attention(q, k, v, causal=True)[:, :, 16:]) < 1e-12
    cache.crop(130)
    assert cache.length == cache.nbytes == 0


def test_select_reorders_drops_and_repeats_sequences():
    problem = case(mask="left", batch=3)
    q, k, v, _ = problem.tensors()
    mask, rows = problem.key_mask(), torch.tensor([2, 0, 0, 1])
    cache = KVCache()
    cache.attention(q[:, :, :50], k[:, :, :50], v[:, :, :50], key_mask=mask[:, :50])
    cache.select(rows)
    out = cache.attention(*(x[rows, :, 50:] for x in (q, k, v)), key_mask=mask[rows])
    assert error(out, attention(q, k, v, **problem.options())[rows, :, 50:]) < 1e-12


@pytest.mark.parametrize("length", [4096, 4097, 10_000])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_are_at_most_30_percent_of_bfloat16(length, head_dim):
    cache = KVCache()
    k = torch.randn(1, 1, length - 5, head_dim, dtype=torch.bfloat16)
    cache.append(k, k)
    cache.attention(*[k[:, :, :5]] * 3)
    assert cache.length == length
    assert cache.nbytes <= 0.30 * 2 * 2 * length * head_dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": QuantSpec(pv="bf16")}, "pv='nvfp4', which the cache stores V in"),
        ({"spec": QuantSpec(rotate=True)}, "expected QuantSpec.*rotate=False.*with which it was filled"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask bool \[2, 23\] over all slots"),
        ({"q": torch.zeros(2, 4, 2, 32)}, "as many queries as new keys, and at least one, got 2 and 3"),
        ({"q": torch.zeros(2, 4, 3, 32, requires_grad=True)}, "no gradient"),
        ({name: torch.zeros(1, 2, 3, 32) for name in "qkv"}, "expected k that continues"),
    ],
)
def test_what_does_not_continue_the_cache_is_refused(change, message):
    q, k, v = torch.zeros(2, 4, 20, 32), torch.zeros(2, 2, 20, 32), torch.zeros(2, 2, 20, 32)
    cache = KVCache()
    cache.attention(q, k, v)
    inputs = {"q": q[:, :, :3], "k": k[:, :, :3], "v": v[:, :, :3]} | change
    with pytest.raises(ValueError, match=message):
        cache.attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)
    assert cache.length == 20
    assert cache.attention(q[:, :, :3], k[:, :, :3], v[:, :, :3]).shape == (2, 4, 3, 32)
