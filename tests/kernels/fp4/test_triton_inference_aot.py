"""The inference kernel compiled ahead of time for sm_100 and sm_120: FP4 units, conversions by hardware, no spills in loops."""

import pytest

from support.kernels.aot import SHARED_MEMORY
from support.kernels.instruction_counts import compile_inference, fp4_products_needed, needed

TABLE = [(arch, head_dim, preset) for arch in (100, 103, 120, 121) for head_dim in (64, 128) for preset in ("nvfp4", "nvfp4_qk")]


def assert_on_fp4_units(arch: int, head_dim: int, preset: str, compiled: dict) -> None:
    names = compiled["names"]
    packed = sum(n for name, n in names.items() if name.startswith("F2FP.SATFINITE.E2M1"))
    # A few numbers that are spilled before the loops and loaded after them cost nothing.
    assert compiled["spilled in loops"] == 0 and compiled["spilled"] <= 64
    shared = SHARED_MEMORY[arch // 10 * 10]
    assert compiled["registers"] > 16 and compiled["shared"] <= shared * 1024 and compiled["tensor memory"] <= 512
    assert compiled["fp4 products"] == fp4_products_needed(arch, compiled["tile"].block_n, head_dim, preset) > 0
    assert compiled["self-check"] is None  # which reads the PTX alone, and on a user's machine
    # P is packed by the conversion instruction if it is quantized at all: no arithmetic stands in for it.
    assert (packed > 0) == (preset == "nvfp4")


def native(compiler, problems: list[tuple], **options) -> list[tuple[tuple, dict]]:
    """Those (arch, head dim, causal, preset) that the installed Triton is said to compile well, each with what it makes of it."""
    from qat_kernels.fp4 import launch as fp4_launch

    problems = [p for p in problems if fp4_launch.why_not_native(p[0], p[1], p[3] == "nvfp4") is None]
    if not problems:
        pytest.skip(f"Triton {fp4_launch.TRITON} is not known to compile any of these well, so they are emulated")
    futures = [(problem, compiler.submit(compile_inference, *problem, **options)) for problem in problems]
    return [(problem, future.result()) for problem, future in futures]


def assert_all_on_fp4_units(compiler, problems: list[tuple], **options) -> None:
    for (arch, head_dim, _, preset), compiled in native(compiler, problems, **options):
        assert_on_fp4_units(arch, head_dim, preset, compiled)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [100, 120])
def test_the_table_of_what_this_triton_compiles_well(arch, head_dim, compiler):
    assert_all_on_fp4_units(
        compiler, [(arch, head_dim, causal, preset) for causal in (False, True) for preset in ("nvfp4", "nvfp4_qk")]
    )


def test_every_entry_of_the_table_is_tested():
    from qat_kernels.fp4 import launch as fp4_launch

    found = {(*each[1:3], "nvfp4" if each.quantize_pv else "nvfp4_qk") for each in fp4_launch.ON_FP4_UNITS}
    assert found == set(TABLE)


def test_packed_sequences(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, True, "nvfp4") for arch in (100, 120)], packed=True)


def test_shifted_queries(compiler):
    """The rest of the table is `slow`."""
    assert_all_on_fp4_units(compiler, [(100, 128, True, "nvfp4")], q_shifted=True)


def test_more_fp4_products_with_quantized_weights_than_without(compiler):
    """One product for the scores, one for the output: with BF16 values only the first is left."""
    (_, quantized), (_, plain) = native(compiler, [(120, 128, False, preset) for preset in ("nvfp4", "nvfp4_qk")])
    fp4, bf16 = (
        [sum(n for k, n in compiled["names"].items() if k.startswith(kind)) for compiled in (quantized, plain)]
        for kind in ("OMMA", "HMMA")
    )
    assert fp4[0] >= 2 * fp4[1] > 0 and bf16[0] == 0 < bf16[1]


@pytest.mark.parametrize("arch", [100, 120])
def test_a_tile_takes_few_more_instructions_than_its_algorithm_needs(arch, compiler):
    problems = [(arch, head_dim, causal, "nvfp4") for head_dim in (64, 128) for causal in (False, True)]
    for (_, head_dim, causal, _), compiled in native(compiler, problems):
        queries, keys, *_ = compiled["tile"]
        there, need = compiled["loop"], needed(arch, queries, keys, head_dim)
        for kind in ("matrix product", "conversion", "exp2", "tensor memory"):
            assert there[kind] == need[kind], (head_dim, causal, kind, there, need)
        assert need.total() <= there.total() < 1.25 * need.total(), (head_dim, causal, there, need)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "head_dim", "preset"), TABLE)
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"q_shifted": True}], ids=str)
def test_the_whole_table(options, arch, head_dim, preset, compiler):
    assert_all_on_fp4_units(compiler, [(arch, head_dim, causal, preset) for causal in (False, True)], **options)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_masks_fit(head_dim, compiler):
    """They are not what the tiles were chosen for: for head dim 128, sm_120 lacks two registers."""
    problems = [(arch, head_dim, causal, "nvfp4") for arch in (100, 120) for causal in (False, True)]
    for (arch, *_), compiled in native(compiler, problems, masked=True):
        assert compiled["spilled in loops"] <= (arch == 120 and head_dim == 128)
        assert_on_fp4_units(arch, head_dim, "nvfp4", compiled | {"spilled in loops": 0})
