"""Calls that cost little on the host: planned once, launched as Triton would, and without an op node where none is needed."""

from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qat_kernels import attention, ran
from support.kernels.aot import believe_in
from support.kernels.cases import Case, assert_same_bits
from support.kernels.interpreter import interpreted

FORWARD = "qat_kernels::attention_forward"


def plans_after_each_call() -> list[tuple[int, int]]:
    """How many plans of forwards and backwards there are after each call, beginning with none."""
    from qat_kernels.triton import backward_launch, forward_launch

    caches = [module._plan for module in (forward_launch, backward_launch)]
    for cache in caches:
        cache.cache_clear()
    counts = []

    def call(change=lambda x: x, dtype=torch.bfloat16, **options):
        leaves = [change(torch.randn(1, 9, 2, 16).to(dtype)).transpose(1, 2).requires_grad_() for _ in range(3)]
        attention(*leaves, impl="triton", **options).sum().backward()
        counts.append(tuple(cache.cache_info().misses for cache in caches))

    call()
    call()
    call(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))  # other strides
    call(lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x))  # begins anywhere
    call(dtype=torch.float16)
    call(causal=True)
    call(causal=True, scale=0.5)
    call()
    return counts


def test_a_call_is_planned_once():
    """Anew for other strides, alignment, dtypes and options. The backward sees O' and dO, which always begin well."""
    forwards, backwards = zip(*interpreted(plans_after_each_call), strict=True)
    assert forwards == (1, 1, 2, 3, 4, 5, 6, 6)
    assert backwards == (1, 1, 2, 2, 3, 4, 5, 5)


class Recorder:
    """In place of a compiled kernel."""

    def __init__(self, launches: list) -> None:
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments, **_: self.launches.append((self, grid, arguments))

    def run(self, x, y, z, stream, function, metadata, *rest) -> None:
        self.launches.append((self, (x, y, z), rest[3:]))

    function = packed_metadata = None

    def launch_metadata(self, *_):
        return None


def launches_in_both_ways(calls: list[dict]) -> list[tuple[str, bool, bool]]:
    """For every launch its kernel, and whether Triton's own launch takes the same kernel, with as many arguments."""
    from triton.runtime.jit import JITFunction

    from qat_kernels.mask import Bounds
    from qat_kernels.triton import backward_launch, forward_launch, operands, precompiled

    believe_in(90)
    launches, found = [], []
    init, launch = precompiled.PrecompiledKernel.__init__, precompiled.PrecompiledKernel.__call__

    def compile_(self, key, signature, device, *_):
        return self.device_caches[device][0].setdefault(key, Recorder(launches))

    def remember(self, kernel, arguments, constants, **options):
        init(self, kernel, arguments, constants, **options)
        self.by_triton = lambda grid, arguments: kernel[grid](*arguments, **constants, **options)
        self.name, self.parameters = kernel.__name__, kernel.arg_names

    def both(self, grid, tensors, numbers):
        launch(self, grid, tensors, numbers)
        arguments = [self._tiles[n].descriptor(x) if n in self._tiles else x for n, x in enumerate(tensors)]
        # Triton makes a constant of a length of 1; we do not.
        named = zip(self.parameters[len(tensors) :], numbers, strict=False)
        self.by_triton(grid, (*arguments, *(2 if x == 1 and name in precompiled._LENGTHS else x for name, x in named)))
        (ours, *other), (theirs, *expected) = launches[-2:]
        found.append((self.name, ours is theirs, other[0] == expected[0] and len(other[1]) == len(expected[1])))

    def views(x, begin):
        return [x[start:] for start in begin]

    with (
        mock.patch.object(JITFunction, "_do_compile", compile_),
        mock.patch.object(precompiled.PrecompiledKernel, "__init__", remember),
        mock.patch.object(precompiled.PrecompiledKernel, "__call__", both),
        mock.patch.object(forward_launch, "parts", views),
        mock.patch.object(backward_launch, "parts", views),
        mock.patch.object(forward_launch, "pointer", lambda x: x),
        mock.patch.object(backward_launch, "pointer", lambda x: x),
        mock.patch.object(operands, "pointer", lambda x: x),
        mock.patch.object(forward_launch, "check_device", lambda _: None),
        mock.patch.object(forward_launch, "arch_of", lambda _: 90),
        mock.patch.object(backward_launch, "arch_of", lambda _: 90),
    ):
        for options in calls:
            for cache in (forward_launch._plan, backward_launch._plan, operands._allowed_keys_launch):
                cache.cache_clear()
            case, dtype = Case(**options | {"batch": 2}), options.get("dtype", torch.bfloat16)
            q, k, v, grad_out = case.tensors(dtype)
            scale = case.head_dim**-0.5 if case.scale is None else case.scale
            bounds = case.bound_tensors()
            settings = {"spec": case.spec(), "mask": case.seen(), "scale": scale, "softcap": case.softcap}
            settings |= {"bounds": None if bounds is None else Bounds(*bounds), "sinks": case.sink_logits()}
            settings["q_shift"] = case.q_shift()
            masks = case.key_mask(), case.k_shift()
            forward_launch.forward(q, k, v, *masks, with_gradient=False, **settings)
            result = forward_launch.forward(q, k, v, *masks, with_gradient=True, **settings)
            out_hp = result.out if result.out_hp is None else result.out_hp
            value = v if case.spec().reads_value(case.seen().hides_keys) else None
            backward_launch.backward(grad_out, value, out_hp, result.stats, result.codes, masks[0], key_shape=k.shape, **settings)
    return found


def test_launches_are_those_of_triton(compiler):
    """Whatever is missing, of any size, alignment and strides: what was assumed of the arguments is what Triton finds out."""
    calls = [
        {"lq": 37, "lk": 37, "causal": True},
        {"lq": 16, "lk": 1, "head_dim": 16, "heads": (1, 1)},
        {"lq": 33, "lk": 40, "mask": "holes", "head_dim": 80},
        {"lq": 37, "lk": 1, "head_dim": 192, "head_dim_v": 128, "causal": True},
        {"lq": 33, "lk": 40, "causal": True, "mask": "left", "shift": True},
        {"lq": 40, "lk": 40, "preset": "nvfp4_qk"},
        {"lq": 40, "lk": 33, "causal": True, "q_shifted": True},
        {"lq": 48, "lk": 48, "causal": True, "window": 9, "softcap": 2.0, "sinks": True},
    ]
    found = compiler.submit(launches_in_both_ways, calls).result()
    assert [each for each in found if not (each[1] and each[2])] == []
    counts = Counter(name for name, *_ in found)
    assert counts["attention_forward_kernel"] == 2 * len(calls) and counts["grad_query_kernel"] == len(calls)
    assert counts["allowed_keys_kernel"] == 2 * 3


@triton.jit
def small_kernel(rows_desc, scale_ptr, numbers, seqlen_q, factor, BLOCK: tl.constexpr):
    """Has all that kernels here take: tiles, a pointer, a tuple, numbers, and constants."""
    row = tl.load(scale_ptr) * factor + numbers[0]
    rows_desc.store([seqlen_q, 0], rows_desc.load([0, 0]) * row.to(tl.bfloat16) + BLOCK)


def launched_in_both_ways() -> list[list]:
    """What the launcher in C gets from Triton's own launch of a kernel, and from that of `PrecompiledKernel`."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from qat_kernels.triton.precompiled import Pointer, PrecompiledKernel, Tiles

    believe_in(90)
    launched, utils = [], driver.active.utils
    driver.active.launcher_cls = nvidia.CudaLauncher
    # What a module in C would set, which needs a driver.
    nvidia.PyKernelArg, nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = dict, 0, 1, 2
    utils.launch = lambda *arguments: launched.append(arguments)
    utils.load_binary.return_value = 1, 2, 255, 0, 1024
    utils.get_device_properties.return_value = {"max_shared_mem": 1 << 18}
    utils.fill_tma_descriptor_tiled = lambda base, *about: ("map", base, *about)
    utils.build_signature_metadata = tuple
    tiles, constants = Tiles(torch.bfloat16, (128, 64), 32), {"BLOCK": 4}
    arguments = [tiles, Pointer(torch.float32), (7, 3), 5, 0.5]
    kernel = PrecompiledKernel(small_kernel, arguments, constants)
    assert kernel._launcher is not None, "else both are Triton's"
    compiled = kernel((2, 1, 1), (4096, 512), ((7, 3), 5, 0.5))
    descriptor = tiles.descriptor(4096)
    compiled[(2, 1, 1)](descriptor, 512, (7, 3), 5, 0.5, 4)
    # But for three about hooks, which hear of Triton's launch alone.
    return [_flat([*each[:8], *each[11:]]) for each in launched]


def _flat(x):
    """The items of nested tuples and lists."""
    return [leaf for each in x for leaf in _flat(each)] if isinstance(x, tuple | list) else [x]


def test_the_launcher_in_c_gets_what_it_gets_from_triton(compiler):
    """Where the installed Triton is one whose launcher is known; that of 3.6 is built for each kernel, with a GPU."""
    if triton.__version__.startswith(("3.6.", "3.7.")):
        pytest.skip(f"Triton {triton.__version__} has no launcher in C that all kernels share")
    ours, theirs = compiler.submit(launched_in_both_ways).result()
    assert ours[ours.index("map") + 1] == 4096
    assert ours == theirs


def described_addresses(addresses: list[int]) -> tuple[list[int], list[tuple]]:
    """For which addresses descriptors are made in launches with these, and what the launcher gets."""
    from qat_kernels.triton import precompiled

    made, launched = [], []

    class Launcher:
        def described(self, descriptor, place):
            made.append(descriptor.base.data_ptr())
            return [("map", descriptor.base.data_ptr()), *descriptor.shape, *descriptor.strides]

        def launch(self, grid, *arguments):
            launched.append(arguments)

    kernel = precompiled.PrecompiledKernel.__new__(precompiled.PrecompiledKernel)
    tiles = precompiled.Tiles(torch.bfloat16, (128, 64), 32)
    kernel.__dict__.update(_kernel=None, _constants=(True,), _options={}, _launcher=Launcher())
    kernel.__dict__.update(_tiles={0: tiles, 2: tiles}, _first_plain=3, _described={})
    for address in addresses:
        kernel((1, 1, 1), (address, None, address + 16), (7,))
    return made, launched


def test_descriptors_are_made_once_for_each_address(compiler):
    made, launched = compiler.submit(described_addresses, [512, 1024, 512]).result()
    assert sorted(made) == [512, 528, 1024, 1040]
    sizes = (128, 64, 64, 1)
    assert launched[0] == launched[2] == (("map", 512), *sizes, None, ("map", 528), *sizes, 7, True)
    assert launched[1][0] == ("map", 1024)


def leaves() -> list[torch.Tensor]:
    return [x.requires_grad_() for x in Case(lq=20, lk=20, causal=True).tensors(torch.float32)[:3]]


class Ops(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_code_that_needs_a_node_sees_one():
    """And an ordinary call has none, whose result has the same bits."""
    tensors = leaves()
    plain = attention(*tensors, causal=True)
    assert "attention_forward" not in type(plain.grad_fn).__name__
    expected = torch.autograd.grad(plain, tensors, plain.detach())
    with Ops() as ops:
        out = attention(*tensors, causal=True)
        grads = torch.autograd.grad(out, tensors, plain.detach())
    assert ops.seen[FORWARD] == ops.seen["qat_kernels::attention_backward"] == 1
    assert_same_bits((out, grads), (plain, expected))

    graphs = []

    def look(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    left = []  # a tensor that outlives its transform
    torch.func.grad(lambda x: left.append(x) or x.sum())(tensors[0].detach())
    out = attention(*left, *tensors[1:], causal=True)
    assert "attention_forward" in type(out.grad_fn).__name__
    assert_same_bits(out, plain)

    sinks = []  # and one among the sinks
    torch.func.grad(lambda x: sinks.append(x) or x.sum())(torch.zeros(tensors[0].shape[1]))
    out = attention(*tensors, causal=True, sinks=sinks[0])
    assert "attention_forward" in type(out.grad_fn).__name__

    out = torch.compile(lambda *x: attention(*x, causal=True), backend=look, fullgraph=True)(*tensors)
    assert sum("qat_kernels.attention_forward" in target for target in graphs[0]) == 1
    assert_same_bits((out, torch.autograd.grad(out, tensors, plain.detach())), (plain, expected))


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_keeps_attention_or_runs_it_again(kept):
    tensors = leaves()

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if kept and op.name() == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*x):
        return attention(*x, causal=True).sin()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with ran.counted() as counts:
        out = checkpoint(block, *tensors, use_reentrant=False, context_fn=contexts)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert counts["eager"] == (1 if kept else 2)
    assert_same_bits(grads, torch.autograd.grad(block(*tensors).sum(), tensors))


def test_ordinary_calls_refuse_a_second_derivative():
    tensors = leaves()
    out = attention(*tensors, causal=True)
    (grad, *_) = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative"):
        grad.sum().backward()


def test_a_length_of_one_is_no_constant_of_a_kernel():
    """With head dim 32 and values of 16, ptxas made code that read outside of shared memory (precompiled.py)."""
    from qat_kernels import QuantSpec
    from qat_kernels.mask import Mask
    from qat_kernels.triton import forward_launch, operands, precompiled, problem, tiles

    q, v = torch.Size((1, 4, 1, 32)), torch.Size((1, 2, 1, 16))
    of_one = problem.Problem.of(q, v, None, spec=QuantSpec(), mask=Mask(), scale=0.2)
    tile = tiles.choose(90, 32, False).forward
    with mock.patch.object(precompiled, "PrecompiledKernel") as compiled:
        launch = forward_launch._attend_launch(of_one, tile, (64, 16, 16, 1), torch.bfloat16, operands.Given(), True)
    names = forward_launch.attention_forward_kernel.arg_names
    _, arguments, _ = compiled.call_args.args
    given = dict(zip(names, arguments, strict=False))
    assert [given[name] for name in ("seqlen_q", "seqlen_k")] == [2, 2]
    launched = dict(zip(names[len(arguments) - len(launch.numbers) :], launch.numbers, strict=False))
    assert [launched[name] for name in ("seqlen_q", "seqlen_k")] == [1, 1]
