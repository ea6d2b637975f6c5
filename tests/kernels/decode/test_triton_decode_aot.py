"""The machine code of the decode kernels, compiled ahead of time: what it may not do, and how much it does for each value."""

from collections import Counter
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from support.kernels.aot import SHARED_MEMORY, believe_in, instructions, loops, usage

KERNELS = ["append_kernel", "split_kernel", "combine_kernel"]
LENGTH, TILE_KEYS = 32768, 128


class Code(NamedTuple):
    name: str
    registers: int
    spilled: int
    """Bytes of local memory of a thread."""
    shared: int
    threads: int
    loop: Counter
    """Instructions of the longest loop, each with its modifiers."""


def compile_decode(
    arch: int,
    head_dim: int,
    new: int,
    masked: bool,
    shifted: bool = False,
    q_shifted: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    **spec: bool | str,
) -> list[Code]:
    """What `KVCache.attention` on a filled cache launches, for Qwen3-14B's heads. Belongs into a process of its own."""
    from triton.runtime.jit import JITFunction

    from qat_kernels import KVCache, QuantSpec
    from qat_kernels.decode import launch as decode_launch
    from qat_kernels.decode.cache import RECENT_TOKENS
    from qat_kernels.triton.precompiled import PrecompiledKernel

    believe_in(arch)
    for kernels in (decode_launch._append_kernel_for, decode_launch._attend_kernels_for):
        kernels.cache_clear()  # of another architecture
    run, compiled = JITFunction.run, []

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        cubin, threads = kernel.asm["cubin"], 32 * kernel.metadata.num_warps
        longest = max(loops(instructions(cubin)), key=lambda loop: loop[-1].address - loop[0].address, default=[])
        loop = Counter(each.name for each in longest)
        compiled.append(Code(self.__name__, *usage(cubin)[:2], kernel.metadata.shared, threads, loop))
        return kernel

    q, k = (torch.empty(8, heads, new, head_dim, dtype=torch.bfloat16, device="meta") for heads in (40, 8))
    k_shift, q_shift = (torch.empty(8, head_dim, device="meta") if there else None for there in (shifted, q_shifted))
    cache, mask = KVCache(), None
    cache.length, cache.spec, cache.window = LENGTH, QuantSpec(**spec), window
    cache._grow(k, has_key_bias=q_shifted)
    cache._resize(RECENT_TOKENS, k)
    if masked:
        mask, cache._leftpad = (
            torch.empty(8, LENGTH, dtype=torch.bool, device="meta"),
            torch.empty(8, dtype=torch.int32, device="meta"),
        )
    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(PrecompiledKernel, "__call__", lambda *_: None),
        mock.patch.object(decode_launch, "arch_of", lambda _: arch),
        mock.patch.object(decode_launch, "check_device", lambda _: None),
        mock.patch.object(decode_launch, "_processors", lambda _: 132),
    ):
        decode_launch.append(cache._tensors(cache.spec), k, k, mask, k_shift, q_shift)
        logits = torch.empty(40, dtype=torch.bfloat16, device="meta") if sinks else None
        decode_launch.attend(cache._tensors(cache.spec), q, mask, k_shift, q_shift, 0.1, softcap, logits)
    return compiled


def assert_fits(arch: int, compiled: list[Code], spilled: int = 0) -> None:
    """`spilled`: bytes that may be spilled before a loop and loaded after it."""
    assert [kernel.name for kernel in compiled] == KERNELS
    for kernel in compiled:
        assert kernel.spilled <= spilled and not any(name.startswith(("LDL", "STL")) for name in kernel.loop), (arch, kernel)
        assert kernel.registers > 16 and kernel.shared <= SHARED_MEMORY[arch] * 1024, (arch, kernel)


def test_one_token_is_decoded_with_few_instructions(compiler):
    """Qwen3-14B. What a value takes: 9/8 instructions to bring its code into place, 1/2 to scale it, 1/8 for the tensor cores
    (8 columns, of which 5 are query heads); softmax and the quantization of P, on each score, are the rest. Registers are
    left for three programs on a processor.
    """
    futures = {arch: compiler.submit(compile_decode, arch, 128, 1, False) for arch in SHARED_MEMORY}
    for arch, future in futures.items():
        compiled = future.result()
        assert_fits(arch, compiled)
        loop, values = compiled[1].loop, 2 * TILE_KEYS * 128 / compiled[1].threads
        assert sum(n for name, n in loop.items() if name.startswith("HMMA.16816")) == values / 8
        assert sum(n for name, n in loop.items() if name.startswith("HMUL2")) <= values / 2 + values / 8 * (arch < 89)
        assert loop.total() < (3.6 if arch >= 89 else 4.2) * values, (arch, loop)
        # Codes come 16 bytes at a time, and what is unpacked stays in the registers of its lane: only P is stored there.
        assert loop["LDGSTS.E.BYPASS.128"] >= 8 and not any(name.startswith(("LDL", "STL", "LDG.E.U8")) for name in loop)
        assert sum(n for name, n in loop.items() if name.startswith("STSM")) <= 2
        assert compiled[1].registers * compiled[1].threads <= 65536 / 3


def test_a_server_s_token_is_decoded_with_as_few_instructions(compiler):
    """`kv_nvfp4`: P is not quantized, but V lies by tokens. Its words still go from the memory of the tile to the tensor cores in
    the registers of one lane: two words are decoded at a time, for 1/8 of an instruction more a value.
    """
    futures = {arch: compiler.submit(compile_decode, arch, 128, 1, False, preset="kv_nvfp4") for arch in SHARED_MEMORY}
    for arch, future in futures.items():
        compiled = future.result()
        assert_fits(arch, compiled)
        loop, values = compiled[1].loop, 2 * 32 * 128 / compiled[1].threads
        assert sum(n for name, n in loop.items() if name.startswith("HMMA.16816")) == values / 8
        assert loop.total() < (3.9 if arch >= 89 else 4.4) * values, (arch, loop)
        assert loop["LDGSTS.E.BYPASS.128"] >= 4 and not any(name.startswith(("LDL", "STL", "LDG.E.U8")) for name in loop)
        # What goes through the memory of the tile is P; V would be many times as much.
        for names in (("STS", "STSM"), ("LDSM",)):
            assert sum(n for name, n in loop.items() if name.startswith(names)) <= 8, (arch, loop)


def test_other_calls_fit_one_architecture_each(compiler):
    """The rest is `slow`."""
    calls = [(90, 64, 1, True), (120, 128, 5, True), (90, 80, 1, False)]
    futures = [(call[0], compiler.submit(compile_decode, *call)) for call in calls]
    futures.append((90, compiler.submit(compile_decode, 90, 128, 1, True, shifted=True, rotate=True, four_over_six=True)))
    # Gemma 3, gpt-oss
    features = [((90, 256, 1, False), {"window": 1024}), ((120, 64, 5, True), {"window": 128, "sinks": True})]
    futures += [(call[0], compiler.submit(compile_decode, *call, **options)) for call, options in features]
    shifted = [((90, 128, 1, False), {"shifted": True}), ((120, 64, 1, False), {"window": 1024, "softcap": 50.0})]
    futures += [(call[0], compiler.submit(compile_decode, *call, q_shifted=True, **options)) for call, options in shifted]
    calls = [(80, 128, 5, True), (90, 64, 1, True), (100, 80, 1, True)]
    of_servers = [(call[0], compiler.submit(compile_decode, *call, preset="kv_nvfp4")) for call in calls]
    of_servers.append((100, compiler.submit(compile_decode, 100, 128, 1, False, window=4096, softcap=50.0, preset="kv_nvfp4")))
    for arch, future in futures + of_servers:
        assert_fits(arch, future.result(), spilled=8)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("kind", [{"preset": "nvfp4"}, {"preset": "kv_nvfp4"}, {"q_shifted": True}], ids=str)
@pytest.mark.parametrize("features", [{}, {"window": 4096, "softcap": 50.0}], ids=str)
def test_all_calls_fit(head_dim, new, kind, features, compiler):
    calls = [(arch, head_dim, new, masked) for arch in SHARED_MEMORY for masked in (False, True)]
    for call, future in [(call, compiler.submit(compile_decode, *call, **kind, **features)) for call in calls]:
        assert_fits(call[0], future.result(), spilled=8)
