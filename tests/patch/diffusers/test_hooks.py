"""Hooks of Diffusers on patched models: guiders and perturbed attention work, and the receipt says what hooks skip."""

import pytest
import torch
from diffusers import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_first_block_cache,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry

from qat_patch import calibrate, get_handle, patch_model, unpatch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from support.families.diffusers_image_families import FAMILIES
from support.families.families import relative
from support.models.lively_wan import sdpa, tiny_wan, velocity

QWEN_IMAGE = next(family for family in FAMILIES if family.name == "Qwen-Image")


def run(model):
    with torch.no_grad():
        return model(**QWEN_IMAGE.inputs()).sample


def perturb(model):
    config = LayerSkipConfig(indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(model, config)
    return model


def in_the_receipt(model):
    return [line.rpartition(" - ")[2] for line in str(get_handle(model)).splitlines()[1:]]


def test_perturbed_attention_in_both_orders(calls, monkeypatch):
    stock = QWEN_IMAGE.build()
    before = run(stock)
    effect = relative(run(perturb(stock)), before)
    first, later = perturb(QWEN_IMAGE.build()), QWEN_IMAGE.patched()
    patch_model(first)
    plain = run(later)
    calls.clear()
    assert torch.equal(run(first), run(perturb(later)))
    assert len(calls) == 2 * 1  # of two modules each, one is perturbed
    assert relative(run(later), plain) > 0.3 * effect
    assert in_the_receipt(first) == ["skipped by AttentionScoreSkipFunctionMode", "reached"]
    assert in_the_receipt(later) == ["reached", "reached"]  # before it was perturbed
    monkeypatch.setattr(diffusers_adapter, "attention", sdpa)
    assert torch.equal(run(later), run(stock))
    unpatch_model(later)
    assert torch.equal(run(later), run(stock))


def test_perturbed_attention_with_gradients_and_calibration():
    model = perturb(QWEN_IMAGE.patched())
    model(**QWEN_IMAGE.inputs()).sample.square().mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "transformer_blocks.0.attn.to_q.weight" not in gradient
    assert gradient["transformer_blocks.0.attn.to_v.weight"].any() and gradient["transformer_blocks.1.attn.to_q.weight"].any()
    calibrate(model, [QWEN_IMAGE.inputs()])


class Doubled(torch.overrides.TorchFunctionMode):
    """Somebody who lets attention run and changes its output, or asks for another."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return 2 * func(*args, **(kwargs | self.changes))
        return func(*args, **(kwargs or {}))


def test_other_listeners_see_4_bit_attention_and_let_it_run(calls, monkeypatch):
    model = QWEN_IMAGE.build()
    with Doubled(), Doubled():
        before = run(model)
    patch_model(model)
    with Doubled(), Doubled():
        patched = run(model)
    assert len(calls) == 2 and in_the_receipt(model) == ["reached"] * 2
    assert 1e-4 < relative(patched, before) < 0.5
    assert not torch.equal(run(model), patched)
    monkeypatch.setattr(diffusers_adapter, "attention", sdpa)
    with Doubled(), Doubled():
        assert torch.equal(run(model), before)
    with Doubled(scale=3.0), pytest.raises(ValueError, match="expected its mask, is_causal and scale to pass through"):
        run(model)
    torch.set_default_device("cpu")  # a mode too, and no listener
    try:
        assert diffusers_adapter.listeners.listener() is None
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("guider", "layers", "build", "run"),
    [
        (PerturbedAttentionGuidance, {"perturbed_guidance_layers": [0]}, QWEN_IMAGE.build, run),
        (SkipLayerGuidance, {"skip_layer_config": LayerSkipConfig([0])}, tiny_wan, velocity),
    ],
)
def test_guiders(guider, layers, build, run):
    differs = {}
    for name, model in {"stock": build(), "patched": build()}.items():
        if name == "patched":
            patch_model(model)
        guidance = guider(**layers, guidance_scale=3.0)
        guidance.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(500))
        plain, differs[name] = run(model), []
        for _ in range(3):  # with and without the prompt, and without the layer
            guidance.prepare_models(model)
            differs[name].append(not torch.equal(run(model), plain))
            guidance.cleanup_models(model)
        assert torch.equal(run(model), plain)
    assert differs["patched"] == differs["stock"] and any(differs["stock"])


def test_classes_that_are_registered_after_the_patch():
    stock = type(QWEN_IMAGE.build().transformer_blocks[0].attn.processor)

    class Own(stock):
        pass

    model = QWEN_IMAGE.build()
    model.set_attn_processor({name: Own() for name in model.attn_processors})
    patch_model(model)
    plain = run(model)
    AttentionProcessorRegistry.register(
        Own, AttentionProcessorMetadata(skip_processor_output_fn=lambda self, *args, **kwargs: args)
    )
    assert not torch.equal(run(perturb(model)), plain)


def test_skipped_blocks_are_in_the_receipt():
    model = tiny_wan()
    apply_layer_skip(model, LayerSkipConfig(indices=[0], skip_attention=True, skip_ff=True))
    patch_model(model)
    assert in_the_receipt(model) == ["not yet called"] * 4
    velocity(model)
    assert in_the_receipt(model) == ["skipped by TransformerBlockSkipHook"] * 2 + ["reached"] * 2


def broadcast(model):
    ranges = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2}
    config = PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(model, config)


def first_block(model):
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e9))


@pytest.mark.parametrize("cache", [broadcast, first_block])
@pytest.mark.parametrize("patch_first", [False, True])
def test_caches_skip_attention_on_purpose(cache, patch_first, calls):
    model = tiny_wan()
    for step in (cache, patch_model)[:: -1 if patch_first else 1]:
        step(model)
    with model.cache_context("cond"):
        velocity(model)
        assert len(calls) == 4 and in_the_receipt(model) == ["reached"] * 4
        velocity(model)
    assert len(calls) == (4 if cache is broadcast else 6)
    unpatch_model(model)


def test_a_removed_hook_excuses_no_skipped_attention():
    model = tiny_wan()
    handle = patch_model(model)
    layer = handle.patched["blocks.0.attn1"]
    layer.skipped_by = "SomeHook"
    model.blocks[0].attn1.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ValueError, match="blocks.0.attn1.*computed attention without its backend"):
        velocity(model)
