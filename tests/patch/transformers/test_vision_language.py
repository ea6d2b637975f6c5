"""Vision-language models: their language model is patched, and the receipt lists the modules that are not."""

import copy

import pytest
import torch
import transformers

from qat_patch import patch_model, unpatch_model
from qat_patch.hosts.transformers.cache import cache_argument
from support.families.every_causal_lm import OF_ONE_TYPE, reference, tiny
from support.families.families import lively, relative
from support.families.in_float64 import InFloat64
from support.models.tiny_qwen3 import logits, pad, token_ids

# The newest Qwen, and models whose towers are built in other ways.
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
}


def build(model_type, changes=None):
    model_class = getattr(transformers, CLASSES[model_type])
    torch.manual_seed(0)
    model = model_class(tiny(model_class.config_class, OF_ONE_TYPE.get(model_type, {}) | (changes or {})))
    model.set_experts_implementation("eager")
    return lively(model).double().eval()


@pytest.fixture(autouse=True)
def in_float64():
    with InFloat64():
        yield


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
    assert relative(found, expected) < 1e-9
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_around_a_picture(side):
    """Qwen3-VL: positions have three axes then, and the tower's output is added in several layers."""
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    stock = build("qwen3_vl", tokens)
    ids = token_ids(batch=1, length=40) % 77 + 20
    ids[:, 10:16] = torch.tensor([7, 5, 5, 5, 5, 8])
    ids, mask = pad(ids, 5, side)
    tower = stock.config.vision_config
    size = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    generator = torch.Generator().manual_seed(0)
    given = {
        "pixel_values": torch.randn(16, size, dtype=torch.float64, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 5).long(),
    }
    model, real = copy.deepcopy(stock), mask.bool()
    handle = patch_model(model)
    found = logits(model, ids, attention_mask=mask, use_cache=False, **given)[real]
    without = logits(model, ids, attention_mask=mask, use_cache=False)[real]
    expected = reference(copy.deepcopy(stock), list(handle.patched), ids, mask, position_ids=None, **given)[real]
    assert relative(found, expected) < 1e-9 and relative(found, without) > 1e-3
    with handle.disabled():
        before = logits(stock, ids, attention_mask=mask, use_cache=False, **given)
        assert torch.equal(logits(model, ids, attention_mask=mask, use_cache=False, **given), before)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [5, 6, 7, 8]}
    options |= {"attention_mask": mask, **given}
    expected = model.generate(ids, **options, use_cache=False)
    for cache in ({}, {cache_argument(model): handle.cache()}):
        assert torch.equal(model.generate(ids, **options, **cache), expected)
