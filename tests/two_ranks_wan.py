"""Run under torchrun by test_context_parallel.py: Wan on two ranks against the same Wan on one, forward and backward."""

import sys

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import qat_patch
from test_patch_wan import tiny_wan, wan_inputs

# diffusers asks for the accelerators of this machine. Told that the CPU is one, it does the same over gloo.
torch._C._get_accelerator = lambda: torch.device("cpu")
torch.accelerator.device_count = lambda: 1


def step(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(kind):
    dist.init_process_group("gloo")
    inputs = wan_inputs(i2v=False)
    inputs["hidden_states"] = torch.randn(2, 4, 4, 8, 6, generator=torch.Generator().manual_seed(2))  # 48 tokens, 24 a rank
    one, two, late = tiny_wan(), tiny_wan(), tiny_wan()
    qat_patch.patch_model(one)
    qat_patch.calibrate(one, [inputs])
    expected, gradients = step(one, inputs)
    config = ContextParallelConfig(**{f"{kind}_degree": 2})
    two.enable_parallelism(config=config)
    handle = qat_patch.patch_model(two, k_shift=qat_patch.get_handle(one).k_shift)
    out, found = step(two, inputs)
    # Groups of 16 tokens lie across the ranks, and yet:
    assert torch.equal(out, expected)
    for name, gradient in gradients.items():
        dist.all_reduce(found[name])  # each rank has what its tokens contribute
        assert ((found[name] - gradient).norm() / gradient.norm()).item() < 1e-5, name
    assert found.keys() == gradients.keys()
    if kind == "ulysses":  # PyTorch's own attention knows no ring
        with handle.disabled():
            assert not torch.equal(step(two, inputs)[0], out)

    with pytest.raises(ValueError, match="plain self-attention, got a mask, or a measurement such as calibrate"):
        qat_patch.calibrate(two, [inputs | {"return_dict": False}])
    with pytest.raises(ValueError, match="<4-bit attention of blocks.0.attn1, .*enable parallelism before patch_model"):
        qat_patch.patch_model(late)
        late.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": 2}))
    uneven = tiny_wan()
    uneven.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": 2, f"{kind}_anything": True}))
    qat_patch.patch_model(uneven)
    with pytest.raises(ValueError, match="got ulysses_anything or ring_anything; set them to False"):
        step(uneven, inputs)
    dist.destroy_process_group()


main(sys.argv[1])
