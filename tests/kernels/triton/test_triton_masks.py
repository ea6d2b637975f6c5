"""Windows, blocks, prefixes, bounds, soft caps and sinks in the Triton kernels, against eager; on a GPU at real sizes too."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

from support.kernels.cases import Case, assert_same_bits, error, lse_error, run
from support.kernels.interpreter import on
from support.kernels.packed_cases import problem as packed_problem
from support.kernels.packed_cases import unpacked
from support.kernels.triton_runs import DEVICES, SMALL, assert_within_bounds, run_kernels, run_reference, size_of_sink_terms

ONE_HEAD = {"heads": (1, 1)}
# What is long enough has tiles that all queries of a tile see whole, in part and not at all.
CASES = [
    Case(**{**SMALL, **options})
    for options in (
        {"causal": True, "window": 20, "lq": 75, "lk": 75},
        {"causal": True, "window": 200, "lq": 290, "lk": 290, **ONE_HEAD},
        {"causal": True, "window": 33, "lq": 75, "lk": 190, "mask": "left", "batch": 2, **ONE_HEAD},
        {"causal": True, "window": 50, "lq": 150, "lk": 75, "mask": "holes", "preset": "nvfp4_qk", **ONE_HEAD},
        {"causal": True, "window": 90, "lq": 150, "lk": 200, "preset": "nvfp4_qk"},
        {"causal": True, "window": 3, "lq": 40, "lk": 40},
        {"causal": True, "block_size": 50, "lq": 190, "lk": 190, **ONE_HEAD},
        {"causal": True, "block_size": 7, "window": 30, "lq": 100, "lk": 130, "mask": "left", "batch": 2, **ONE_HEAD},
        {"causal": True, "block_size": 100, "lq": 170, "lk": 220, "preset": "nvfp4_qk", **ONE_HEAD},
        {"causal": True, "prefix": 30, "lq": 90, "lk": 90, **ONE_HEAD},
        {"causal": True, "prefix": 150, "window": 40, "block_size": 20, "lq": 230, "lk": 230, **ONE_HEAD},
        {"causal": True, "prefix": 9, "window": 25, "lq": 100, "lk": 130, "mask": "left", "batch": 2, **ONE_HEAD},
        {"causal": True, "prefix": 70, "window": 16, "lq": 150, "lk": 200, "preset": "nvfp4_qk", **ONE_HEAD},
        {"bounds": "images", "lq": 100, "lk": 130, "batch": 2, **ONE_HEAD},
        {"bounds": "random", "lq": 100, "lk": 130, "batch": 2, "mask": "left", **ONE_HEAD},
        {"bounds": "random", "prefix": 20, "lq": 130, "lk": 150, "mask": "holes", "preset": "nvfp4_qk", **ONE_HEAD},
        {"softcap": 2.0, "lq": 50, "lk": 90},
        {"softcap": 1.0, "causal": True, "lq": 90, "lk": 90, "preset": "nvfp4_qk"},
        {"softcap": 3.0, "causal": True, "window": 40, "lq": 90, "lk": 90, "scale": -0.3, "mask": "left"},
        {"sinks": True, "lq": 20, "lk": 70, "heads": (4, 2)},
        {"sinks": True, "causal": True, "window": 24, "lq": 50, "lk": 50, "heads": (3, 1), "mask": "left", "batch": 2},
        {"sinks": True, "causal": True, "lq": 60, "lk": 33, "preset": "nvfp4_qk", "mask": "empty row", "batch": 2},
        {"q_shifted": True, "softcap": 2.0, "lq": 50, "lk": 90},
        {"q_shifted": True, "sinks": True, "softcap": 3.0, "causal": True, "window": 24, "prefix": 9, "lq": 60, "lk": 90},
        {"q_shifted": True, "bounds": "random", "lq": 100, "lk": 130, "batch": 2, "mask": "left", **ONE_HEAD},
        {"causal": True, "window": 24, "lq": 70, "lk": 90, "rotate": True, "four_over_six": True, "shift": True, **ONE_HEAD},
    )
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_results_stay_within_the_bounds(index, device):
    """Under the interpreter in float32, whose products are as exact as those of eager; some in bfloat16 too."""
    case = CASES[index]
    for dtype in [torch.float32, torch.bfloat16] if device == "cuda" or index == 0 or case.sinks else [torch.float32]:
        tensors = case.tensors(dtype)
        expected = run_reference(case, tensors)
        sink_terms = size_of_sink_terms(case, tensors, expected) if case.sinks else 0.0
        assert_within_bounds(on(device, run_kernels, case, tensors), expected, dtype, device, sink_terms=sink_terms)


def run_with_tiles(case: Case, tensors: list[torch.Tensor], sizes: list[tuple[int, int]], *, device: str) -> list[tuple]:
    from qat_kernels.triton import backward_launch, forward_launch, tiles

    results = []
    for block_m, block_n in sizes:
        for launch in (forward_launch, backward_launch):
            launch._plan.cache_clear()  # plans are kept by shape
        tile = tiles.Tile(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
        apart = tiles.Apart(key=tile, value=tile) if block_n == 128 else tile
        chosen = tiles.Tiles(forward=tile, grad_query=tile, grad_key_value=apart)
        with mock.patch.object(tiles, "choose", lambda *_, chosen=chosen: chosen):
            results.append(run_kernels(case, tensors, device=device))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "block_size": 30, "window": 60, "prefix": 33},
        {"bounds": "random", "mask": "left"},
    ],
    ids=str,
)
def test_tiles_change_nothing_beyond_rounding(options, device):
    case = Case(**{**SMALL, **ONE_HEAD, **options, "lq": 110, "lk": 130})
    first, *others = on(device, run_with_tiles, case, case.tensors(torch.float32), [(64, 64), (16, 128), (64, 32)])
    bound = 1e-2 if device == "cuda" else 1e-5
    for other in others:
        for a, b in zip((*other[:2], *other[3]), (*first[:2], *first[3]), strict=True):
            assert error(a, b) < bound
        assert lse_error(other[2], first[2]) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_query_may_not_see_does_not_show_in_its_bits(device):
    case = Case(**{**SMALL, **ONE_HEAD, "lq": 100, "lk": 100, "causal": True, "window": 30, "prefix": 5})
    tensors = case.tensors(torch.bfloat16)
    before = on(device, run_kernels, case, tensors)
    for token in (3, 20, 64):
        changed = [x.clone() for x in tensors]
        for x in changed[1:3]:
            x[:, :, token] = x[:, :, token].flip(-1) * -7 + 3
        after = on(device, run_kernels, case, changed)
        query = torch.arange(100)
        group_of_lower = (query - 29).clamp(min=0) // 16 * 16
        blind = (query < token) & (token >= 5) if token >= 16 else torch.zeros(100, dtype=torch.bool)
        blind |= (group_of_lower > token) & (token >= 16)
        for a, b in zip(after[:3], before[:3], strict=True):
            assert torch.equal(a[:, :, blind], b[:, :, blind]) and not torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"preset": "nvfp4_qk", "mask": "left"}], ids=str)
def test_a_window_over_all_keys_is_plain_causal(options, device):
    case = Case(**{**SMALL, "causal": True, "lq": 90, "lk": 90, **options})
    tensors = case.tensors(torch.bfloat16)
    assert_same_bits(on(device, run_kernels, replace(case, window=500), tensors), on(device, run_kernels, case, tensors))


DOCUMENTS = ((60, 60), (5, 90), (0, 0), (7, 0))


def run_packed(*, device: str, **options) -> tuple[list[tuple], list[tuple], torch.Tensor | None]:
    """The documents packed, and each alone, and with sinks the gradient of the packed ones; on the CPU."""
    _, alone, together, keywords, packing = packed_problem(torch.bfloat16, DOCUMENTS, **options)
    keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()} | {"impl": "triton"}
    packing = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    packed = tree_map(torch.Tensor.cpu, run(*(x.to(device) for x in together), **keywords, **packing))
    packing = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    separate = [tree_map(torch.Tensor.cpu, run(*(x.to(device) for x in tensors), **keywords)) for tensors in alone]
    return unpacked((*packed[:2], packed[2][:3]), packing), separate, packed[2][3] if options.get("sinks") else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "block_size": 12, "softcap": 2.0, "preset": "nvfp4_qk", **ONE_HEAD},
        {"sinks": True, "causal": True, "window": 20, "prefix": 3, "heads": (2, 1)},
        {"q_shifted": True, "shift": True, "causal": True, "rotate": True, "heads": (2, 1)},
    ],
    ids=str,
)
def test_packed_documents_are_as_if_alone_to_the_bit(options, device):
    packed, alone, grad_sinks = on(device, run_packed, **options)
    for each, (out, lse, grads) in zip(packed, alone, strict=True):
        assert_same_bits(each, (out, lse, grads[:3]))
    if grad_sinks is not None:
        assert error(grad_sinks, sum(each[2][3].double() for each in alone)) < 1e-5


def run_counting(case: Case, tensors: list[torch.Tensor], *, device: str) -> int:
    """How many tiles all kernels load, with small ones."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, load = [], InterpreterBuilder.create_descriptor_load

    def counting(self, desc, *args):
        loads.append(desc)
        return load(self, desc, *args)

    with mock.patch.object(InterpreterBuilder, "create_descriptor_load", counting):
        run_with_tiles(case, tensors, [(16, 32)], device=device)
    return len(loads)


def test_tiles_outside_of_the_bounds_are_never_visited():
    """What twice as many tokens add is what they have added before: loads grow with the length, not with its square."""
    case = Case(**{**SMALL, **ONE_HEAD, "causal": True, "head_dim": 16, "window": 32, "block_size": 16, "prefix": 20})
    cases = [replace(case, lq=n, lk=n) for n in (128, 192, 256)]
    loads = [on("cpu", run_counting, each, each.tensors(torch.float32)) for each in cases]
    assert 0 < loads[2] - loads[1] == loads[1] - loads[0]


def run_public(case: Case, tensors: list[torch.Tensor], *, device: str) -> tuple:
    """`attention(impl="triton")` with autograd, on the CPU."""
    options = {name: tuple(y.to(device) for y in x) if isinstance(x, tuple) else x for name, x in case.options().items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return tree_map(torch.Tensor.cpu, run(*(x.to(device) for x in tensors), impl="triton", **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "window": 12, "sinks": True, "softcap": 2.0}, {"bounds": "images", "lq": 20, "lk": 20, "heads": (1, 1)}],
    ids=str,
)
def test_the_public_function_runs_the_kernels(options, device):
    case = Case(**{**SMALL, **options})
    tensors = case.tensors(torch.bfloat16)
    out, lse, grads = on(device, run_public, case, tensors)
    assert_same_bits((out, lse, grads), [x for i, x in enumerate(on(device, run_kernels, case, tensors)) if i != 1])


@pytest.mark.parametrize("device", DEVICES)
def test_without_keys_the_log_sum_exp_is_the_sink(device):
    for batch, lq, lk in ((2, 5, 0), (2, 0, 5)):
        case = Case(batch=batch, lq=lq, lk=lk, causal=True, window=3, sinks=True)
        out, _, lse, grads = on(device, run_kernels, case, case.tensors(torch.bfloat16))
        assert not out.any() and torch.equal(lse, case.sink_logits()[:, None].expand(lse.shape))
        assert not any(x.any() for x in grads)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 1024},
        {"causal": True, "window": 128, "sinks": True, "head_dim": 64, "heads": (64, 8)},  # gpt-oss
        {"causal": True, "window": 4096, "softcap": 50.0, "head_dim": 256, "heads": (8, 4)},  # Gemma 2
        {"causal": True, "block_size": 1560, "window": 1560 * 3, "prefix": 1560},  # frames of Wan at 480p
        {"bounds": "images"},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1000, 8192])
def test_real_sizes_stay_within_the_bounds(length, options):
    case = Case(**{"lq": length, "lk": length, "head_dim": 128, "heads": (4, 2), "batch": 1} | options)
    tensors = [x.cuda() for x in case.tensors(torch.bfloat16)]
    expected = tree_map(torch.Tensor.cpu, run_reference(case, tensors))
    assert_within_bounds(run_kernels(case, tensors, device="cuda"), expected, torch.bfloat16, "cuda")
