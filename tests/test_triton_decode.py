"""KVCache in Triton against the eager one: the packed bytes are equal, and attention over them is within the bounds.

On a CPU Triton's interpreter runs small shapes; on a GPU the same tests run natively, and larger problems beside them.
"""

import pytest
import torch

from cases import Case, assert_same_bits, error, lse_error
from interpreter import on
from test_kv_cache import run_cache

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = [150, 1, 1, 9, 1, 20, 1]
"""Of 183 tokens: prompt, single tokens, several at once."""
CASES = [
    Case(**({"lq": 183, "lk": 183, "batch": 2, "heads": (2, 1), "causal": True, "coarse": True, "seed": 3} | options))
    for options in (
        {"heads": (5, 1), "head_dim": 128, "batch": 1},
        {"mask": "left", "head_dim": 64, "heads": (6, 2)},
        {"mask": "holes", "rotate": True, "shift": True},
        {"mask": "empty row", "head_dim": 80, "four_over_six": True},
        {"head_dim": 16, "rotate": True, "scale": 0.7},
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
