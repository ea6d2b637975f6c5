"""LoRA and quantized linear layers: the sum of weight and adapters rounded, or adapters beside the rounded weight."""

import copy

import peft
import pytest
import torch

from qat_patch import (
    AttnQATConfig,
    LinearQATConfig,
    QuantSpec,
    export_checkpoint,
    get_handle,
    get_linear_handle,
    load_checkpoint,
    patch_model,
    quantize_linears,
    unquantize_linears,
    verify_checkpoint,
)
from support.kernels import oracle
from support.models.exports import logits
from support.models.tiny_qwen3 import tiny_qwen3, token_ids

KV = AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4"))
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def with_adapters(model=None, **options):
    model = tiny_qwen3(num_hidden_layers=2) if model is None else model
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA | options)).eval()


def quantized(merge, form="nvfp4", **options):
    model = with_adapters(**options)
    patch_model(model, KV)
    handle = quantize_linears(model, LinearQATConfig(format=form), merge_adapters=merge)
    if form == "nvfp4":
        with torch.no_grad(), handle.calibration():
            model(token_ids())
    return model


@pytest.mark.parametrize("merge", [True, False])
def test_forward_and_gradients_are_those_of_the_formula_in_float64(merge):
    """y = F(x) F(W + s B A)^T, or F(x) F(W)^T + s x A^T B^T; the weight is frozen, and roundings are gone straight through."""
    model = quantized(merge)
    name = "model.layers.1.mlp.down_proj"
    base = get_linear_handle(model).modules[name]
    layer = model.base_model.model.get_submodule(name).double()
    scales = get_linear_handle(model).scales[name]
    x = torch.randn(2, 9, 96, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    a, b, s = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach(), layer.scaling["default"]
    xf = oracle.phi(x, -1, g=scales.input)[0]
    weight = base.weight.detach()
    if merge:
        wf = oracle.phi((weight.float() + (s * (b @ a)).float()), -1, g=scales.weight)[0]
        assert not torch.equal(wf, oracle.phi(weight, -1, g=scales.weight)[0])
        dw = dy.flatten(0, 1).T @ xf.flatten(0, 1)
        expected = (xf @ wf.T, dy @ wf, s * b.T @ dw, s * dw @ a.T)
    else:
        wf, flat, of_x = oracle.phi(weight, -1, g=scales.weight)[0], dy.flatten(0, 1), x.detach().flatten(0, 1)
        expected = (xf @ wf.T + s * x @ a.T @ b.T, dy @ wf + s * dy @ b @ a, s * (flat @ b).T @ of_x, s * flat.T @ of_x @ a.T)
    found = (y, x.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad)
    for got, want in zip(found, expected, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-6
    assert base.weight.grad is None


def test_merged_weights_are_exported_as_they_computed(tmp_path):
    """Bit-equal, which adapters beside the weight could not be: they would be rounded for the first time."""
    model = quantized(True)
    assert "q_proj with its adapters" in str(get_linear_handle(model))
    for dtype in (None, "bfloat16"):
        folder = export_checkpoint(model, tmp_path / str(dtype), server="vllm", dtype=dtype)
        report = verify_checkpoint(folder)
        assert sum("bit-equal" in line for line in report) == 3
    assert torch.equal(logits(load_checkpoint(tmp_path / "None")), logits(model))
    with pytest.raises(ValueError, match="were trained for merged weights"):
        export_checkpoint(model, tmp_path / "alone", merge_adapters=False, base_model="x/y")


def test_adapters_alone_for_the_packed_base(tmp_path):
    base = tiny_qwen3(num_hidden_layers=2)
    base.save_pretrained(tmp_path / "base")
    model = quantized(False)
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base")}
    folder = export_checkpoint(model, tmp_path / "adapters", server="vllm", **options)
    assert any("14 linear layers in nvfp4" in line for line in verify_checkpoint(folder))
    loaded = load_checkpoint(folder)
    assert torch.equal(logits(loaded), logits(model))
    text = (folder / "SERVING.md").read_text()
    assert "vllm serve packed-base" in text and "load_checkpoint('.').unload()" in text and str(tmp_path / "base") in text
    assert "trained together with 14 linear layers" in (folder / "README.md").read_text()
    # As SERVING.md says, and as a server computes: adapters beside packed weights.
    packed = export_checkpoint(loaded.unload(), tmp_path / "packed-base", server="vllm")
    served = peft.PeftModel.from_pretrained(load_checkpoint(packed), folder).eval()
    assert torch.equal(logits(served), logits(model))
    with pytest.raises(ValueError, match="has adapters beside a quantized weight"):
        export_checkpoint(model, tmp_path / "merged")
    # Added later they are beside, too.
    late = tiny_qwen3(num_hidden_layers=2)
    patch_model(late, KV)
    quantize_linears(late, get_linear_handle(model).config, scales=get_linear_handle(model).scales)
    assert torch.equal(logits(with_adapters(late)), logits(model))


@pytest.mark.parametrize("merge", [True, False])
def test_switches_and_undo(merge):
    stock = with_adapters()
    expected = logits(stock)
    with stock.disable_adapter():
        without = logits(stock)
    model = quantized(merge)
    attention, linears = get_handle(model), get_linear_handle(model)
    both = logits(model)
    with attention.disabled(), linears.disabled():
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), without)
    with model.disable_adapter(), attention.disabled():
        assert 0.05 < ((logits(model) - without).norm() / without.norm()).item() < 0.6
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), both)
    unquantize_linears(again)
    with get_handle(again).disabled():
        assert torch.equal(logits(again), expected)
    assert type(again.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    # Merged by PEFT they are weights like others, and exported as those.
    whole = model.merge_and_unload()
    assert not get_linear_handle(whole).merged and len(get_linear_handle(whole).modules) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "LoRA with dropout"),
        ({"use_dora": True}, "a Linear with a variant"),
        ({"lora_bias": True}, "with a bias"),
    ],
)
def test_what_cannot_be_rounded_as_a_sum_is_refused(options, message):
    model = with_adapters(**options)
    with pytest.raises(ValueError, match=rf"down_proj: expected plain LoRA.*{message}|q_proj: expected plain LoRA.*{message}"):
        quantize_linears(model)
    assert get_linear_handle(model) is None
    quantize_linears(model, merge_adapters=False)


def test_adapters_chosen_by_sample_are_refused():
    model = quantized(True, "nvfp4a16")
    model.add_adapter("other", peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match="expected one set of adapters for all samples"):
        model(token_ids(), adapter_names=["default", "other"])
