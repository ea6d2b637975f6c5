"""Forward mode through whole patched models: the tangent of the output, and what MeanFlow does with it."""

import pytest
import torch
from torch.func import functional_call, grad, jvp

import qat_patch
from support.models.lively_wan import tiny_wan, wan_inputs
from support.models.tiny_qwen3 import tiny_qwen3, token_ids


def random_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(x.shape, dtype=x.dtype, generator=generator) for name, x in tensors.items()}


def qwen3():
    model, ids = tiny_qwen3(torch.float64), token_ids(length=20)
    return model, lambda parameters: functional_call(model, parameters, (ids,), {"use_cache": False}).logits


def wan():
    model, inputs = tiny_wan().double(), wan_inputs(False)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model, lambda parameters: functional_call(model, parameters, (), {**inputs, "return_dict": False})[0]


@pytest.mark.parametrize("build", [qwen3, wan])
def test_tangents_of_a_patched_model_are_the_transpose_of_its_gradient(build):
    model, output = build()
    model.requires_grad_(False)
    qat_patch.patch_model(model)
    parameters = dict(model.named_parameters())
    directions = random_like(parameters)
    out, tangent = jvp(output, (parameters,), (directions,))
    weights = random_like({"out": out})["out"]
    gradient = grad(lambda parameters: (output(parameters) * weights).sum())(parameters)
    expected = sum((gradient[name] * directions[name]).sum() for name in parameters)
    torch.testing.assert_close((tangent * weights).sum(), expected, rtol=1e-5, atol=0)
    assert float(tangent.norm()) > 0
