"""KVCache: attention over packed keys and values, token by token, is causal attention over all of them."""

import pytest
import torch

from qat_kernels import KVCache, QuantSpec, attention, quantize
from qat_kernels.decode.byte_layout import unpack_rows
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
    case(window=20),
    case(window=33, mask="left", sinks=True, heads=(6, 2)),
    case(window=1, softcap=2.0, mask="holes"),
    case(window=48, mask="empty row", sinks=True),
    case(softcap=0.5, sinks=True, mask="right", size=3.0),
    case(window=30, rotate=True, shift=True, mask="left"),
    case(q_shifted=True),
    case(q_shifted=True, shift=True, rotate=True, mask="left", coarse=True, scale=-0.3),
    case(q_shifted=True, window=33, softcap=2.0, sinks=True, mask="holes", heads=(6, 2), head_dim=80),
    case(preset="kv_nvfp4"),
    case(preset="kv_nvfp4", window=23, softcap=3.0, mask="left"),
    case(preset="kv_nvfp4", window=7),
    case(preset="kv_nvfp4", mask="left", heads=(3, 1)),
    case(preset="kv_nvfp4", mask="holes", head_dim=80, scale=-0.3),
    case(preset="kv_nvfp4", mask="empty row", head_dim=48, size=1e-3),
]


each_kind = pytest.mark.parametrize("kind", [*({"preset": each} for each in KVCache.presets), {"q_shifted": True}], ids=str)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_attention_over_all_tokens(case, steps):
    q, k, v, _ = case.tensors()
    out, lse, cache = run_cache(case, steps, (q, k, v))
    expected, expected_lse = attention(q, k, v, return_lse=True, impl="eager", **case.options())
    assert error(out, expected) < 1e-12
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert cache.length == 75


WINDOWED = [
    {"window": 20},
    {"window": 70, "mask": "left", "sinks": True},
    {"window": 65, "mask": "holes", "softcap": 2.0, "heads": (6, 2)},
    {"window": 1, "mask": "empty row"},
    {"window": 300},
    {"window": 41, "mask": "left", "shift": True, "q_shifted": True},
    {"window": 23, "preset": "kv_nvfp4", "mask": "left", "softcap": 3.0},
    {"window": 128, "preset": "kv_nvfp4"},
]


@pytest.mark.parametrize("steps", [[430], [200, 130, 1, 1, 98], [3, 140, *[1] * 20, 250, 17]], ids=str)
@pytest.mark.parametrize("options", WINDOWED, ids=str)
def test_tokens_long_out_of_the_window_are_dropped(options, steps):
    """Rings of 128 and 256 tokens go round several times; a window that all tokens are in drops none."""
    problem = case(lq=430, lk=430, **options)
    q, k, v, _ = problem.tensors()
    out, lse, cache = run_cache(problem, steps, (q, k, v))
    expected, expected_lse = attention(q, k, v, return_lse=True, impl="eager", **problem.options())
    assert error(out, expected) < 1e-12
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    kept = -(-(options["window"] + 63) // 128) * 128
    assert cache._packed["key_codes"].shape[2] == kept < 430 or options["window"] == 300


@pytest.mark.parametrize("preset", KVCache.presets)
def test_bytes_follow_the_window_and_not_the_length(preset):
    """A window of gpt-oss: 128 keys of 64 elements."""
    cache, spec, sizes = KVCache(), QuantSpec(preset=preset), []
    k = torch.randn(1, 2, 5000, 64, dtype=torch.bfloat16)
    for start, stop in ((0, 1000), (1000, 1001), (1001, 5000)):
        cache.append(k[:, :, start:stop], k[:, :, start:stop], spec=spec, window=128)
        sizes.append(cache.nbytes)
    assert cache.length == 5000 and len(set(sizes)) == 1
    of_bfloat16 = 2 * 2 * 2 * 128 * 64
    recent = 0 if spec.kv_only else 64 * 2 * 64 * 2  # V of 64 tokens as it is
    assert sizes[0] - recent == 2 * of_bfloat16 * 9 / 32


@pytest.mark.parametrize("q_shifted", [False, True])
def test_crop_within_what_a_window_keeps(q_shifted):
    problem = case(lq=400, lk=400, window=60, mask="left", q_shifted=q_shifted)
    q, k, v, _ = problem.tensors()
    key_mask, cache = problem.key_mask(), KVCache()

    def step(stop):
        part = slice(cache.length, stop)
        options = {"key_mask": key_mask[:, :stop], "window": 60, "q_shift": problem.q_shift()}
        return cache.attention(*(x[:, :, part] for x in (q, k, v)), **options)

    expected = attention(q, k, v, **problem.options())
    step(300), step(330)
    for tokens in (30, 17, 1):
        cache.crop(tokens)
        start = cache.length
        assert error(step(330), expected[:, :, start:330]) < 1e-12
    cache.crop(2)
    with pytest.raises(
        ValueError,
        match=r"after 80 slots are removed, a window of 60 keys begins at slot 189, and those before 202 .* at most 67",
    ):
        cache.crop(80)
    assert error(step(400), expected[:, :, 328:]) < 1e-12
    cache.crop(400)
    assert error(step(100), expected[:, :, :100]) < 1e-12
    cache.crop(99)  # nothing was dropped
    assert error(step(100), expected[:, :, 1:100]) < 1e-12


@pytest.mark.parametrize("mask", [None, "left"])
@each_kind
def test_crop_removes_tokens(mask, kind):
    """Past the ends of groups, again and again; what cannot be restored is refused, and nothing has changed then."""
    problem = case(mask=mask, **kind)
    q, k, v, _ = problem.tensors()
    key_mask = problem.key_mask()

    def step(cache, stop):
        part = slice(cache.length, stop)
        wrong = [x[:, :, part].flip(2) * 7 + 1 for x in (q, k, v)]
        options = {"spec": problem.spec(), "key_mask": None if key_mask is None else key_mask[:, :stop]}
        options["q_shift"] = problem.q_shift()
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
    with pytest.raises(ValueError, match="60 slots reach into a group of 16 whose values are kept in NVFP4 only"):
        cache.crop(60)
    with pytest.raises(ValueError, match="34 slots reach into a group"):
        cache.crop(34)  # to 95, and the values of 80 are gone
    with pytest.raises(ValueError, match="from 0 to 129, got 130"):
        cache.crop(130)
    out = cache.attention(*(x[:, :, 129:] for x in (q, k, v)))
    assert error(out, attention(q, k, v, causal=True)[:, :, 129:]) < 1e-12
    cache.crop(34)  # to 96: no group is open
    assert cache.length == 96
    cache.crop(80)  # into the sink group, whose values are always kept
    out = cache.attention(*(x[:, :, 16:] for x in (q, k, v)))
    assert error(out, attention(q, k, v, causal=True)[:, :, 16:]) < 1e-12
    cache.crop(130)
    assert cache.length == cache.nbytes == 0


def test_without_kept_groups_any_number_of_tokens_can_be_removed():
    """Into the middle of any group, the first too, and before the first allowed slot of a sequence."""
    problem = case(preset="kv_nvfp4", mask="left", lq=300, lk=300)
    q, k, v, _ = problem.tensors()
    mask, spec = problem.key_mask(), problem.spec()
    first = int((~mask).sum(1).max())
    cache = KVCache()
    cache.append(k.flip(2), v.flip(2), spec=spec, key_mask=mask)
    for length in (200, first + 3, first - 5, 1):
        cache.crop(cache.length - length)
        assert cache.length == length
    cache.crop(1)
    assert cache.length == cache.nbytes == 0
    cache.append(k, v, spec=spec, key_mask=mask)
    cache.crop(300 - (first - 5))
    out = cache.attention(*(x[:, :, first - 5 :] for x in (q, k, v)), spec=spec, key_mask=mask)
    assert error(out, attention(q, k, v, **problem.options())[:, :, first - 5 :]) < 1e-12


@pytest.mark.parametrize("head_dim", [48, 128])
def test_holds_what_servers_hold(head_dim):
    """K and V of a token in groups along the head dim, by the reciprocal rule, down to the scale of zero; half a byte and a
    sixteenth a value, and nothing else."""
    x = torch.randn(2, 3, 40, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    x[:, :, 7] *= 2.0**-12
    x[:, :, 8, :16], x[:, :, 9] = 0.0, float("inf")
    cache = KVCache()
    for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
        cache.append(x[:, :, part], -2 * x[:, :, part], spec=QuantSpec(preset="kv_nvfp4"))
    for name, stored in (("key", x), ("value", -2 * x)):
        codes, scales = (cache._packed[f"{name}_{part}"][:, :, :40] for part in ("codes", "scales"))
        expected = quantize(stored, scale="reciprocal")
        codes, scales = unpack_rows(codes, scales, head_dim)
        assert torch.equal(codes, expected.codes) and torch.equal(scales, expected.scales.view(torch.uint8))
        assert (scales[:, :, 8, 0] == 0).all() and (scales[:, :, 9] == 0x7F).all()
    assert cache.nbytes == 2 * 2 * 3 * 128 * 18 * -(-head_dim // 32)  # room for 128 tokens, in rows of 32 elements


@each_kind
def test_select_reorders_drops_and_repeats_sequences(kind):
    problem = case(mask="left", batch=3, **kind)
    q, k, v, _ = problem.tensors()
    mask, rows = problem.key_mask(), torch.tensor([2, 0, 0, 1])
    cache, options = KVCache(), {"spec": problem.spec(), "q_shift": problem.q_shift()}
    cache.attention(q[:, :, :50], k[:, :, :50], v[:, :, :50], key_mask=mask[:, :50], **options)
    cache.select(rows)
    out = cache.attention(*(x[rows, :, 50:] for x in (q, k, v)), key_mask=mask[rows], **options)
    assert error(out, attention(q, k, v, **problem.options())[rows, :, 50:]) < 1e-12


def test_of_keys_with_a_shift_of_queries_the_cache_keeps_a_float32_more():
    """One for each key and key head that there is room for, and nothing without a shift; `crop` and `select` know it."""
    k, sizes = torch.randn(2, 3, 300, 64, dtype=torch.bfloat16), []
    for q_shift in (None, torch.randn(3, 64)):
        cache = KVCache()
        cache.append(k, k, q_shift=q_shift)
        sizes.append(cache.nbytes)
        cache.select(torch.tensor([1]))
        sizes.append(cache.nbytes)
        cache.crop(300)
        assert cache.nbytes == 0
    assert [large - small for small, large in zip(sizes[:2], sizes[2:], strict=True)] == [4 * 2 * 3 * 384, 4 * 3 * 384]


def test_excluded_and_removed_keys_may_hold_anything_with_a_shift_of_queries():
    problem = case(mask="holes", q_shifted=True, shift=True)
    q, k, v, _ = problem.tensors()
    mask, expected = problem.key_mask(), attention(q, k, v, **problem.options())
    k, v = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (k, v))
    cache, parts = KVCache(), []
    for stop in (40, 41, 60, 75):
        part, options = slice(cache.length, stop), {"k_shift": problem.k_shift(), "q_shift": problem.q_shift()}
        wrong = torch.full_like(k[:, :, part], torch.nan)
        cache.append(wrong, wrong, key_mask=mask[:, :stop], **options)
        cache.crop(stop - part.start)
        parts.append(cache.attention(*(x[:, :, part] for x in (q, k, v)), key_mask=mask[:, :stop], **options))
    assert error(torch.cat(parts, 2), expected) < 1e-12


@pytest.mark.parametrize("length", [4096, 4097, 10_000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", KVCache.presets)
def test_bytes_are_at_most_30_percent_of_bfloat16(length, head_dim, preset):
    cache, spec = KVCache(), QuantSpec(preset=preset)
    k = torch.randn(1, 1, length - 5, head_dim, dtype=torch.bfloat16)
    cache.append(k, k, spec=spec)
    cache.attention(*[k[:, :, :5]] * 3, spec=spec)
    assert cache.length == length
    assert cache.nbytes <= 0.30 * 2 * 2 * length * head_dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": QuantSpec(preset="nvfp4_qk")}, "a spec with preset 'nvfp4' or 'kv_nvfp4', got .*'nvfp4_qk'"),
        ({"spec": QuantSpec(preset="kv_nvfp4_fp8")}, "a spec with preset 'nvfp4' or 'kv_nvfp4', got .*'kv_nvfp4_fp8'"),
        ({"spec": QuantSpec(preset="kv_nvfp4")}, "expected QuantSpec.*'nvfp4'.*with which it was filled, got .*'kv_nvfp4'"),
        ({"spec": QuantSpec(rotate=True)}, "expected QuantSpec.*rotate=False.*with which it was filled"),
        ({"window": 5}, "expected window=None, with which it was filled, got window=5"),
        ({"q_shift": torch.zeros(2, 32)}, "expected q_shift=None, with which it was filled, got a tensor"),
        ({"q_shift": torch.zeros(4, 32)}, r"q_shift: expected torch.float32 \[2, 32\]"),
        ({"window": 0}, "window: expected an int from 1 on"),
        ({"sinks": torch.zeros(3)}, r"sinks: expected torch.float32 or torch.float32 \[4\]"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, "no gradient"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask bool \[2, 23\] over all slots"),
        ({"q": torch.zeros(2, 4, 2, 32)}, "as many queries as new keys, and at least one, got 2 and 3"),
        ({"q": torch.zeros(2, 4, 3, 32, requires_grad=True)}, "no gradient"),
        ({name: torch.zeros(1, 2, 3, 32) for name in "qkv"}, "expected k that continues"),
        ({"v": torch.zeros(2, 2, 3, 48)}, "values of the head dim of the keys, 32, got 48; keep them in an ordinary cache"),
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


def test_a_cache_that_was_filled_with_a_shift_of_queries_needs_it():
    x, q_shift = torch.zeros(1, 2, 20, 32), torch.zeros(2, 32)
    cache = KVCache()
    cache.append(x, x, q_shift=q_shift)
    with pytest.raises(ValueError, match="expected q_shift=a tensor, with which it was filled, got None"):
        cache.append(x, x)
    assert cache.length == 20
    cache.crop(20)  # an empty cache takes either
    cache.append(x, x)
    assert cache.length == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fp4"}, "impl with preset='kv_nvfp4': expected auto, eager or triton, got 'fp4'"),
        ({"impl": "sdpa"}, "impl with preset='kv_nvfp4': expected auto, eager or triton, got 'sdpa'"),
        ({"impl": "triton"}, "dtype with impl='triton': expected float32.*got torch.float64"),
        ({"k_shift": torch.zeros(2, 32)}, "k_shift with preset='kv_nvfp4'"),
        ({"q_shift": torch.zeros(2, 32)}, "q_shift with preset='kv_nvfp4'"),
        ({"sinks": torch.zeros(4)}, "sinks with preset='kv_nvfp4'"),
    ],
)
def test_what_servers_do_not_compute_is_refused(options, message):
    q, k = torch.zeros(2, 4, 20, 32, dtype=torch.float64), torch.zeros(2, 2, 20, 32, dtype=torch.float64)
    cache = KVCache()
    with pytest.raises(ValueError, match=message):
        cache.attention(q, k, k, spec=QuantSpec(preset="kv_nvfp4"), **options)
    assert cache.length == cache.nbytes == 0


@pytest.mark.parametrize("preset", KVCache.presets)
def test_kernels_that_cannot_run_here_are_refused_before_anything_changes(preset):
    q, k = torch.zeros(1, 2, 20, 32), torch.zeros(1, 2, 20, 32)
    cache = KVCache()
    for call in (cache.attention, lambda _, *inputs, **options: cache.append(*inputs, **options)):
        with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU, got cpu"):
            call(q, k, k, spec=QuantSpec(preset=preset), impl="triton")
        assert cache.length == cache.nbytes == 0


def test_autocast_does_not_round_what_is_stored():
    """The rotation of the keys is a matrix product."""
    problem = case(rotate=True)
    _, k, v, _ = problem.tensors(torch.float32)
    cache, same = KVCache(), KVCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(k, v, spec=problem.spec())
    same.append(k, v, spec=problem.spec())
    assert torch.equal(cache._packed["key_codes"], same._packed["key_codes"])
