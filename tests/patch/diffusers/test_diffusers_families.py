"""Every family of Diffusers models in every mode: the tests behind docs/MODELS.md."""

import re

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch.utils._pytree import tree_map_only

from qat_patch import calibrate, get_handle, patch_model, sensitivity, unpatch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from support.families.diffusers_families import FAMILIES, REFUSED
from support.families.families import relative
from support.kernels.calls import record_calls
from support.models.lively_wan import sdpa

PROJECTIONS = ["to_q", "to_k", "to_v", "to_qkv_mlp_proj", "to_query", "to_key", "to_value"]


def sample(model, inputs):
    out = model(**inputs).sample
    return out[0] if isinstance(out, list) else out


def run(model, inputs):
    with torch.no_grad():
        return sample(model, inputs)


def gradients(model, inputs):
    model.zero_grad()
    sample(model, inputs).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trains(patched, stock):
    """Finite gradients wherever the stock model has any, and as large as there."""
    assert patched.keys() == stock.keys()
    for name, gradient in patched.items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == stock[name].any(), name
        if stock[name].norm() > 1e-6:
            assert gradient.norm() == pytest.approx(stock[name].norm(), rel=1.0), name


def switched_off_and_unpatched(family, monkeypatch):
    model, inputs = family.build(), family.inputs()
    before = run(model, inputs)
    keys = list(model.state_dict())
    handle = patch_model(model, family.config)
    with monkeypatch.context() as patch:
        seen = record_calls(patch)
        assert 1e-3 < relative(run(model, inputs), before) < 0.5
        assert len(seen) == family.calls
        assert any(call["key_mask"] is not None for call in seen) == (family.mask != "none")
        patch.setattr(diffusers_adapter, "attention", sdpa)
        assert relative(run(model, inputs), before) < (0 if family.mask != "additive" else 1e-6) + 1e-12
    assert len(handle.skipped) == family.skipped
    with handle.disabled():
        assert torch.equal(run(model, inputs), before)
    unpatch_model(model)
    assert torch.equal(run(model, inputs), before)
    assert list(model.state_dict()) == keys


def training_step(family, monkeypatch):
    model, inputs = family.build().train(), family.inputs()
    stock = gradients(model, inputs)
    patch_model(model, family.config)
    assert_trains(gradients(model, inputs), stock)


def gradient_checkpointing(family, monkeypatch):
    model, inputs = family.patched().train(), family.inputs()
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, inputs)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def compiled(family, monkeypatch):
    """One graph, with gradient checkpointing in it, forward and backward."""
    torch._dynamo.reset()
    model, inputs = family.patched().train(), family.inputs()
    calibrate(model, [inputs])
    model.enable_gradient_checkpointing()
    plain = gradients(model, inputs)
    model.compile(fullgraph=True, backend="aot_eager")
    graph = gradients(model, inputs)
    assert all(torch.allclose(plain[name], graph[name], rtol=1e-2, atol=1e-4 * plain[name].abs().max()) for name in plain)


def compiled_blocks(family, monkeypatch):
    """As many graphs as the stock model has: blocks that differ in their shifts share one."""
    inputs, graphs = family.inputs(), {}
    for name, model in {"stock": family.build(), "patched": family.patched()}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if name == "patched":
            calibrate(model, [inputs])
        before = run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert relative(run(model, inputs), before) < 1e-5
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["patched"] == graphs["stock"] > 0


def in_bf16(inputs):
    return tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)


def bf16(family, monkeypatch):
    model, inputs = family.build(), family.inputs()
    expected = run(model, inputs)
    model = family.patched(torch.bfloat16).train()
    inputs = in_bf16(inputs)
    assert relative(run(model, inputs).float(), expected) < 0.5
    assert all(gradient.isfinite().all() for gradient in gradients(model, inputs).values())


def autocast(family, monkeypatch):
    model, inputs = family.patched().train(), family.inputs()
    seen = record_calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    assert {call[name].dtype for call in seen for name in "qkv"} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in found.values())


def lora(family, monkeypatch, tmp_path):
    model, inputs = family.patched().train(), family.inputs()
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    config = LoraConfig(r=2, target_modules=[name for name in PROJECTIONS if name in names], init_lora_weights="gaussian")
    model.requires_grad_(False)
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    found = gradients(model, inputs)
    assert found and all("lora" in name for name in found)
    assert all(gradient.isfinite().all() for gradient in found.values()) and any(gradient.any() for gradient in found.values())
    model.save_lora_adapter(tmp_path)
    fresh = family.patched()
    plain = run(fresh, inputs)
    fresh.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert not torch.equal(run(fresh, inputs), plain)
    assert torch.allclose(run(fresh, inputs), run(model, inputs), atol=1e-5)
    assert len(get_handle(fresh).patched) and "LOST" not in str(get_handle(fresh))


def fused_for_inference(family, monkeypatch):
    model, inputs = family.patched(), family.inputs()
    before = run(model, inputs)
    model.fuse_qkv_projections()
    assert torch.allclose(run(model, inputs), before, atol=0.05 * before.abs().max().item())
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), before)


def fused_for_training(family, monkeypatch):
    model, inputs = family.patched().train(), family.inputs()
    model.fuse_qkv_projections()
    gradients(model, inputs)


def layerwise_casting(family, monkeypatch):
    model, inputs = family.patched(), family.inputs()
    before = run(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert relative(run(model, inputs), before) < 0.5


def group_offload(family, monkeypatch):
    model, inputs = family.patched(), family.inputs()
    before = run(model, inputs)
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(run(model, inputs), before)


def calibrated(family, monkeypatch):
    model, inputs = family.patched(), family.inputs()
    before = run(model, inputs)
    report = sensitivity(model, [inputs])
    assert all(0 < layer.error < 1 for layer in report.layers)
    if family.no_k_shift:
        with pytest.raises(ValueError, match="attends to several sets of keys"):
            calibrate(model, [inputs], shifts=("k_shift",))
    calibrate(model, [inputs])
    family.check_shifts(get_handle(model))
    assert not torch.equal(run(model, inputs), before)


MODES = {
    "off, unpatch": switched_off_and_unpatched,
    "training": training_step,
    "gradient checkpointing": gradient_checkpointing,
    "`torch.compile(fullgraph=True)`, training": compiled,
    "`compile_repeated_blocks`": compiled_blocks,
    "bfloat16": bf16,
    "autocast": autocast,
    "LoRA": lora,
    "fused QKV, inference": fused_for_inference,
    "fused QKV, training": fused_for_training,
    "layerwise casting": layerwise_casting,
    "group offload": group_offload,
    "`calibrate`, `sensitivity`": calibrated,
}


def in_stock_model(mode, model, inputs):
    """What a mode does, without a patch. Raises where diffusers has no such thing."""
    if mode in (fused_for_inference, fused_for_training):
        model.fuse_qkv_projections()
        if not any(getattr(module, "fused_projections", False) for module in model.modules()):
            raise AttributeError("nothing was fused")
        return
    if mode is bf16:
        model, inputs = model.bfloat16(), in_bf16(inputs)
    if mode in (gradient_checkpointing, compiled):
        model.enable_gradient_checkpointing()
    if mode is compiled:
        model.compile(fullgraph=True, backend="aot_eager")
    if mode is compiled_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    gradients(model, inputs)


def cells():
    """Every family in every mode; compiling takes long, so that most of it is for -m slow."""
    for family in FAMILIES:
        for mode in MODES:
            slow = "compile" in mode and family.name not in ("Wan 2.1 T2V, Wan 2.2 A14B", "HunyuanVideo")
            yield pytest.param(family, mode, id=f"{family.name}-{mode}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "mode"), list(cells()))
def test_family_in_mode(family, mode, monkeypatch, tmp_path):
    arguments = {"tmp_path": tmp_path} if mode == "LoRA" else {}
    if mode in family.not_applicable:
        with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)):
            in_stock_model(MODES[mode], family.build().train(), family.inputs())
    elif mode in family.refused_modes:
        with pytest.raises((RuntimeError, ValueError), match=family.refused_modes[mode]):
            MODES[mode](family, monkeypatch, **arguments)
    else:
        MODES[mode](family, monkeypatch, **arguments)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused_family(family):
    with pytest.raises(ValueError, match=re.escape(family.refused)):
        patch_model(family.build())
