"""The Triton kernels compile for every architecture of the tile table, without spilling, without a GPU."""

import pytest

from support.kernels.aot import SHARED_MEMORY, Compiled, compile_kernels

KERNELS = {
    "prepare_kernel",
    "attention_forward_kernel",
    "grad_query_kernel",
    "grad_key_value_kernel",
}


def assert_all_fit(compiler, problems: list[tuple[int, int, bool]], **options) -> None:
    """Every kernel of these architectures, head dims and causalities: nothing spilled, no product waits, shared memory suffices.

    Not where the installed Triton is known to be too old, which is refused, or to spill, which `explain` says.
    """
    from qat_kernels.triton import tiles
    from qat_kernels.triton.device import TRITON, too_old_triton

    problems = [problem for problem in problems if not too_old_triton(problem[0])]
    futures = {problem: compiler.submit(compile_kernels, *problem, **options) for problem in problems}
    for (arch, head_dim, causal), future in futures.items():
        compiled = future.result()
        assert {kernel.name for kernel in compiled} == KERNELS
        for kernel in compiled:
            assert not kernel.spilled_in_loops or arch in tiles.SPILLS.get(TRITON, ()), (arch, head_dim, causal, kernel)
            assert not kernel.warnings, (arch, head_dim, causal, kernel)
            assert_launchable(arch, kernel)


def assert_launchable(arch: int, kernel: Compiled) -> None:
    assert kernel.registers > 16, (arch, kernel)  # else it is a trap
    assert kernel.shared <= SHARED_MEMORY[arch] * 1024, (arch, kernel)
    assert kernel.tensor_memory <= 512, (arch, kernel)


def test_causal_kernels_for_head_dim_128_fit_every_architecture(compiler):
    assert_all_fit(compiler, [(arch, 128, True) for arch in SHARED_MEMORY])


def test_other_kernels_fit_one_architecture_each(compiler):
    """The rest of the table is `slow`."""
    assert_all_fit(compiler, [(90, 128, False), (120, 64, True), (80, 64, False)])


def test_kernels_for_unequal_head_dims_fit(compiler):
    """DeepSeek V3's, and wider values than Q and K."""
    assert_all_fit(compiler, [(90, 192, True)], head_dim_v=128)
    assert_all_fit(compiler, [(90, 64, True)], head_dim_v=256)


def test_kernels_with_a_window_and_sinks_fit(compiler):
    """The heads of gpt-oss; the rest of the table is `slow`."""
    assert_all_fit(compiler, [(90, 64, True)], window=128, sinks=True)


def test_kernels_with_shifted_queries_fit(compiler):
    """The rest of the table is `slow`."""
    assert_all_fit(compiler, [(90, 128, True), (90, 64, True)], q_shift=True)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_kernels_with_shifted_queries_fit_every_architecture(head_dim, causal, compiler):
    assert_all_fit(compiler, [(arch, head_dim, causal) for arch in SHARED_MEMORY], q_shift=True)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_with_a_window_fit_every_architecture(head_dim, compiler):
    assert_all_fit(compiler, [(arch, head_dim, True) for arch in SHARED_MEMORY], window=1024)


@pytest.mark.slow
def test_kernels_with_a_soft_cap_fit(compiler):
    assert_all_fit(compiler, [(90, 64, True), (90, 128, True)], softcap=50.0)
    assert_all_fit(compiler, [(90, 256, True)], softcap=50.0, window=4096)  # Gemma 2


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_whole_table_fits(head_dim, causal, compiler):
    assert_all_fit(compiler, [(arch, head_dim, causal) for arch in SHARED_MEMORY])


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 48, 80, 192])
def test_head_dims_between_the_entries_compile(head_dim, causal, compiler):
    for arch in SHARED_MEMORY:
        for kernel in compiler.submit(compile_kernels, arch, head_dim, causal).result():
            assert_launchable(arch, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"masked": True},
        {"rotate": True},
        {"q_shift": True},
        {"preset": "nvfp4_qk"},
        {"preset": "fa4_fp4"},
        {"softcap": 50.0},
        {"sinks": True},
    ],
    ids=str,
)
def test_variants_compile(options, compiler):
    """They may spill: the tiles are chosen for bfloat16 without a key mask."""
    import torch

    options = {name: getattr(torch, value) if name == "dtype" else value for name, value in options.items()}
    for arch in SHARED_MEMORY:
        for causal in (False, True):
            for kernel in compiler.submit(compile_kernels, arch, 128, causal, **options).result():
                assert_launchable(arch, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"window": 4096, "softcap": 50.0},
        {"block_size": 1560, "window": 4680, "prefix": 1560},
        {"bounded": True},
        {"window": 1024, "masked": True},
    ],
    ids=str,
)
def test_masks_with_bounds_compile(options, compiler):
    """They may spill, as the variants above."""
    for arch in SHARED_MEMORY:
        for kernel in compiler.submit(compile_kernels, arch, 128, True, **options).result():
            assert_launchable(arch, kernel)


def test_the_kernels_of_sage_compile(compiler):
    """Without a causal mask only; they may spill, as the variants above."""
    from qat_kernels.triton.device import too_old_triton

    problems = [(arch, dim) for arch, dim in ((80, 64), (90, 128), (100, 128), (120, 64)) if not too_old_triton(arch)]
    futures = {problem: compiler.submit(compile_kernels, *problem, False, preset="sage3") for problem in problems}
    for (arch, _), future in futures.items():
        compiled = future.result()
        assert {kernel.name for kernel in compiled} == KERNELS
        for kernel in compiled:
            assert_launchable(arch, kernel)
