"""KVCache in Triton against the eager one: the packed bytes are equal, and attention over them is within the bounds.

On a CPU Triton's interpreter runs small shapes; on a GPU the same tests run natively, and larger problems beside them.
"""

import pytest
import torch

from support.kernels.cache_runs import run_cache
from support.kernels.cases import Case, assert_same_bits, error, lse_error
from support.kernels.interpreter import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = {196: [143, 1, 1, 9, 1, 40, 1], 100: [71, 1, 1, 8, 19]}
"""By the number of tokens: prompt, single tokens, several at once; of 196 also more than the ring of values has room for."""
SHORT = {"preset": "kv_nvfp4", "lq": 100, "lk": 100}
CASES = [
    Case(**({"lq": 196, "lk": 196, "batch": 2, "heads": (2, 1), "causal": True, "coarse": True, "seed": 3} | options))
    for options in (
        {"heads": (5, 1), "head_dim": 128, "batch": 1},
        {"mask": "left", "head_dim": 64, "heads": (6, 2)},
        {"mask": "holes", "rotate": True, "shift": True},
        {"mask": "empty row", "head_dim": 80, "four_over_six": True},
        {"head_dim": 16, "rotate": True, "scale": -0.7},
        {"head_dim": 256, "batch": 1, "size": 3.0},
        {"q_shifted": True, "window": 40, "mask": "left", "sinks": True, "softcap": 2.0, "heads": (3, 1)},
        {"window": 9, "heads": (2, 2), "batch": 1, "sinks": True},
        {"q_shifted": True, "mask": "left", "heads": (3, 1)},
        {"q_shifted": True, "mask": "holes", "rotate": True, "shift": True, "head_dim": 16, "scale": -0.7},
        {"preset": "kv_nvfp4", "window": 50, "mask": "left", "softcap": 2.0, "batch": 1},
        SHORT | {"heads": (5, 1), "head_dim": 128, "batch": 1},
        SHORT | {"mask": "empty row", "head_dim": 80, "scale": -0.7},
        SHORT | {"mask": "left", "head_dim": 16, "size": 0.03, "scale": 300.0},
    )
]
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def bound(case: Case, dtype: torch.dtype, device: str) -> float:
    """With `kv_nvfp4` Q and P~ are float16; V of kept groups is multiplied as TF32 on a GPU."""
    return 1e-3 if dtype == torch.float32 and (device == "cuda" or case.spec().kv_only) else BOUNDS[dtype]


def run_with_triton(case: Case, dtype: torch.dtype, *, device: str):
    """Output, log-sum-exp and the bytes of the cache, with Triton; twice on a GPU and for one dtype, to compare bits."""
    tensors = [x.to(dtype) for x in case.tensors()[:3]]
    results = []
    prompt_impl = None if device == "cuda" else "eager"  # the interpreter takes long, and the kernels of prompts have other tests
    for _ in range(2 if device == "cuda" or dtype == torch.float32 else 1):
        out, lse, cache = run_cache(case, STEPS[case.lk], tensors, impl="triton", prompt_impl=prompt_impl, device=device)
        results.append((out, lse, {name: x.cpu() for name, x in cache._packed.items()} | {"recent": cache._recent.cpu()}))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_same_bytes_and_output_as_eager(index, device):
    """Dtypes take turns under the interpreter."""
    case = CASES[index]
    for dtype in list(BOUNDS) if device == "cuda" else [list(BOUNDS)[index % 3]]:
        tensors = [x.to(dtype) for x in case.tensors()[:3]]
        (out, lse, packed), *again = on(device, run_with_triton, case, dtype)
        for each in again:
            assert_same_bits(each, (out, lse, packed))
        _, _, cache = run_cache(case, STEPS[case.lk], tensors)
        for name, expected in cache._packed.items():
            assert torch.equal(packed[name], expected), name
        assert torch.equal(packed["recent"], cache._recent)
        # A quantized step of P~ is the same whatever the maximum it was taken from: the reference sees all keys at once.
        expected, expected_lse, _ = run_cache(case, STEPS[case.lk], [x.float() for x in tensors])
        assert out.dtype == dtype
        decoded = slice(STEPS[case.lk][0], None)
        assert error(out[:, :, decoded], expected[:, :, decoded]) < bound(case, dtype, device)
        assert lse_error(lse[:, :, decoded], expected_lse[:, :, decoded]) < 1e-4


def step_with(case: Case, size: float, *, device: str):
    """O and LSE of the last token, with queries multiplied by a factor, and a scale that undoes it."""
    from qat_kernels import KVCache

    q, k, v = (x.to(device) for x in case.tensors(torch.bfloat16)[:3])
    cache, options = KVCache(), {"spec": case.spec(), "impl": "triton"}
    cache.append(k[:, :, :-1], v[:, :, :-1], **options)
    out, lse = cache.attention(q[:, :, -1:] * size, k[:, :, -1:], v[:, :, -1:], scale=0.2 / size, return_lse=True, **options)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_queries_may_be_of_any_size(device):
    """float16 would hold neither of these: rows are brought to its middle by powers of two."""
    case = Case(lq=24, lk=24, batch=1, heads=(2, 1), causal=True, preset="kv_nvfp4")
    expected = on(device, step_with, case, 1.0)
    assert expected[0].isfinite().all() and expected[0].count_nonzero() == expected[0].numel()
    for size in (2.0**-40, 2.0**40):
        assert_same_bits(on(device, step_with, case, size), expected)


def step_after_crop(impl: str, *, device: str = "cpu"):
    """O of two tokens, where others stood that were not finite and were taken back; one sequence begins late."""
    from qat_kernels import KVCache, QuantSpec

    x = torch.randn(2, 1, 45, 48, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    mask = torch.arange(45, device=device) >= torch.tensor([0, 19], device=device)[:, None]
    cache, options = KVCache(), {"spec": QuantSpec(preset="kv_nvfp4"), "impl": impl}
    cache.append(x[:, :, :40], -x[:, :, :40], key_mask=mask[:, :40], **options)
    wrong = torch.full_like(x[:, :, 40:], float("nan"))
    cache.append(wrong, wrong, key_mask=mask, **options)
    cache.crop(7)
    out = cache.attention(x[:, :, 38:40], x[:, :, 38:40], -x[:, :, 38:40], key_mask=mask[:, :40], **options)
    return out.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_removed_tokens_are_never_computed_with(device):
    out, expected = on(device, step_after_crop, "triton"), step_after_crop("eager")
    assert expected.isfinite().all() and error(out, expected) < 2e-3


def add_with_padding(impl: str, preset: str, *, device: str = "cpu"):
    """Sequences that begin late, one of them after the prompt; tokens are added, taken back and added again."""
    from qat_kernels import KVCache, QuantSpec

    x = torch.randn(3, 1, 1270, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    mask = torch.arange(1270, device=device) >= torch.tensor([0, 1100, 1203], device=device)[:, None]
    cache = KVCache()
    for stop, crop in (
        (1180, 0),
        (1181, 0),
        (1200, 2),
        (1199, 0),
        (1202, 1),
        (1210, 2),
        (1250, 20),
        (1260, 0),
        (1261, 0),
        (1270, 0),
    ):
        key, value = (y[:, :, cache.length : stop] for y in (x, -x))
        cache.append(key, value, spec=QuantSpec(preset=preset), key_mask=mask[:, :stop], impl=impl)
        cache.crop(crop)
    return cache._leftpad.cpu(), cache._recent.cpu(), {name: y.cpu() for name, y in cache._packed.items()}


@pytest.mark.parametrize(
    ("device", "preset"),
    # The interpreter takes long, and finding the first token is the same code.
    [("cpu", "nvfp4"), *[pytest.param("cuda", preset, marks=pytest.mark.gpu) for preset in ("nvfp4", "kv_nvfp4")]],
)
def test_first_tokens_are_found_and_tokens_removed_as_in_eager(device, preset):
    first, recent, packed = on(device, add_with_padding, "triton", preset)
    expected_first, expected_recent, expected = add_with_padding("eager", preset)
    assert first.tolist() == expected_first.tolist() == [0, 1100, 1203]
    assert torch.equal(recent, expected_recent)
    assert all(torch.equal(packed[name], expected[name]) for name in packed)


def add_more_than_is_kept(impl: str, preset: str, *, device: str = "cpu"):
    """300 tokens at once, and 7 more, where 128 are kept; sequences begin at several slots."""
    from qat_kernels import KVCache, QuantSpec

    x = torch.randn(2, 1, 307, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    mask = torch.arange(307, device=device) >= torch.tensor([3, 290], device=device)[:, None]
    cache, options = KVCache(), {"spec": QuantSpec(preset=preset), "window": 20, "impl": impl}
    for part in (slice(0, 300), slice(300, 307)):
        cache.append(x[:, :, part], -2 * x[:, :, part], key_mask=mask[:, : part.stop], **options)
    return {name: x.cpu() for name, x in cache._packed.items()} | {"recent": cache._recent.cpu()}


def steps_within_a_window(impl: str, preset: str, poisoned: bool, *, device: str = "cpu"):
    """O of one token and of several, with windows of 200 of 380 tokens; poisoned: the first 128 are NaN in the cache."""
    from qat_kernels import KVCache, QuantSpec

    x = torch.randn(1, 1, 380, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    cache, options = KVCache(), {"spec": QuantSpec(preset=preset), "window": 200}
    cache.append(x[:, :, :370], x[:, :, :370], **options, impl="eager")
    if poisoned:
        for name, packed in cache._packed.items():
            if name != "sink":
                (packed[:, :, :1] if name.startswith("value") and preset == "nvfp4" else packed[:, :, :128]).fill_(0x7F)
        if preset == "nvfp4":
            cache._packed["sink"].fill_(float("nan"))
    parts = (slice(370, 371), slice(371, 380))
    return torch.cat([cache.attention(*[x[:, :, part]] * 3, **options, impl=impl) for part in parts], 2).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["nvfp4", "kv_nvfp4"])
def test_what_is_in_no_window_is_not_read(preset, device):
    clean, poisoned = (steps_within_a_window("eager", preset, each) for each in (False, True))
    assert torch.equal(poisoned, clean)
    out = on(device, steps_within_a_window, "triton", preset, True)
    assert error(out, clean) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["nvfp4", "kv_nvfp4"])
def test_of_more_tokens_than_are_kept_the_last_ones_are(preset, device):
    packed, expected = on(device, add_more_than_is_kept, "triton", preset), add_more_than_is_kept("eager", preset)
    assert expected["key_codes"].shape[2] == 128
    for name in expected:
        assert torch.equal(packed[name], expected[name]), name


LONG = ({}, {"mask": "left"}, {"head_dim": 64, "heads": (9, 3)}, {"window": 1000, "softcap": 5.0, "mask": "left"}, {"window": 4})
Q_SHIFTED = {"q_shifted": True, "coarse": True}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        *({"preset": preset} | options for preset in ("nvfp4", "kv_nvfp4") for options in LONG),
        *(Q_SHIFTED | {"rotate": True}, Q_SHIFTED | {"window": 1000, "softcap": 5.0, "mask": "left"}),
    ],
    ids=str,
)
def test_long_caches_stay_within_the_bounds(options):
    """Many splits, and rows of different lengths; a prompt of thousands of tokens, then one, then several."""
    from qat_kernels import KVCache

    case = {"lq": 5013, "lk": 5013, "batch": 3, "heads": (40, 8), "head_dim": 128, "causal": True, "seed": 5}
    case = Case(**(case | options))
    q, k, v = (x.cuda() for x in case.tensors(torch.bfloat16)[:3])
    mask, q_shift = (None if x is None else x.cuda() for x in (case.key_mask(), case.q_shift()))
    shared = {"spec": case.spec(), "q_shift": q_shift}
    caches, prompt = (KVCache(), KVCache()), 5000
    for cache, impl in zip(caches, ("triton", "eager"), strict=True):
        part = {"key_mask": None if mask is None else mask[:, :prompt], "window": case.window, "impl": impl}
        cache.append(k[:, :, :prompt], v[:, :, :prompt], **part, **shared)
    for start, stop in ((prompt, prompt + 1), (prompt + 1, 5013)):
        options = {"key_mask": None if mask is None else mask[:, :stop], "return_lse": True} | shared | case.features()
        inputs = [x[:, :, start:stop] for x in (q, k, v)]
        out, lse = caches[0].attention(*inputs, impl="triton", **options)
        expected, expected_lse = caches[1].attention(*inputs, impl="eager", **options)
        assert error(out, expected.float()) < 5e-3  # both are rounded to bfloat16
        assert lse_error(lse, expected_lse) < 1e-4
    for name, packed in caches[1]._packed.items():
        assert torch.equal(caches[0]._packed[name], packed), name


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["nvfp4", "kv_nvfp4"])
@pytest.mark.parametrize("mask", [None, "left"])
def test_prompt_and_tokens_are_those_of_full_recomputation(mask, preset):
    """As `generate` calls it, the prompt in one piece by the fastest implementation, in bfloat16: docs/NUMERICS.md, section 7."""
    from qat_kernels import KVCache, attention

    case = Case(lq=900, lk=900, batch=3, heads=(10, 2), head_dim=128, causal=True, mask=mask, preset=preset, seed=6)
    q, k, v = (x.cuda() for x in case.tensors(torch.bfloat16)[:3])
    key_mask = None if mask is None else case.key_mask().cuda()
    cache, parts, spec = KVCache(), [], case.spec()
    for start, stop in [(0, 850), (850, 880), *((n, n + 1) for n in range(880, 900))]:
        part = None if key_mask is None else key_mask[:, :stop]
        parts.append(cache.attention(*(x[:, :, start:stop] for x in (q, k, v)), key_mask=part, spec=spec))
    exact = (x.float() for x in (q, k, v))
    expected = attention(*exact, causal=True, key_mask=key_mask, spec=spec, impl="eager")
    for row, out in enumerate(torch.cat(parts, 2)):
        first = 0 if key_mask is None else int(key_mask[row].int().argmax())
        assert error(out[:, first:850], expected[row, :, first:850]) < 3e-3
        assert error(out[:, 850:], expected[row, :, 850:]) < 3e-3
