"""What `attention` and `QuantSpec` refuse, with what words; and QuantSpec as JSON."""

import dataclasses
import itertools
import json

import pytest
import torch

from qat_kernels import NVFP4, QuantSpec, attention


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, KV = (2, 4, 5, 32), (2, 2, 7, 32)
WRONG_CALLS = {
    "q without heads": (
        {"q": tensor(2, 5, 32)},
        r"q: expected a tensor \[batch, heads, length, head_dim\], got shape \(2, 5, 32\)",
    ),
    "v with five dimensions": ({"v": tensor(1, *KV)}, r"v: expected a tensor \[.*\], got shape \(1, 2, 2, 7, 32\)"),
    "k that is a list": ({"k": [1.0]}, r"k: expected a tensor \[.*\], got <class 'list'>"),
    "k and v of different lengths": (
        {"v": tensor(2, 2, 6, 32)},
        r"shapes of k and v: expected \[B, Hk, Lk, D\] and \[B, Hk, Lk, Dv\], got \(2, 2, 7, 32\) and \(2, 2, 6, 32\)",
    ),
    "k and v of different heads": (
        {"k": tensor(2, 4, 7, 32)},
        r"shapes of k and v: expected \[B, Hk, Lk, D\] and \[B, Hk, Lk, Dv\], got \(2, 4, 7, 32\) and \(2, 2, 7, 32\)",
    ),
    "another batch": (
        {"k": tensor(3, 2, 7, 32), "v": tensor(3, 2, 7, 32)},
        r"shape of k: expected \[2, Hk, Lk, 32\], batch and head_dim as in q, got \(3, 2, 7, 32\)",
    ),
    "another head dim": (
        {"k": tensor(2, 2, 7, 16), "v": tensor(2, 2, 7, 16)},
        r"shape of k: expected \[2, Hk, Lk, 32\], batch and head_dim as in q, got \(2, 2, 7, 16\)",
    ),
    "heads that do not divide": (
        {"k": tensor(2, 3, 7, 32), "v": tensor(2, 3, 7, 32)},
        r"heads: expected the query heads to be a multiple of the key heads, got 4 and 3",
    ),
    "more key heads than heads": (
        {"k": tensor(2, 8, 7, 32), "v": tensor(2, 8, 7, 32)},
        r"heads: expected the query heads to be a multiple of the key heads, got 4 and 8",
    ),
    "no key heads": ({"k": tensor(2, 0, 7, 32), "v": tensor(2, 0, 7, 32)}, r"heads: expected .*, got 4 and 0"),
    **{
        f"head dim {d}": (
            {name: tensor(2, 2, 5, d) for name in "qkv"},
            rf"head_dim: expected a multiple of 16 from 16 to 256; pad q, k and v and pass scale, got {d}$",
        )
        for d in (0, 8, 24, 272)
    },
    "a head dim of v": (
        {"v": tensor(2, 2, 7, 272)},
        r"head_dim of v: expected a multiple of 16 from 16 to 256; pad q, k and v and pass scale, got 272$",
    ),
    **{
        f"another head dim of v with {impl}": (
            {"v": tensor(2, 2, 7, 16, dtype=torch.bfloat16), "impl": impl}
            | {"q": tensor(*Q, dtype=torch.bfloat16), "k": tensor(*KV, dtype=torch.bfloat16)},
            rf"head_dim of v with impl='{impl}': expected 32, as of q and k, or impl='auto', got 16",
        )
        for impl in ("sdpa", "fp4", "sageattn3")
    },
    "another head dim of v with sage3": (
        {"q": tensor(2, 2, 7, 64), "k": tensor(2, 2, 7, 64), "v": tensor(2, 2, 7, 128), "spec": QuantSpec(preset="sage3")},
        r"head_dim of v .*: expected 64, as of q and k, got 128",
    ),
    **{
        f"scale {name}": ({"scale": scale}, rf"scale: expected a (finite )?number.*, got {got}")
        for name, scale, got in (
            ("of text", "0.2", "'0.2'"),
            ("in a list", [0.2], r"\[0.2\]"),
            ("that is no number", float("nan"), "nan"),
            ("without end", float("inf"), "inf"),
            ("with a gradient", torch.tensor(0.2, requires_grad=True), "a tensor that requires one"),
        )
    },
    "mixed dtypes": (
        {"k": tensor(*KV, dtype=torch.bfloat16)},
        r"dtypes of q, k, v: expected one of .* for all three; cast them first, got torch.float32, torch.bfloat16, torch.float32",
    ),
    "another dtype of v": (
        {"v": tensor(*KV, dtype=torch.float64)},
        r"dtypes of q, k, v: expected .*, got .*float32, .*float32, .*float64",
    ),
    "integers": (
        {"q": tensor(*Q, dtype=torch.int32), "k": tensor(*KV, dtype=torch.int32), "v": tensor(*KV, dtype=torch.int32)},
        r"dtypes of q, k, v: expected one of float32, float16, bfloat16 .*, got torch.int32, torch.int32, torch.int32",
    ),
    "mixed devices": ({"k": tensor(*KV, device="meta")}, r"devices of q, k, v: expected one device, got cpu, meta, cpu"),
    "v elsewhere": ({"v": tensor(*KV, device="meta")}, r"devices of q, k, v: expected one device, got cpu, cpu, meta"),
    "a float mask": (
        {"key_mask": tensor(2, 7)},
        r"key_mask: expected torch.bool \[2, 7\] on cpu, True where .*, got torch.float32 \[2, 7\] on cpu",
    ),
    "a mask of one row": (
        {"key_mask": tensor(7, dtype=torch.bool)},
        r"key_mask: expected torch.bool \[2, 7\] .*, got torch.bool \[7\] on cpu",
    ),
    "a mask per query": (
        {"key_mask": tensor(2, 5, 7, dtype=torch.bool)},
        r"key_mask: expected torch.bool \[2, 7\] .*, got torch.bool \[2, 5, 7\] on cpu",
    ),
    "a list for a mask": ({"key_mask": [True] * 7}, r"key_mask: expected torch.bool \[2, 7\] .*, got \[True"),
    "a mask elsewhere": (
        {"key_mask": tensor(2, 7, dtype=torch.bool, device="meta")},
        r"key_mask: expected .* on cpu.*, got .* on meta",
    ),
    "a shift of bfloat16": (
        {"k_shift": tensor(2, 32, dtype=torch.bfloat16)},
        r"k_shift: expected torch.float32 \[2, 32\] on cpu, got torch.bfloat16 \[2, 32\] on cpu",
    ),
    "a shift per query head": (
        {"k_shift": tensor(4, 32)},
        r"k_shift: expected torch.float32 \[2, 32\] on cpu, got torch.float32 \[4, 32\] on cpu",
    ),
    "a shift elsewhere": ({"k_shift": tensor(2, 32, device="meta")}, r"k_shift: expected .* on cpu, got .* on meta"),
    "a rotation of 48": (
        {"q": tensor(2, 4, 5, 48), "k": tensor(2, 2, 7, 48), "v": tensor(2, 2, 7, 48), "spec": QuantSpec(rotate=True)},
        r"head_dim with QuantSpec\(rotate=True\): expected a power of two, got 48",
    ),
    "an unknown implementation": (
        {"impl": "cuda"},
        r"impl: expected one of auto, eager, sdpa, triton, fp4, sageattn3, got 'cuda'",
    ),
    "a spec by name": ({"spec": "nvfp4"}, r"spec: expected a QuantSpec, got 'nvfp4'"),
    "no spec": ({"spec": None}, r"spec: expected a QuantSpec, got None"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_say_what_was_expected(name):
    changes, message = WRONG_CALLS[name]
    arguments = {"q": tensor(*Q), "k": tensor(*KV), "v": tensor(*KV)}
    attention(**arguments)  # the call that is changed is a right one
    with pytest.raises(ValueError, match=rf"^attention: {message}"):
        attention(**arguments | changes)


def cu_seqlens(*bounds: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(bounds, dtype=dtype, device=device)


WRONG_PACKED_CALLS = {
    "a batch": ({"q": tensor(*Q)}, r"q: expected a tensor \[total, heads, head_dim\] with cu_seqlens, got shape \(2, 4, 5, 32\)"),
    "k and v of different lengths": (
        {"v": tensor(6, 2, 32)},
        r"shapes of k and v: expected \[total_k, Hk, D\] and \[total_k, Hk, Dv\], got \(7, 2, 32\) and \(6, 2, 32\)",
    ),
    "another head dim": (
        {"k": tensor(7, 2, 16), "v": tensor(7, 2, 16)},
        r"shape of k: expected \[total_k, Hk, 32\], head_dim as in q, got \(7, 2, 16\)",
    ),
    "heads that do not divide": ({"k": tensor(7, 3, 32), "v": tensor(7, 3, 32)}, r"heads: expected .*, got 4 and 3"),
    "a key mask": (
        {"key_mask": tensor(1, 7, dtype=torch.bool)},
        r"key_mask with packed sequences: expected None; pack the allowed tokens alone, got a mask",
    ),
    "a shift per query head": ({"k_shift": tensor(4, 32)}, r"k_shift: expected torch.float32 \[2, 32\] on cpu, got .*\[4, 32\]"),
    **{
        f"no {name}": (
            {name: None},
            r"packed sequences: expected cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, all four; " f"missing: {name}$",
        )
        for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    },
    **{
        f"{name} that is {what}": ({name: value}, rf"{name}: expected torch.int32 \[documents \+ 1\] on cpu, got {got}")
        for name in ("cu_seqlens_q", "cu_seqlens_k")
        for what, value, got in (
            ("int64", cu_seqlens(0, 2, dtype=torch.int64), r"torch.int64 \[2\] on cpu"),
            ("a list", [0, 2], r"\[0, 2\]"),
            ("a matrix", cu_seqlens(0, 2)[None], r"torch.int32 \[1, 2\] on cpu"),
            ("empty", cu_seqlens(), r"torch.int32 \[0\] on cpu"),
            ("elsewhere", cu_seqlens(0, 2, device="meta"), r"torch.int32 \[2\] on meta"),
        )
    },
    "another number of documents": (
        {"cu_seqlens_k": cu_seqlens(0, 7)},
        r"cu_seqlens_q and cu_seqlens_k: expected the same number of documents, got 2 and 1",
    ),
    **{
        f"a longest document of {length!r}": (
            {"max_seqlen_k": length},
            rf"max_seqlen_k: expected an int, the length of the longest document, got {length!r}",
        )
        for length in (4.0, True, -1)
    },
    "more tokens than fit": (
        {"max_seqlen_q": 2},
        r"max_seqlen_q: expected the length of the longest document; 2 documents of at most 2 cannot hold 5 tokens",
    ),
    "a late start": (
        {"cu_seqlens_q": cu_seqlens(1, 2, 5), "cu_seqlens_k": cu_seqlens(0, 4, 7)},
        r"cu_seqlens_q: expected to start at 0 and to end at 5, the number of tokens, got 1 and 5",
    ),
    "an early end": (
        {"cu_seqlens_k": cu_seqlens(0, 4, 6)},
        r"cu_seqlens_k: expected to start at 0 and to end at 7, the number of tokens, got 0 and 6",
    ),
    "a longer document": (
        {"max_seqlen_k": 4, "cu_seqlens_k": cu_seqlens(0, 2, 7)},
        r"cu_seqlens_k: expected documents of 0 to max_seqlen_k = 4 tokens, got 5 in document 1 \(from 2 to 7\)",
    ),
    "a negative length": (
        {"cu_seqlens_q": cu_seqlens(0, 6, 5)},
        r"cu_seqlens_q: expected documents of 0 to max_seqlen_q = 9 tokens, got -1 in document 1 \(from 6 to 5\)",
    ),
}


@pytest.mark.parametrize("name", WRONG_PACKED_CALLS)
def test_wrong_packed_calls_say_what_was_expected(name):
    changes, message = WRONG_PACKED_CALLS[name]
    arguments = {"q": tensor(5, 4, 32), "k": tensor(7, 2, 32), "v": tensor(7, 2, 32)}
    arguments |= {"cu_seqlens_q": cu_seqlens(0, 1, 5), "cu_seqlens_k": cu_seqlens(0, 4, 7), "max_seqlen_q": 9, "max_seqlen_k": 9}
    attention(**arguments)  # the call that is changed is a right one
    with pytest.raises(ValueError, match=rf"^attention: {message}"):
        attention(**arguments | changes)


@pytest.mark.parametrize("head_dim", [16, 48, 80, 256])
def test_right_head_dims(head_dim):
    q = tensor(1, 1, 2, head_dim)
    assert attention(q, q, q).shape == q.shape


def test_everything_after_the_tensors_is_by_keyword():
    q = tensor(1, 1, 2, 16)
    with pytest.raises(TypeError):
        attention(q, q, q, NVFP4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "fp8"}, r"QuantSpec.preset: expected one of nvfp4, nvfp4_qk, kv_nvfp4, .*, got 'fp8'"),
        ({"preset": None}, r"QuantSpec.preset: expected one of nvfp4, .*, got None"),
        (
            {"preset": "sage3", "rotate": True},
            r"QuantSpec.rotate: expected False with preset='sage3', .*, got True; set it to False",
        ),
        ({"preset": "kv_nvfp4", "four_over_six": True}, r"QuantSpec.four_over_six: expected False with preset='kv_nvfp4'"),
        ({"rotate": 1}, r"QuantSpec.rotate: expected True or False, got 1"),
        ({"four_over_six": "yes"}, r"QuantSpec.four_over_six: expected True or False, got 'yes'"),
    ],
)
def test_specs_with_unknown_values(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)
    with pytest.raises(ValueError, match=message):
        QuantSpec.from_json(json.dumps(fields))


def test_specs_are_frozen_and_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NVFP4.rotate = True
    with pytest.raises(TypeError):
        QuantSpec("bf16")
    assert QuantSpec() == NVFP4
    assert len({NVFP4, QuantSpec(), QuantSpec(rotate=True)}) == 2


@pytest.mark.parametrize(
    ("preset", "rotate", "four_over_six"), list(itertools.product(["nvfp4", "nvfp4_qk"], [False, True], [False, True]))
)
def test_specs_as_json(preset, rotate, four_over_six):
    spec = QuantSpec(preset=preset, rotate=rotate, four_over_six=four_over_six)
    text = spec.to_json()
    assert QuantSpec.from_json(text) == spec
    assert json.loads(text) == dataclasses.asdict(spec)  # every field, as JSON
    assert text == json.dumps(dataclasses.asdict(spec), sort_keys=True)
