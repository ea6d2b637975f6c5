"""Ahead-of-time compilation of the Triton kernels for a GPU that is not there, and what the machine code uses."""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from support.kernels.uniform_registers import read_before_written

SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}
"""KiB that one block may use, by architecture (CUDA C++ Programming Guide, technical specifications per compute capability)."""


class Instruction(NamedTuple):
    address: int
    name: str
    """With its modifiers, without its predicate."""
    operands: str


class Compiled(NamedTuple):
    name: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of local memory a thread needs for what its registers cannot hold."""
    spilled_in_loops: int
    """Instructions that use local memory in the loops over tiles. What a kernel puts aside before such a loop and takes back
    behind it, a few numbers, costs nothing."""
    shared: int
    """Bytes of shared memory."""
    tensor_memory: int
    """Columns of tensor memory (sm_100); a block has 512. Triton compiles a kernel that needs more into a single trap."""
    warnings: str
    """Of the assembler; C75xx: it makes products wait for each other."""
    in_gluon: bool
    read_before_written: list[str]
    """Instructions in Gluon that read an address which may not be there."""


def believe_in(arch: int) -> None:
    """Tell Triton of a GPU of this architecture, which does not exist: for a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = mock.Mock()
    driver.get_current_device.return_value = arch  # part of the key of Triton's caches
    driver.get_current_stream.return_value = 0
    driver.get_current_target.return_value = GPUTarget("cuda", arch, 32)
    triton.runtime.driver.set_active(driver)


def compile_kernels(
    arch: int,
    head_dim: int,
    causal: bool,
    *,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    needs_gradient: bool = True,
    masked: bool = False,
    window: int | None = None,
    block_size: int = 1,
    prefix: int = 0,
    bounded: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    packed: bool = False,
    k_shift: bool = False,
    q_shift: bool = False,
    gluon: bool = False,
    keys: int = 4096,
    **spec,
) -> list[Compiled]:
    """Every kernel that a forward and (with `needs_gradient`) a backward would launch on the architecture.

    With `gluon` those of hopper/ where they compute the call, whether or not they serve it yet, else the Triton kernels.

    The launcher itself runs, on tensors without memory, and compiles what it would launch. Belongs into a process
    of its own (`believe_in`).
    """
    import triton
    from triton.runtime.jit import JITFunction

    from qat_kernels import QuantSpec
    from qat_kernels.mask import Bounds, Mask
    from qat_kernels.triton import backward_launch, device, forward_launch, precompiled, tiles
    from qat_kernels.varlen import Packing

    believe_in(arch)
    version = device.TRITON if gluon else None
    for launch in (forward_launch, backward_launch):
        launch._plan.cache_clear()
    tiles.choose.cache_clear()
    run, compiled = JITFunction.run, []

    def only_compile(self, *args, grid, warmup, **kwargs):
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as printed:
            triton.knobs.nvidia.dump_ptxas_log = True
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        used, warnings = kernel.metadata, "\n".join(re.findall(r".*\bC75\d\d\b.*", printed.getvalue()))
        numbers = (*usage(kernel.asm["cubin"]), used.shared, used.tmem_size)
        unwritten = read_before_written(_cuobjdump("--dump-sass", kernel.asm["cubin"])) if self.is_gluon() else []
        compiled.append(Compiled(self.__name__, *numbers, warnings, self.is_gluon(), unwritten))
        return kernel

    spec = QuantSpec(**spec)
    q, k = (
        torch.empty(2, heads, length, head_dim, dtype=dtype, device="meta")
        for heads, length in ((8, 4096), (4 if spec.rules.mask else 8, keys))
    )
    v = k.new_empty(*k.shape[:-1], head_dim_v or head_dim)
    packing = shift = None
    if packed:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        packing = Packing(*torch.empty(2, 4, dtype=torch.int32, device="meta"), 2048, 2048)
    if k_shift:
        shift = torch.empty(k.shape[1], head_dim, device="meta")
    mask = torch.empty(2, 4096, dtype=torch.bool, device="meta") if masked else None
    seen = Mask(causal=causal and not bounded, window=window, block_size=block_size, prefix=prefix, bounded=bounded)
    bounds = Bounds(*torch.empty(2, 1, 4096, dtype=torch.int32, device="meta")) if bounded else None
    sinks = torch.empty(8, device="meta") if sinks else None
    options: dict = {"q_shift": torch.empty(k.shape[1], head_dim, device="meta") if q_shift else None}
    options |= {"spec": spec, "mask": seen, "scale": 0.1, "bounds": bounds, "softcap": softcap, "sinks": sinks}
    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(precompiled.PrecompiledKernel, "__call__", lambda *_: None),
        mock.patch.object(forward_launch, "arch_of", lambda _: arch),
        mock.patch.object(backward_launch, "arch_of", lambda _: arch),
        mock.patch.object(forward_launch, "check_device", lambda _: None),
        mock.patch.object(forward_launch, "gluon_version", lambda: version),
        mock.patch.object(backward_launch, "gluon_version", lambda: version),
        mock.patch.object(tiles, "is_compared", lambda *_: True),
    ):
        forward = forward_launch.forward(q, k, v, mask, shift, packing, with_gradient=needs_gradient, **options)
        if needs_gradient:
            value = v if spec.reads_value(seen.hides_keys) else None
            saved = (value, forward.out, forward.stats, forward.codes)
            options |= {"query": q, "key": k} if spec.reads_query else {}
            backward_launch.backward(forward.out, *saved, mask, packing, key_shape=k.shape, **options)
    return compiled


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of local memory, and how often a loop over matrix products goes there."""
    printed = _cuobjdump("--dump-resource-usage", cubin)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", printed).groups())
    return registers, stack + local, _local_accesses_in_loops(instructions(cubin)) if stack + local else 0


def instructions(cubin: bytes) -> list[Instruction]:
    """The machine code."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)([^;]*);", _cuobjdump("--dump-sass", cubin))
    return [Instruction(int(address, 16), name, operands) for address, name, operands in found]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the ends of every backward jump."""
    jumps = ((each.address, re.search(r"0x([0-9a-f]+)", each.operands)) for each in code if each.name.startswith("BRA"))
    ends = [(int(target[1], 16), address) for address, target in jumps if target and int(target[1], 16) < address]
    return [[each for each in code if start <= each.address <= stop] for start, stop in ends]


def _cuobjdump(option: str, cubin: bytes) -> str:
    """What the tool that comes with Triton prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def product_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that have matrix instructions. Waits that jump out of line and back look like loops around these."""
    bodies = [body for body in loops(code) if any("MMA" in each.name for each in body)]
    return [
        body for body in bodies if not any(body[0].address <= b[0].address and b[-1].address < body[-1].address for b in bodies)
    ]


def _local_accesses_in_loops(code: list[Instruction]) -> int:
    """Loads and stores of local memory in innermost loops that have matrix instructions."""
    bodies = loops(code)
    innermost = [
        body
        for body in bodies
        if any("MMA" in each.name for each in body)
        and not any(body[0].address <= b[0].address and b[-1].address < body[-1].address for b in bodies)
    ]
    assert innermost
    return sum(each.name.startswith(("STL", "LDL")) for body in innermost for each in body)
