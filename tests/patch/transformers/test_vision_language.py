"""Models that see: their language model is patched, and the receipt says what is left."""

import copy

import pytest
import torch
import transformers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from qat_patch import patch_model, unpatch_model
from support.families.every_causal_lm import OF_ONE_TYPE, reference, tiny
from support.families.families import lively, relative
from support.models.tiny_qwen3 import logits, token_ids

# The newest Qwen, and models whose towers are built in other ways.
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
}


def build(model_type, changes=None):
    model_class = getattr(transformers, CLASSES[model_type])
    torch.manual_seed(0)
    config = tiny(model_class.config_class, OF_ONE_TYPE.get(model_type, {}) | (changes or {}))
    return lively(model_class(config)).double().eval()


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_language_model_is_patched_and_the_rest_is_named(model_type):
    stock = build(model_type)
    model, ids = copy.deepcopy(stock), token_ids(length=40) % 97 + 3
    before = logits(stock, ids, use_cache=False)
    handle = patch_model(model)
    assert all(".visual." not in name and "vision" not in name for name in handle.patched)
    towers = [name for name, module in model.named_modules() if "vis" in name and hasattr(module, "is_causal")]
    assert towers and set(towers) <= set(handle.skipped) and "not causal" in str(handle)
    found = logits(model, ids, use_cache=False)
    assert relative(found, before) > 1e-4
    expected = reference(copy.deepcopy(stock), list(handle.patched), ids, torch.ones_like(ids))
    assert relative(found, expected) < 1e-6
    with handle.disabled():
        assert torch.equal(logits(model, ids, use_cache=False), before)
    unpatch_model(model)
    assert torch.equal(logits(model, ids, use_cache=False), before)


def test_a_tower_that_sees_a_picture_is_the_stock_one():
    """Qwen3-VL: its attention has no place in a cache, and is left alone."""
    stock = build("qwen3_vl")
    model = copy.deepcopy(stock)
    config = stock.config.vision_config
    grid = torch.tensor([[1, 4, 4]])
    patches = torch.randn(16, config.in_channels * config.temporal_patch_size * config.patch_size**2, dtype=torch.float64)
    patch_model(model)
    with torch.no_grad():
        expected, found = (each.model.visual(patches, grid_thw=grid) for each in (stock, model))
    for a, b in zip(*(x.values() if hasattr(x, "values") else x for x in (expected, found)), strict=True):
        assert all(torch.equal(*pair) for pair in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (a, b)), strict=True))


def test_layers_with_too_large_a_head_dim_are_left_out_with_the_reason():
    """Gemma 4 as it is published: 512 elements a head in its global layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma4TextConfig(**sizes, num_hidden_layers=6, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128)
    model = lively(Gemma4ForCausalLM(config)).eval()
    handle = patch_model(model)
    assert handle.skipped == {"model.layers.5.self_attn": "head_dim 512: at most 256 is supported"}
    assert logits(model, token_ids(length=30), use_cache=False).isfinite().all()
