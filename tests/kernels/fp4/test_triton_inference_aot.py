"""The inference kernel compiled ahead of time for sm_100 and sm_120: FP4 units, conversions by hardware, no spills in loops."""

import pytest

from support.kernels.aot import SHARED_MEMORY
from support.kernels.instruction_counts import compile_inference, needed

FP4_PRODUCTS = {100: "UTCOMMA", 120: "OMMA"}
"""The instructions with NVFP4 operands: of tensor memory, and of registers."""


def assert_on_fp4_units(arch: int, pv: str, compiled: dict) -> None:
    names = compiled["names"]
    count = {
        kind: sum(n for name, n in names.items() if name.startswith(kind)) for kind in ("UTCOMMA", "OMMA", "F2FP.SATFINITE.E2M1")
    }
    # What is put aside before the loops and taken back behind them, a few numbers, costs nothing.
    assert compiled["spilled in loops"] == 0 and compiled["spilled"] <= 64
    assert compiled["registers"] > 16 and compiled["shared"] <= SHARED_MEMORY[arch] * 1024 and compiled["tensor memory"] <= 512
    assert count[FP4_PRODUCTS[arch]] > 0
    # P is packed by the conversion instruction if it is quantized at all: no arithmetic stands in for it.
    assert (count["F2FP.SATFINITE.E2M1"] > 0) == (pv == "nvfp4")


def assert_all_on_fp4_units(compiler, problems: list[tuple], **options) -> list[dict]:
    from qat_kernels.fp4 import launch as fp4_launch

    problems = [p for p in problems if fp4_launch.why_not_native(p[0], p[1]) is None]
    futures = [(problem, compiler.submit(compile_inference, *problem, **options)) for problem in problems]
    for (arch, _, _, pv), future in futures:
        assert_on_fp4_units(arch, pv, future.result())
    return [future.result() for _, future in futures]


def test_both_products_of_head_dim_128_use_fp4_units(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, causal, "nvfp4") for arch in (100, 120) for causal in (False, True)])


def test_fp4_scores_with_bf16_values(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, False, "bf16") for arch in (100, 120)])


def test_packed_sequences(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, True, "nvfp4") for arch in (100, 120)], packed=True)


def test_more_fp4_products_with_quantized_weights_than_without(compiler):
    """One product for the scores, one for the output: with BF16 values only the first is left."""
    quantized, plain = (compiler.submit(compile_inference, 120, 128, False, pv) for pv in ("nvfp4", "bf16"))
    fp4, bf16 = (
        [sum(n for k, n in f.result()["names"].items() if k.startswith(kind)) for f in (quantized, plain)]
        for kind in ("OMMA", "HMMA")
    )
    assert fp4[0] >= 2 * fp4[1] > 0 and bf16[0] == 0 < bf16[1]


@pytest.mark.parametrize("arch", [100, 120])
def test_a_tile_takes_few_more_instructions_than_its_algorithm_needs(arch, compiler):
    for head_dim in (64, 128):
        for causal in (False, True):
            compiled = compiler.submit(compile_inference, arch, head_dim, causal).result()
            queries, keys, *_ = compiled["tile"]
            there, need = compiled["loop"], needed(arch, queries, keys, head_dim)
            for kind in ("matrix product", "conversion", "exp2", "tensor memory"):
                assert there[kind] == need[kind], (head_dim, causal, kind, there, need)
            assert need.total() <= there.total() < 1.5 * need.total(), (head_dim, causal, there, need)


@pytest.mark.slow
@pytest.mark.parametrize("pv", ["nvfp4", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=str)
def test_the_whole_table(options, head_dim, pv, compiler):
    problems = [(arch, head_dim, causal, pv) for arch in (100, 120) for causal in (False, True)]
    assert_all_on_fp4_units(compiler, problems, **options)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_masks_fit(head_dim, compiler):
    """They are not what the tiles were chosen for: for head dim 128, sm_120 lacks two registers."""
    futures = {
        (arch, causal): compiler.submit(compile_inference, arch, head_dim, causal, masked=True)
        for arch in (100, 120)
        for causal in (False, True)
    }
    for (arch, _), future in futures.items():
        compiled = future.result()
        assert compiled["spilled in loops"] <= (arch == 120 and head_dim == 128)
        assert_on_fp4_units(arch, "nvfp4", compiled | {"spilled in loops": 0})
