"""Vision-language models: their language model is patched, and the receipt lists the modules that are not."""

import copy

import pytest
import torch
import transformers

from qat_patch import patch_model, unpatch_model
from qat_patch.hosts.transformers.adapter import owns
from qat_patch.hosts.transformers.cache import cache_argument
from qat_patch.hosts.transformers.source import attention_code
from support.families.every_causal_lm import OF_ONE_TYPE, reference, tiny
from support.families.families import lively, relative
from support.families.in_float64 import InFloat64
from support.models.tiny_qwen3 import logits, pad, token_ids

NOT_CAUSAL = "not causal: only decoder self-attention is supported"
# The newest Qwen, and models whose towers are built in other ways, for pictures or for sound.
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
    "smolvlm": "SmolVLMForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
_IN_THREE_AXES = {"text_config": {"rope_parameters": _ROPE}, "vision_config": {"depth": 2, "out_hidden_size": 64}}
_GEMMA4_TOWER = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
_GEMMA4_TOWER |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
SIZES = OF_ONE_TYPE | dict.fromkeys(("glm4v", "glm4v_moe", "qwen2_5_vl"), _IN_THREE_AXES)
SIZES |= {"gemma4": OF_ONE_TYPE["gemma4"] | {"vision_config": _GEMMA4_TOWER}}
SIZES |= {"granite_speech": {"encoder_config": {"num_layers": 1}}}


def build(model_type, changes=None):
    model_class = getattr(transformers, CLASSES[model_type])
    torch.manual_seed(0)
    model = model_class(tiny(model_class.config_class, SIZES.get(model_type, {}) | (changes or {})))
    model.set_experts_implementation("eager")
    return lively(model).double().eval()


def towers_of(model):
    """The attention of encoders that goes through AttentionInterface, by name."""
    language = model.get_decoder()
    own = set(language.modules())
    return [name for name, x in model.named_modules() if x not in own and not owns(x) and attention_code(x) is not None]


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
    towers = towers_of(model)
    assert set(towers) == set(handle.skipped) and set(handle.skipped.values()) <= {NOT_CAUSAL}
    assert bool(towers) == (model_type != "got_ocr2")  # its encoder has attention of its own
    found = logits(model, ids, use_cache=False)
    assert relative(found, before) > 1e-4
    expected = reference(copy.deepcopy(stock), list(handle.patched), ids, torch.ones_like(ids))
    assert relative(found, expected) < 1e-9
    with handle.disabled():
        assert torch.equal(logits(model, ids, use_cache=False), before)
    unpatch_model(model)
    assert torch.equal(logits(model, ids, use_cache=False), before)


def test_the_tower_of_llama_4_is_named():
    """Its modules do not say that they are not causal. The stock model fails in its own forward pass."""
    config = transformers.Llama4ForConditionalGeneration.config_class
    model = transformers.Llama4ForConditionalGeneration(tiny(config, {"text_config": {"num_hidden_layers": 1}}))
    assert patch_model(model).skipped == dict.fromkeys(towers_of(model), NOT_CAUSAL) != {}


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
