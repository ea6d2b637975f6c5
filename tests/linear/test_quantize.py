"""quantize_linears: what a quantized layer computes, its gradient, its scales, its switches, and what is refused."""

import copy
import pickle
import sys

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qat_patch import (
    AttnQATConfig,
    LinearQATConfig,
    QuantSpec,
    get_handle,
    get_linear_handle,
    patch_model,
    quantize_linears,
    unpatch_model,
    unquantize_linears,
)
from qat_patch.linear.compressed import fake_quantize, global_scale
from qat_patch.linear.module import QuantizedLinear
from support.kernels import oracle
from support.models.exports import logits, velocity
from support.models.tiny_qwen3 import checkpoint_activations, tiny_llama, tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline, tiny_transformer

A16 = LinearQATConfig(format="nvfp4a16")


def qwen3(config=None, **options):
    """With the ranges of its inputs measured."""
    model = tiny_qwen3(num_hidden_layers=2, **options)
    handle = quantize_linears(model, config)
    if handle.config.rounds_inputs:
        with torch.no_grad(), handle.calibration():
            model(token_ids())
    return model


@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_forward_and_gradients_are_those_of_the_formula_in_float64(rounds_inputs):
    """y = F(x) F(W)^T + b; dx = dy F(W), dW = dy^T F(x), db = the sum of dy: straight through, exactly."""
    model = tiny_llama(torch.float64)
    linears = quantize_linears(model, LinearQATConfig(format="nvfp4" if rounds_inputs else "nvfp4a16"))
    layer = linears.modules["model.layers.1.mlp.up_proj"]
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features, dtype=torch.float64))
    x = torch.randn(3, 7, layer.in_features, dtype=torch.float64, requires_grad=True)
    record = linears.layers["model.layers.1.mlp.up_proj"]
    if rounds_inputs:
        record.input_scale = 256.0
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    xf = oracle.phi(x, -1, g=256.0)[0] if rounds_inputs else x.detach()
    wf = oracle.phi(layer.weight, -1, g=record.weight_scale)[0]
    assert ((xf - x).norm() / x.norm() > 0.05) == rounds_inputs and (wf - layer.weight).norm() / layer.weight.norm() > 0.05
    for found, expected in (
        (y, xf @ wf.T + layer.bias),
        (x.grad, dy @ wf),
        (layer.weight.grad, dy.flatten(0, 1).T @ xf.flatten(0, 1)),
        (layer.bias.grad, dy.sum((0, 1))),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_values_are_exact_in_bfloat16_with_powers_of_two_and_no_less_precise():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.03
    for amax in (x.abs().max().item(), 3.0, 1e-6, 5e4):
        scale = global_scale(amax, "power_of_two")
        assert scale == 2.0 ** round(torch.log2(torch.tensor(scale)).item()) and 1344 < amax * scale <= 2688
        assert global_scale(amax, "power_of_two", room=2.0) == scale / 2
        assert global_scale(amax, "compressed_tensors") == pytest.approx(2688 / amax, rel=1e-6)
    assert global_scale(0.0, "power_of_two") == global_scale(0.0, "compressed_tensors") == 1
    errors = {}
    for rule in ("power_of_two", "compressed_tensors"):
        rounded = fake_quantize(x, global_scale(x.abs().max().item(), rule))
        errors[rule] = ((rounded - x).norm() / x.norm()).item()
        assert torch.equal(rounded.bfloat16().float(), rounded) == (rule == "power_of_two")
    assert errors["power_of_two"] == pytest.approx(errors["compressed_tensors"], rel=0.02)
    # Weights may double before they saturate.
    scale = global_scale(x.abs().max().item(), "power_of_two", room=2.0)
    assert ((fake_quantize(2 * x, scale) - 2 * x).norm() / (2 * x).norm()).item() < 0.11
    assert ((fake_quantize(8 * x, scale) - 8 * x).norm() / (8 * x).norm()).item() > 0.2


def test_layers_of_one_module_share_the_scale_of_their_weights():
    """Servers merge q, k and v, and gate and up, and take the largest of their global scales for all."""
    model = tiny_qwen3(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 16
    scales = quantize_linears(model, A16).scales
    largest = max(getattr(model.model.layers[1].mlp, f"{name}_proj").weight.abs().max().item() for name in ("gate", "up", "down"))
    assert 672 < scales["model.layers.1.mlp.up_proj"].weight * largest <= 1344
    of_attention = {scales[f"model.layers.0.self_attn.{name}_proj"].weight for name in "qkvo"}
    assert len(of_attention) == 1
    assert of_attention.pop() * 8 <= scales["model.layers.1.self_attn.q_proj"].weight
    assert scales["model.layers.0.mlp.gate_proj"] == scales["model.layers.0.mlp.up_proj"]


def test_it_is_bit_equal_again_when_switched_off_undone_or_copied():
    stock = logits(tiny_qwen3(num_hidden_layers=2))
    model = qwen3()
    names = tiny_qwen3(num_hidden_layers=2).state_dict().keys()
    assert model.state_dict().keys() == names
    quantized = logits(model)
    assert 0.05 < ((quantized - stock).norm() / stock.norm()).item() < 0.6
    handle = get_linear_handle(model)
    with handle.disabled(), handle.disabled():
        assert torch.equal(logits(model), stock)
        with pytest.raises(ValueError, match="inside disabled"):
            copy.deepcopy(model)
    assert torch.equal(logits(model), quantized)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), quantized)
        unquantize_linears(again)
        assert torch.equal(logits(again), stock) and get_linear_handle(again) is None
        assert not any(isinstance(module, QuantizedLinear) for module in again.modules())
    with pytest.raises(ValueError, match="are not quantized"):
        unquantize_linears(again)
    assert str(handle).splitlines()[0].startswith("Qwen3ForCausalLM: weights and inputs of 14 of 15 linear layers in NVFP4")
    assert "left out  lm_head: outside of the numbered blocks" in str(handle) and "not been measured" not in str(handle)
    # Its scales bring all of it back.
    other = tiny_qwen3(num_hidden_layers=2)
    quantize_linears(other, handle.config, scales=handle.scales)
    assert torch.equal(logits(other), quantized)


def test_the_two_switches_are_independent():
    """Four models in one: 4-bit attention and 4-bit linear layers, each on and off, in either order."""
    results = []
    for order in (0, 1):
        model = tiny_qwen3(num_hidden_layers=2)
        steps = [lambda m: patch_model(m, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4"))), lambda m: quantize_linears(m, A16)]
        for step in steps if order == 0 else reversed(steps):
            step(model)
        attention, linears = get_handle(model), get_linear_handle(model)
        found = [logits(model)]
        with attention.disabled():
            found.append(logits(model))
            with linears.disabled():
                found.append(logits(model))
        with linears.disabled():
            found.append(logits(model))
        unpatch_model(model)
        assert torch.equal(logits(model), found[1])
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][2], logits(tiny_qwen3(num_hidden_layers=2)))
    assert all(not torch.equal(a, b) for i, a in enumerate(results[0]) for b in results[0][:i])


def test_ranges_of_inputs_are_measured_unquantized_and_needed():
    model = tiny_qwen3(num_hidden_layers=2)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].abs().max().item())
            )
    handle = quantize_linears(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the range of its input has not been measured"):
        model(token_ids())
    with pytest.raises(ValueError, match="expected a calibrated model"):
        _ = handle.scales
    with pytest.raises(ValueError, match="was not called"), handle.calibration():
        pass
    with pytest.raises(ValueError, match="is not finite"), torch.no_grad(), handle.calibration():
        model(inputs_embeds=torch.full((1, 4, 64), torch.nan))
    assert all(layer.input_scale is None and not layer.off for layer in handle.layers.values())
    with torch.no_grad(), handle.calibration():
        model(token_ids())
        model(token_ids(seed=2)[:, :2])
    model(token_ids())
    seen.clear()
    with handle.disabled():
        model(token_ids())
        model(token_ids(seed=2)[:, :2])
    for name, scales in handle.scales.items():
        assert scales.input == global_scale(max(seen[name]), "power_of_two"), name
    # The larger range decides, whichever batch it is in.
    assert seen["model.layers.0.self_attn.o_proj"] == sorted(seen["model.layers.0.self_attn.o_proj"])
    assert len({handle.scales[f"model.layers.0.self_attn.{name}_proj"].input for name in "qkv"}) == 1
    weights_alone = quantize_linears(tiny_qwen3(), A16)
    with pytest.raises(ValueError, match="got 'nvfp4a16', which rounds no inputs"), weights_alone.calibration():
        pass


def test_autocast_rounds_what_a_server_gets():
    """Weights in float32 are rounded once, and inputs from bfloat16: the values are those of the bfloat16 product."""
    model = qwen3()
    layer = get_linear_handle(model).modules["model.layers.0.mlp.up_proj"]
    scales = get_linear_handle(model).scales["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    xf, wf = fake_quantize(x.bfloat16(), scales.input), fake_quantize(layer.weight, scales.weight).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.nn.functional.linear(xf, wf))
    assert not torch.equal(xf.float(), fake_quantize(x, scales.input))


def test_training_compiled_and_with_checkpointed_activations():
    gradients = []
    for kind in ("plain", "checkpointed", "compiled"):
        model = qwen3().train()
        if kind == "checkpointed":
            checkpoint_activations(model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if kind == "compiled" else model
        run(token_ids(), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_wan_transformer_trains_too():
    model = tiny_transformer(layers=1)
    stock = velocity(model)
    handle = quantize_linears(model)
    assert handle.skipped.keys() >= {"proj_out", "condition_embedder.time_proj"} and not handle.experts
    assert {name.partition(".")[0] for name in handle.layers} == {"blocks"}
    with torch.no_grad(), handle.calibration():
        velocity(model)
    assert 0.005 < ((velocity(model) - stock).norm() / stock.norm()).item() < 0.5


def test_experts_in_one_parameter_are_left_out_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()
    handle = quantize_linears(model, A16)
    assert sorted(handle.layers) == [f"model.layers.0.self_attn.{name}_proj" for name in "koqv"]
    assert handle.experts == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert "mlp.experts.down_proj: experts in one parameter of shape [4, 32, 32]" in str(handle)


class Other(torch.nn.Linear):
    """Somebody's own."""


def test_patterns_and_what_is_not_a_plain_linear_layer_are_left_out_with_reasons():
    model = tiny_qwen3(num_hidden_layers=2)
    model.model.layers[1].mlp.down_proj = Other(96, 64)
    handle = quantize_linears(model, LinearQATConfig(format="nvfp4a16", exclude=("model.layers.0.*",)))
    assert handle.skipped["model.layers.0.mlp.up_proj"] == "excluded by 'model.layers.0.*'"
    assert handle.skipped["model.layers.1.mlp.down_proj"] == "a Other, whose weights are another's to quantize"
    assert len(handle.layers) == 6
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96)
    assert "model.layers.1.mlp.up_proj - LOST" in str(handle)
    with pytest.raises(ValueError, match="got a module that was put in its place"):
        handle.check_in_force("this")


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: qwen3(A16), A16, "is quantized already"),
        (lambda: tiny_pipeline(layers=1), A16, "of a pipeline pass the transformer"),
        (lambda: torch.nn.Linear(16, 16), A16, "expected a model of transformers or diffusers"),
        (lambda: torch.nn.ModuleList([tiny_qwen3(), tiny_llama()]), A16, "a module around one model"),
        (tiny_qwen3, "nvfp4", "expected a LinearQATConfig"),
        (tiny_qwen3, LinearQATConfig(exclude=("*.fc1",)), r"the pattern '\*\.fc1' matches no linear layer"),
        (tiny_qwen3, LinearQATConfig(exclude=("*",)), "nothing to quantize"),
        (lambda: tiny_qwen3(intermediate_size=40), A16, r"mlp\.down_proj has 40 inputs"),
        (lambda: tiny_qwen3().to("meta"), A16, "is not in memory"),
    ],
)
def test_refusals_change_nothing(make, config, message):
    model = make()
    handle = get_linear_handle(model)
    with pytest.raises(ValueError, match=message):
        quantize_linears(model, config)
    assert get_linear_handle(model) is handle


def test_settings_and_what_is_missing_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="format: expected nvfp4 or nvfp4a16, got 'w4a4'"):
        LinearQATConfig(format="w4a4")
    with pytest.raises(ValueError, match="exclude: expected a sequence"):
        LinearQATConfig(exclude="lm_head")
    config = LinearQATConfig(format="nvfp4a16", exclude=("*.0.*",), global_scale="compressed_tensors")
    assert LinearQATConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="scales: expected those of the layers to quantize"):
        quantize_linears(tiny_qwen3(), A16, scales={})
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ValueError, match=r"pip install 'qat-patch\[linear\]'"):
        quantize_linears(tiny_qwen3(), A16)
