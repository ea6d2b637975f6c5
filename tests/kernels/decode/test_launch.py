"""Launches of the decode kernels by the types of their arguments: the same kernels with the same arguments as Triton's own."""

from collections import Counter
from unittest import mock

import pytest
import torch

from support.kernels.aot import believe_in

STEPS = [40, 1, 7, 1]


class Recorder:
    """In place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, launches: list) -> None:
        self.launches = launches

    def launch_metadata(self, *_):
        return None

    def _init_handles(self) -> None:
        """Nothing to load."""

    def run(self, *arguments) -> None:
        self.launches.append((self, arguments))


def record_steps(
    *, window: int | None = None, softcap: float | None = None, sinks: bool = False, q_shifted: bool = False, **spec: bool | str
) -> tuple[Counter, list[bool], list[bool]]:
    """Decode with fake kernels, launching each time in both ways.

    How often each kernel was compiled; for every launch, whether both took the same kernel, and the same arguments.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from qat_kernels import KVCache, QuantSpec
    from qat_kernels.decode import launch as decode_launch

    believe_in(90)
    launches, compiled = [], Counter()

    def compile_(self, key, signature, device, *_):
        compiled[self.__name__] += 1
        return self.device_caches[device][0].setdefault(key, Recorder(launches))

    class Both(decode_launch.PrecompiledKernel):
        def __init__(self, kernel, types, constants, **options) -> None:
            super().__init__(kernel, types, constants, **options)
            self.launch = lambda grid, arguments: kernel[grid](*arguments, **constants, **options)

        def __call__(self, grid, tensors, numbers) -> None:
            super().__call__(grid, tensors, numbers)
            self.launch(grid, (*tensors, *numbers))

    def zeros(offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """So many elements behind a multiple of 16 bytes."""
        return torch.zeros(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)

    with (
        mock.patch.object(Recorder, "__getitem__", CompiledKernel.__getitem__, create=True),
        mock.patch.object(JITFunction, "_do_compile", compile_),
        mock.patch.object(decode_launch, "PrecompiledKernel", Both),
        mock.patch.object(decode_launch, "pointer", lambda x: x),
        mock.patch.object(decode_launch, "check_device", lambda _: None),
        mock.patch.object(decode_launch, "arch_of", lambda _: 90),
    ):
        for batch, heads, key_heads, offset in ((1, 1, 1, 0), (1, 16, 16, 0), (3, 4, 2, 1)):
            cache = KVCache()
            for n in STEPS:
                q, k, v = (zeros(offset, batch, h, n, 32) for h in (heads, key_heads, key_heads))
                options = {"spec": QuantSpec(**spec), "key_mask": zeros(offset, batch, cache.length + n, dtype=torch.bool)}
                options["window"] = window
                if spec["preset"] == "nvfp4" and window is None:
                    options["k_shift"] = zeros(offset, key_heads, 32)
                options["q_shift"] = zeros(offset, key_heads, 32) if q_shifted else None
                if cache.length:
                    features = {"softcap": softcap, "sinks": zeros(offset, heads) if sinks else None}
                    cache.attention(q, k, v, impl="triton", scale=1.0, **options, **features)
                else:
                    cache.append(k, v, impl="eager", **options)
    pairs = list(zip(launches[::2], launches[1::2], strict=True))
    same_arguments = [all(x is y for x, y in zip(a, b, strict=True)) for (_, a), (_, b) in pairs]
    return compiled, [a is b for (a, _), (b, _) in pairs], same_arguments


@pytest.mark.parametrize(
    "spec",
    [
        {"preset": "nvfp4", "rotate": True},
        {"preset": "kv_nvfp4"},
        {"preset": "nvfp4", "window": 9, "softcap": 2.0, "sinks": True, "q_shifted": True},
    ],
    ids=str,
)
def test_launches_by_type_are_those_of_triton(spec, compiler):
    """Whatever the numbers and the alignment of what the caller passes: one kernel for several tokens, and one for one."""
    compiled, same_kernel, same_arguments = compiler.submit(record_steps, **spec).result()
    assert len(same_kernel) == 3 * 3 * 3 and all(same_kernel) and all(same_arguments)
    assert compiled == {"append_kernel": 1, "split_kernel": 2, "combine_kernel": 1}
