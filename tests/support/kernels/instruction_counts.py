"""How many instructions a tile of the inference kernel takes, and how many its algorithm needs: docs/INFERENCE.md.

`PYTHONPATH=tests python -m support.kernels.instruction_counts` prints the table for the Triton that is installed.
"""

import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import torch

from support.kernels.aot import believe_in, instructions, product_loops, usage

FP4_PRODUCT = ("UTCOMMA", "OMMA")
"""The instructions with NVFP4 operands: of tensor memory (sm_100), and of registers (sm_120)."""

CLASSES = {
    "matrix product": "OMMA|UTCOMMA|HMMA|UTCHMMA",
    "exp2": r"MUFU\.EX2",
    "maximum": "FMNMX",
    "add, multiply": "FADD|FMUL|FFMA|FRND|MUFU",
    "conversion": "F2FP",
    "shuffle": "SHFL|REDUX|CREDUX",
    "shared memory": "LDS|STS",
    "tensor memory": "LDTM|STTM|UTCCP",
    "waiting": "BAR|SYNCS|FENCE|MEMBAR|UTCBAR|DEPBAR|LDGDEPBAR|ELECT|VOTE|NOP",
    "global memory": "LDG|UTMALDG",
    "permutation of bytes": "PRMT|UPRMT",
    "addresses, jumps and the rest": "",
}


def fp4_products_needed(arch: int, keys: int, head_dim: int, preset: str) -> int:
    """How many of them QK^T takes in a tile, and P V with it if that is quantized; a warp's (sm_120), or the block's."""
    if arch >= 120:
        return keys // 8 * (head_dim // 64) + (head_dim // 8 * (keys // 64) if preset == "nvfp4" else 0)
    return head_dim // 64 + (keys // 64 if preset == "nvfp4" else 0)


def needed(arch: int, queries: int, keys: int, head_dim: int) -> Counter:
    """What a thread of 256 has to do for a tile of the main loop, `queries` x `keys`; docs/INFERENCE.md has the reasons."""
    scores, outputs = queries * keys // 256, queries * head_dim // 256
    count = Counter({"matrix product": fp4_products_needed(arch, keys, head_dim, "nvfp4")})
    if arch >= 120:
        # A warp has 16 rows. A thread has half of each group in two rows, in registers. A product takes 8 columns and 64
        # contracted values, a load of a matrix 512 bytes, a load of scales those of 8 columns.
        groups, rows, wide = scores // 8, 2, 1
        codes, scales = 2 * keys * head_dim // 2 // 512, keys // 8 + head_dim // 8
        count["shared memory"] = codes + scales
        count["maximum"] = (scores - groups) + groups  # within a thread, then with the one that has the other half
        count["shuffle"] = groups + rows  # those; the row's maximum. Its sum is added up between threads after the last tile
    else:
        # A thread has half of the columns of one row, which it takes from tensor memory at once. FMNMX3 takes three numbers, and
        # FADD2, FMUL2 and FFMA2 take pairs.
        groups, rows, wide = scores // 16, 1, 2
        count["maximum"] = scores // 2
        count["tensor memory"] = 1 + 2 + 1 + 3  # scores; output, there and back; P; scales of K, P and V
        count["shared memory"] = 2 + 2  # scales of K and V; the row's maximum, with the thread that has the other half
        count["waiting"] = 2 * 4 + 1  # for each product: a fence, a barrier, its end announced and awaited; that maximum
    count["exp2"] = scores + groups + rows  # of the largest of each group, too; of the change of the row's maximum
    count["maximum"] += groups + rows + 2 * groups  # of the row; and a group's scale is clamped, as is its anchor
    count["add, multiply"] = (
        3 * scores // wide  # score * scale - maximum; the row's sum; times gain
        + outputs // wide  # rescaling, in a tile that has to
        + groups  # the largest score of a group: * scale - maximum
        + groups
        * (1 + 2 + 1 + 3)  # its scale: lifted, anchor added and taken off; 1 / scale; gain, rounded correctly in two steps
        + rows * 4  # maximum: * scale, rounded up; its change; sum * change + sum of this tile
    )
    count["conversion"] = scores // 2 + groups // 2
    count["global memory"] = 2 * (keys * head_dim // 2) // (256 * 16) + 2  # 16 bytes each of codes; scales of K and of V
    count["waiting"] += 4  # for the copies, and that all have read before they are overwritten
    count["addresses, jumps and the rest"] = 8 + 4  # two pointers with 64 bits for codes, two for scales; counter and jump
    return count


def found(loop: list) -> Counter:
    """The instructions of a loop by class."""
    patterns = [(name, re.compile(rf"({pattern})")) for name, pattern in CLASSES.items()]
    return Counter(next(name for name, pattern in patterns if pattern.match(each.name)) for each in loop)


def compile_inference(
    arch: int,
    head_dim: int,
    causal: bool,
    preset: str = "nvfp4",
    *,
    masked: bool = False,
    packed: bool = False,
    q_shifted: bool = False,
) -> dict:
    """Resources, instructions and the main loop of what `impl="fp4"` launches. For a process of its own (`aot.believe_in`)."""
    from triton.runtime.jit import JITFunction

    from qat_kernels import QuantSpec
    from qat_kernels.fp4 import launch as fp4_launch
    from qat_kernels.fp4.machine_code import why_not_on_fp4_units
    from qat_kernels.mask import Mask
    from qat_kernels.triton.precompiled import PrecompiledKernel
    from qat_kernels.varlen import Packing

    believe_in(arch)
    run, compiled = JITFunction.run, []

    def only_compile(self, *args, grid, warmup, **kwargs):
        if self.__name__ == "inference_kernel":
            compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    fp4_launch._plan.cache_clear()

    shape = (8192, 8, head_dim) if packed else (2, 8, 4096, head_dim)
    q, k = (torch.empty(shape[0], heads, *shape[2:], dtype=torch.bfloat16, device="meta") for heads in (8, 4))
    mask = torch.empty(2, 4096, dtype=torch.bool, device="meta") if masked else None
    q_shift = torch.empty(4, head_dim, device="meta") if q_shifted else None
    bounds = torch.empty(9, dtype=torch.int32, device="meta")
    packing = Packing(bounds, bounds, 4096, 4096) if packed else None
    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(PrecompiledKernel, "__call__", lambda *_: None),
        mock.patch.object(fp4_launch, "arch_of", lambda _: arch),
        mock.patch.object(fp4_launch, "check_device", lambda _: None),
    ):
        options = {"spec": QuantSpec(preset=preset), "mask": Mask(causal=causal), "scale": 0.1, "q_shift": q_shift}
        fp4_launch.forward(q, k, k, mask, None, packing, **options)
    (kernel,) = compiled
    cubin = kernel.asm["cubin"]
    code = instructions(cubin)
    registers, spilled, in_loops = usage(cubin)
    # The first loop is that of the tiles which all queries see whole; masks have none.
    loop = min(product_loops(code), key=lambda loop: loop[0].address)
    return {
        "registers": registers,
        "spilled": spilled,
        "spilled in loops": in_loops,
        "shared": kernel.metadata.shared,
        "tensor memory": kernel.metadata.tmem_size,
        "names": Counter(each.name for each in code),
        "tile": fp4_launch.choose(arch, head_dim, preset == "nvfp4"),
        "loop": found(loop),
        "self-check": why_not_on_fp4_units(kernel, arch, head_dim, preset == "nvfp4"),
        "fp4 products": sum(each.name.startswith(FP4_PRODUCT[arch >= 120]) for each in loop),
    }


def main() -> None:
    problems = [(arch, head_dim) for arch in (100, 120) for head_dim in (128, 64)]
    columns = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for arch, head_dim in problems:
            compiled = pool.submit(compile_inference, arch, head_dim, False).result()
            queries, keys, *_ = compiled["tile"]
            columns.append((f"sm_{arch}, D {head_dim}", compiled["loop"], needed(arch, queries, keys, head_dim)))
    print("| | " + " | ".join(name for name, *_ in columns) + " |\n|---|" + "---|" * len(columns))
    for kind in CLASSES:
        print(f"| {kind} | " + " | ".join(f"{there[kind]} / {need[kind]}" for _, there, need in columns) + " |")
    print("| all | " + " | ".join(f"{there.total()} / {need.total()}" for _, there, need in columns) + " |")
    print("| | " + " | ".join(f"{there.total() / need.total():.2f}" for _, there, need in columns) + " |")


if __name__ == "__main__":
    main()
