"""The inference kernel compiled ahead of time for sm_100 and sm_120: FP4 units, conversions by hardware, no spills."""

from collections import Counter
from unittest import mock

import pytest
import torch

from aot import SHARED_MEMORY, believe_in, instructions, usage

FP4_PRODUCTS = {100: "UTCOMMA", 120: "OMMA"}
"""The instructions with NVFP4 operands: of tensor memory, and of registers."""


def compile_inference(
    arch: int, head_dim: int, causal: bool, pv: str, masked: bool = False
) -> tuple[int, int, int, int, Counter]:
    """Registers, spilled bytes, shared memory, columns of tensor memory, and all instructions. For a process of its own."""
    from triton.runtime.jit import JITFunction

    from qat_kernels import QuantSpec, triton_inference

    believe_in(arch)
    run, compiled = JITFunction.run, []

    def only_compile(self, *args, grid, warmup, **kwargs):
        if self.__name__ == "inference_kernel":
            compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    q, k = (torch.empty(2, heads, 4096, head_dim, dtype=torch.bfloat16, device="meta") for heads in (8, 4))
    mask = torch.empty(2, 4096, dtype=torch.bool, device="meta") if masked else None
    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(triton_inference, "_arch", lambda _: arch),
        mock.patch.object(triton_inference, "check_device", lambda _: None),
    ):
        triton_inference.forward(q, k, k, mask, None, spec=QuantSpec(pv=pv), causal=causal, scale=0.1)
    (kernel,) = compiled
    names = Counter(each.name for each in instructions(kernel.asm["cubin"]))
    return *usage(kernel.asm["cubin"])[:2], kernel.metadata.shared, kernel.metadata.tmem_size, names


def assert_on_fp4_units(arch: int, pv: str, compiled: tuple) -> None:
    registers, spilled, shared, tensor_memory, names = compiled
    count = {
        kind: sum(n for name, n in names.items() if name.startswith(kind)) for kind in ("UTCOMMA", "OMMA", "F2FP.SATFINITE.E2M1")
    }
    assert spilled == 0 and not any(name.startswith(("LDL", "STL")) for name in names)
    assert registers > 16 and shared <= SHARED_MEMORY[arch] * 1024 and tensor_memory <= 512
    assert count[FP4_PRODUCTS[arch]] > 0
    # P is packed by the conversion instruction if it is quantized at all: no arithmetic stands in for it.
    assert (count["F2FP.SATFINITE.E2M1"] > 0) == (pv == "nvfp4")


def assert_all_on_fp4_units(compiler, problems: list[tuple]) -> None:
    from qat_kernels import triton_inference

    problems = [p for p in problems if triton_inference.why_not_native(p[0], p[1]) is None]
    for problem, future in [(problem, compiler.submit(compile_inference, *problem)) for problem in problems]:
        assert_on_fp4_units(problem[0], problem[3], future.result())


def test_both_products_of_head_dim_128_use_fp4_units(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, causal, "nvfp4") for arch in (100, 120) for causal in (False, True)])


def test_fp4_scores_with_bf16_values(compiler):
    assert_all_on_fp4_units(compiler, [(arch, 128, False, "bf16") for arch in (100, 120)])


def test_more_fp4_products_with_quantized_weights_than_without(compiler):
    """One product for the scores, one for the output: with BF16 values only the first is left."""
    quantized, plain = (compiler.submit(compile_inference, 120, 128, False, pv) for pv in ("nvfp4", "bf16"))
    fp4, bf16 = (
        [sum(n for k, n in f.result()[4].items() if k.startswith(kind)) for f in (quantized, plain)] for kind in ("OMMA", "HMMA")
    )
    assert fp4[0] >= 2 * fp4[1] > 0 and bf16[0] == 0 < bf16[1]


@pytest.mark.slow
@pytest.mark.parametrize("pv", ["nvfp4", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_whole_table(head_dim, pv, compiler):
    problems = [(arch, head_dim, causal, pv) for arch in (100, 120) for causal in (False, True)]
    assert_all_on_fp4_units(compiler, problems)
