"""KVCache in Triton against the eager one: the packed bytes are equal, and attention over them is within the bounds.

On a CPU Triton's interpreter runs small shapes; on a GPU the same tests run natively, and larger problems beside them.
"""

import pytest
import torch

from support.kernels.cache_runs import run_cache
from support.kernels.cases import Case, assert_same_bits, error, lse_error
from support.kernels.interpreter import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = [143, 1, 1, 9, 1, 40, 1]
"""Of 196 tokens: prompt, single tokens, several at once, also more than the ring of values has room for."""
CASES = [
    Case(**({"lq": 196, "lk": 196, "batch": 2, "heads": (2, 1), "causal": True, "coarse": True, "seed": 3} | options))
    for options in (
        {"heads": (5, 1), "head_dim": 128, "batch": 1},
        {"mask": "left", "head_dim": 64, "heads": (6, 2)},
        {"mask": "holes", "rotate": True, "shift": True},
        {"mask": "empty row", "head_dim": 80, "four_over_six": True},
        {"head_dim": 16, "rotate": True, "scale": -0.7},
        {"head_dim": 256, "batch": 1, "size": 3.0},
    )
]
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def run_with_triton(case: Case, dtype: torch.dtype, *, device: str):
    """Output, log-sum-exp and the bytes of the cache, with Triton; twice on a GPU and for one dtype, to compare bits."""
    tensors = [x.to(dtype) for x in case.tensors()[:3]]
    results = []
    prompt_impl = None if device == "cuda" else "eager"  # the interpreter takes long, and the kernels of prompts have other tests
    for _ in range(2 if device == "cuda" or dtype == torch.float32 else 1):
        out, lse, cache = run_cache(case, STEPS, tensors, impl="triton", prompt_impl=prompt_impl, device=device)
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
        _, _, cache = run_cache(case, STEPS, tensors)
        for name, expected in cache._packed.items():
            assert torch.equal(packed[name], expected), name
        assert torch.equal(packed["recent"], cache._recent)
        # A quantized step of P~ is the same whatever the maximum it was taken from: the reference sees all keys at once.
        expected, expected_lse, _ = run_cache(case, STEPS, [x.float() for x in tensors])
        assert out.dtype == dtype
        decoded = slice(STEPS[0], None)
        bound = 1e-3 if dtype == torch.float32 and device == "cuda" else BOUNDS[dtype]
        assert error(out[:, :, decoded], expected[:, :, decoded]) < bound
        assert lse_error(lse[:, :, decoded], expected_lse[:, :, decoded]) < 1e-4


def add_with_padding(impl: str, *, device: str = "cpu"):
    """Sequences that begin late, one of them after the prompt; tokens are added, taken back and added again."""
    from qat_kernels import KVCache

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
        cache.append(key, value, key_mask=mask[:, :stop], impl=impl)
        cache.crop(crop)
    return cache._leftpad.cpu(), cache._recent.cpu(), {name: y.cpu() for name, y in cache._packed.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_first_tokens_are_found_and_tokens_taken_back_as_in_eager(device):
    first, recent, packed = on(device, add_with_padding, "triton")
    expected_first, expected_recent, expected = add_with_padding("eager")
    assert first.tolist() == expected_first.tolist() == [0, 1100, 1203]
    assert torch.equal(recent, expected_recent)
    assert all(torch.equal(packed[name], expected[name]) for name in packed)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"mask": "left"}, {"head_dim": 64, "heads": (9, 3)}], ids=str)
def test_long_caches_stay_within_the_bounds(options):
    """Many splits, and rows of different lengths; a prompt of thousands of tokens, then one, then several."""
    from qat_kernels import KVCache

    case = Case(**({"lq": 5013, "lk": 5013, "batch": 3, "heads": (40, 8), "head_dim": 128, "causal": True, "seed": 5} | options))
    q, k, v = (x.cuda() for x in case.tensors(torch.bfloat16)[:3])
    mask = None if case.mask is None else case.key_mask().cuda()
    caches, prompt = (KVCache(), KVCache()), 5000
    for cache, impl in zip(caches, ("triton", "eager"), strict=True):
        cache.append(k[:, :, :prompt], v[:, :, :prompt], key_mask=None if mask is None else mask[:, :prompt], impl=impl)
    for start, stop in ((prompt, prompt + 1), (prompt + 1, 5013)):
        options = {"key_mask": None if mask is None else mask[:, :stop], "return_lse": True}
        inputs = [x[:, :, start:stop] for x in (q, k, v)]
        out, lse = caches[0].attention(*inputs, impl="triton", **options)
        expected, expected_lse = caches[1].attention(*inputs, impl="eager", **options)
        assert error(out, expected.float()) < 5e-3  # both are rounded to bfloat16
        assert lse_error(lse, expected_lse) < 1e-4
    for name, packed in caches[1]._packed.items():
        assert torch.equal(caches[0]._packed[name], packed), name
