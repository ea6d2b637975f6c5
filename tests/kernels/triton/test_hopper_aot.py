"""The kernels of hopper/ compile, without spilling in loops, and without a warning that products wait for each other."""

from unittest import mock

import pytest
import torch

from qat_kernels.triton import tiles
from qat_kernels.triton.device import TRITON
from support.kernels.aot import SHARED_MEMORY, believe_in, compile_kernels

pytestmark = pytest.mark.skipif(TRITON != tiles.HOPPER_TRITON, reason="they are written for the Gluon of another Triton")


FEW = {"masked": 16, "bounded": 24, "window": 12}


def assert_clean(compiler, *calls: tuple[int, bool, dict]) -> None:
    """What serves these calls (head dim, causality, options) with the installed Triton."""
    in_gluon = 0
    futures = [(call, compiler.submit(compile_kernels, 90, *call[:2], gluon=True, **call[2])) for call in calls]
    for call, future in futures:
        for kernel in future.result():
            in_gluon += kernel.in_gluon
            if kernel.in_gluon:
                # With a key mask or bounds a few numbers may be put aside, in loops over tiles at an edge; else causal dK and dV
                # may do that with two.
                few = 4 if call[1] and kernel.name == "grad_key_value_kernel" else 0
                few = next((most for option, most in FEW.items() if call[2].get(option)), few)
                assert kernel.spilled_in_loops <= few, (call, kernel)
                assert kernel.warnings == "", (call, kernel)
                assert not kernel.read_before_written, (call, kernel)
                assert kernel.shared <= SHARED_MEMORY[90] * 1024, (call, kernel)
    assert in_gluon >= len(calls)


def test_the_forward_over_few_keys_is_clean(compiler):
    """Its other tiles are `slow`."""
    assert_clean(compiler, (64, False, {"keys": 512, "needs_gradient": False}))


def test_kernels_for_head_dim_128_are_clean(compiler):
    """The rest of the table is `slow`."""
    assert_clean(
        compiler,
        (128, True, {"window": 1024}),
        (128, False, {"needs_gradient": False}),
        (64, True, {"packed": True, "rotate": True}),
    )


def specializations() -> dict[str, set[str]]:
    """What Triton would compile each of the three kernels for, over calls of several lengths and numbers of heads."""
    from triton.runtime.jit import JITFunction

    from qat_kernels.mask import Mask
    from qat_kernels.spec import QuantSpec
    from qat_kernels.triton.hopper.backward_launch import grad_key_value_launch, grad_query_launch
    from qat_kernels.triton.hopper.dense_forward import dense_forward_kernel
    from qat_kernels.triton.hopper.forward import attention_forward_kernel
    from qat_kernels.triton.hopper.forward_launch import attend_launch, attend_to_all_launch
    from qat_kernels.triton.hopper.grad_key_value import grad_key_value_kernel
    from qat_kernels.triton.hopper.grad_query import grad_query_kernel
    from qat_kernels.triton.operands import Given, Layout
    from qat_kernels.triton.problem import Problem

    believe_in(90)
    for kernel in (attention_forward_kernel, dense_forward_kernel, grad_query_kernel, grad_key_value_kernel):
        kernel.device_caches.clear()  # of what other tests compiled in this process
    found: dict[str, set[str]] = {}

    def compile_nothing(self, key, *_):
        found.setdefault(self.__name__, set()).add(str(key))
        return mock.Mock()

    chosen = tiles.choose(90, 128, True, ("out_hp",), (3, 6))
    to_all = tiles.to_all_of(128, False, ("out_hp",), 512)
    with mock.patch.object(JITFunction, "_do_compile", compile_nothing):
        for batch, heads, key_heads, lq, lk in (
            (2, 4, 2, 777, 531),
            (1, 16, 16, 4096, 4096),
            (1, 1, 1, 1, 1),
            (3, 32, 8, 17, 2048),
        ):
            q, k = (
                torch.empty(batch, *sizes, 128, dtype=torch.bfloat16, device="meta") for sizes in ((heads, lq), (key_heads, lk))
            )
            problem = Problem.of(q.shape, k.shape, None, spec=QuantSpec(), mask=Mask(causal=True), scale=0.1)
            attend_launch(problem, chosen.forward, q.stride(), q.dtype, Given(), True)
            attend_to_all_launch(problem, to_all, Layout.of(q), q.stride(), True)
            grad_query_launch(problem, chosen.grad_query, Layout.of(q), Given())
            grad_key_value_launch(problem, chosen.grad_key_value, k.shape, k.dtype, Given())
    return found


def test_a_kernel_is_compiled_once_for_all_lengths(compiler):
    """It takes half a minute, which training on texts would pay again and again."""
    found = compiler.submit(specializations).result()
    assert {name: len(keys) for name, keys in found.items()} == {
        "attention_forward_kernel": 1, "dense_forward_kernel": 1, "grad_query_kernel": 1, "grad_key_value_kernel": 1
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_whole_table_is_clean(head_dim, causal, compiler):
    options = [
        {},
        {"needs_gradient": False},
        {"packed": True},
        {"packed": True, "needs_gradient": False},
        {"packed": True, "k_shift": True},
        {"k_shift": True},
        {"masked": True},
        {"sinks": True},
        {"rotate": True},
        {"preset": "nvfp4_qk"},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
    ]
    if not causal:
        options += [{"keys": 512}, {"keys": 512, "needs_gradient": False}]
    if causal:
        options += [
            {"window": 1024, "needs_gradient": False},
            {"block_size": 1560},
            {"prefix": 100, "window": 500},
            {"bounded": True},
        ]
    assert_clean(compiler, *((head_dim, causal, each) for each in options))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_between_are_clean(causal, compiler):
    assert_clean(compiler, (40, causal, {}), (96, causal, {}))
