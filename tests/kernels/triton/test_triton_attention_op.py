"""`attention(impl="triton")` under PyTorch's machinery, and on packed documents; the bounds are in test_triton_attention.py."""

from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from qat_kernels import QuantSpec, attention
from support.kernels.cases import Case, assert_same_bits, run
from support.kernels.interpreter import interpreted, on
from support.kernels.packed_cases import problem as packed_problem
from support.kernels.packed_cases import unpacked
from support.kernels.triton_runs import DEVICES, DOCUMENTS, SMALL, run_kernels


def run_public(case: Case, tensors: list[torch.Tensor], *, device: str, compiled: bool = False) -> tuple:
    """`attention(impl="triton")` with autograd."""
    q, k, v, grad_out = (x.to(device) for x in tensors)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options().items()}

    def function(q, k, v):
        return attention(q, k, v, return_lse=True, impl="triton", **options)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_out)
    with torch.no_grad():
        without_gradient = attention(q, k, v, impl="triton", **options)
    assert torch.equal(without_gradient, out)
    return out.detach().cpu(), lse.cpu(), [x.cpu() for x in grads]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options", [{"causal": True, "shift": True, "q_shifted": True}, {"preset": "nvfp4_qk", "mask": "holes"}], ids=str
)
def test_the_public_function_runs_the_kernels(options, compiled, device):
    case = Case(**{**SMALL, **options})
    tensors = case.tensors(torch.bfloat16)
    out, lse, grads = on(device, run_public, case, tensors, compiled=compiled)
    assert_same_bits((out, lse, grads), [x for i, x in enumerate(on(device, run_kernels, case, tensors)) if i != 1])


def run_packed(*, device: str, **options) -> tuple[tuple, list[tuple]]:
    """The documents packed, and each alone; O, LSE and gradients, on the CPU."""
    _, alone, together, keywords, packing = packed_problem(torch.bfloat16, DOCUMENTS, **options)
    keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()} | {"impl": "triton"}
    packing = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    packed = run(*(x.to(device) for x in together), **keywords, **packing)
    packing = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in packing.items()}
    separate = [run(*(x.to(device) for x in tensors), **keywords) for tensors in alone]
    return unpacked(tree_map(torch.Tensor.cpu, packed), packing), [tree_map(torch.Tensor.cpu, each) for each in separate]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "shift": True}, {"causal": True, "preset": "nvfp4_qk", "heads": (3, 1)}],
    ids=str,
)
def test_packed_documents_are_as_if_alone_to_the_bit(options, device):
    packed, alone = on(device, run_packed, **options)
    assert len(packed) == len(DOCUMENTS)
    for each, wanted in zip(packed, alone, strict=True):
        assert_same_bits(each, wanted)


@pytest.mark.gpu  # the interpreter takes 40 s
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal"), [(192, 128, True), (192, 128, False), (32, 16, False)])
def test_packed_documents_with_values_of_another_head_dim_are_as_if_alone_to_the_bit(head_dim, head_dim_v, causal):
    packed, alone = run_packed(device="cuda", head_dim=head_dim, head_dim_v=head_dim_v, causal=causal, heads=(2, 2))
    for each, wanted in zip(packed, alone, strict=True):
        assert_same_bits(each, wanted)


def run_opcheck(case: Case, *, device: str) -> None:
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in case.tensors(torch.bfloat16))
    masks = [None if x is None else x.to(device) for x in (case.key_mask(), case.k_shift())]
    rest = (*masks, case.spec().to_json(), case.seen().to_json(), 0.2)
    op, last = torch.ops.qat_kernels, {"q_shift": None if case.q_shift() is None else case.q_shift().to(device)}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op.attention_forward.default, (*leaves, *rest, True, "triton"), last)
    torch.library.opcheck(op.attention_forward.default, (q, k, v, *rest, False, "triton"), last)
    out, out_hp, _, stats, codes = op.attention_forward(q, k, v, *rest, True, "triton", **last)
    out_hp = out if case.preset == "nvfp4_qk" else out_hp
    rest = (*masks, k.shape[2], k.shape[1], case.spec().to_json(), case.seen().to_json(), 0.2)
    saved = (grad_out, None, None, v, out_hp, stats, codes)
    torch.library.opcheck(op.attention_backward.default, (*saved, *rest, "triton"), last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "lq": 9, "q_shifted": True}, {"preset": "nvfp4_qk", "mask": "holes", "shift": True, "lk": 9}],
    ids=str,
)
def test_opcheck(options, device):
    on(device, run_opcheck, Case(**{**SMALL, **options}))


def test_the_key_bias_takes_four_bytes_for_each_key_and_is_not_there_without():
    from qat_kernels.mask import Mask
    from qat_kernels.triton.launch import output_shapes

    options = {"spec": QuantSpec(), "mask": Mask(), "with_gradient": True}
    sizes = [
        output_shapes(torch.Size((2, 4, 256, 64)), torch.Size((2, 2, 256, 64)), **options, key_bias=key_bias)[1][0]
        for key_bias in (False, True)
    ]
    assert sizes[1] - sizes[0] == 2 * 2 * 256 * 4


@pytest.mark.gpu
def test_checkpointing_and_autocast_change_nothing():
    case = Case(lq=300, lk=300, causal=True)
    q, k, v, grad_out = (x.cuda() for x in case.tensors(torch.bfloat16))

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    def call(q, k, v):
        return attention(q, k, v, causal=True)

    expected = gradients(call)
    assert_same_bits(gradients(lambda *x: checkpoint(call, *x, use_reentrant=False)), expected)
    with torch.autocast("cuda", dtype=torch.float16):
        assert_same_bits(gradients(call), expected)


@pytest.mark.gpu
def test_forward_without_gradient_runs_in_a_cuda_graph():
    q, k, v, _ = (x.cuda() for x in Case(lq=300, lk=300, causal=True).tensors(torch.bfloat16))
    expected = attention(q, k, v, causal=True, spec=QuantSpec(), impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = attention(q, k, v, causal=True, spec=QuantSpec(), impl="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"causal": True}, {"mask": "left", "causal": True}, {"preset": "nvfp4_qk"}], ids=str)
def test_a_training_step_runs_in_a_cuda_graph(options):
    """Two steps, then two that are replayed: the weights are those of four ordinary steps, to the bit."""
    case = Case(lq=300, lk=300, head_dim=64, heads=(4, 4), batch=2, **options)
    settings = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.options().items()} | {"impl": "triton"}
    batches = torch.randn(4, 2, 300, 256, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)

    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 3 * 256, device="cuda", dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        q, k, v = model(x).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        attention(q, k, v, **settings).float().square().sum().backward()
        optimizer.step()

    expected, optimizer = start()
    for x in batches:
        step(expected, optimizer, x)
    model, optimizer = start()
    side, x, graph = torch.cuda.Stream(), batches[0].clone(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:2]:
            step(model, optimizer, x.copy_(batch))
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step(model, optimizer, x)
    for batch in batches[2:]:
        x.copy_(batch)
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([*model.parameters()], [*expected.parameters()])


def test_wrong_calls_say_what_was_expected():
    q, k, v, _ = Case().tensors(torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton': expected tensors on an NVIDIA GPU, got cpu; use impl='eager'"):
        attention(q, k, v, impl="triton")
    with pytest.raises(
        ValueError, match=r"dtype with impl='triton': expected float32, float16 or bfloat16; .*, got torch.float64"
    ):
        attention(q.double(), k.double(), v.double(), impl="triton")


def no_gpu_of(device: str) -> str:
    from qat_kernels.triton import device as device_module

    with (
        mock.patch.object(device_module, "INTERPRET", mock.Mock(value=False)),
        mock.patch.object(device_module, "arch_of", lambda _: 75),
    ):
        try:
            device_module.check_device(torch.device(device))
        except ValueError as refusal:
            return str(refusal)


def test_old_gpus_are_refused():
    assert "expected sm_80 or later, got sm_75" in interpreted(no_gpu_of, "cuda")
