"""Caches of keys and values that models of Diffusers keep themselves: plain tensors, all of which 4-bit attention reads at once.

SANA-WM's refiner has a rolling one, for autoregressive video: blocks of frames attend to a sink, to the frames before them in a
window, and to themselves. Flux 2 and GLM-Image keep those of reference pictures from the first step, Qwen-Image 2.1 those of
text and pictures.
"""

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch.utils._pytree import tree_map_only

from qat_patch import patch_model
from support.families import diffusers_classes, every_transformer
from support.families.diffusers_classes import sana_wm_refiner
from support.families.diffusers_image_families import image
from support.families.diffusers_reference import oracle_in
from support.families.families import relative

transformer = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm_refiner")
TOKENS, BLOCKS, WINDOW = 12, 4, 18
"""Of a block, in the video, and tokens of the history that are kept: no multiple of a group."""


def in_float64(x):
    return x.double() if x.is_floating_point() else x


def given(block):
    inputs = tree_map_only(torch.Tensor, torch.Tensor.double, sana_wm_refiner(block * TOKENS, TOKENS))
    generator = torch.Generator().manual_seed(block)
    latents = torch.randn(inputs["hidden_states"].shape, generator=generator, dtype=torch.float64)
    return inputs | {"hidden_states": latents, "return_dict": False}


def roll(model):
    """What each block becomes."""
    cache, outputs = transformer.SanaWMRefinerKVCache(len(model.transformer_blocks)), []
    with torch.no_grad():
        model(**given(0), kv_cache=cache, kv_cache_mode="capture_pre_rope")
        for layer in cache.layer_caches:
            layer.store_sink(*layer.get_captured_pre_rope())
        for block in range(BLOCKS):
            inputs = given(block)
            cache.sink_pe = given(max(block - 2, 0))["video_rotary_emb"]
            outputs.append(model(**inputs, kv_cache=cache, kv_cache_mode="inject")[0])
            model(**inputs, kv_cache=cache, kv_cache_mode="inject_and_capture_post_rope")
            for layer in cache.layer_caches:
                new, old = layer.get_captured_post_rope(), layer.get_history()
                both = new if old is None else [torch.cat(x, 1) for x in zip(old, new, strict=True)]
                layer.store_history(*(x[:, -WINDOW:] for x in both))
    return outputs


def reference_pictures(model):
    """The first step, with reference pictures, and one that finds them in the cache."""
    inputs = tree_map_only(torch.Tensor, torch.Tensor.double, image(ids=4) | {"guidance": torch.tensor([3.5])})
    shared = inputs | {"return_dict": False}
    new = {"hidden_states": inputs["hidden_states"][:, 5:], "img_ids": inputs["img_ids"][5:]}
    with torch.no_grad():
        first, cache = model(**shared, kv_cache_mode="extract", num_ref_tokens=5)
        return [first, model(**shared | new, kv_cache=cache, kv_cache_mode="cached")[0]]


def flux_2():
    model, _ = every_transformer.build("Flux2Transformer2DModel")
    for block in model.transformer_blocks:  # as its pipeline does
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def glm_image():
    return every_transformer.build("GlmImageTransformer2DModel")[0]


def in_each_mode(model):
    """The keys and values of the prompt are written, read, and passed over."""
    inputs = tree_map_only(torch.Tensor, in_float64, diffusers_classes.tiny("GlmImageTransformer2DModel")[1]())
    cache, outputs = GlmImageKVCache(num_layers=model.config.num_layers), []
    with torch.no_grad():
        for mode in ("write", "read", "skip"):
            cache.set_mode(mode)
            outputs.append(model(**inputs, kv_caches=cache, return_dict=False)[0])
    return outputs


def qwen_image():
    return every_transformer.build("QwenImage21Transformer2DModel")[0]


def text_and_picture(model):
    """Two prompts, one of them padded, with a picture in the middle: one call for all, and one that finds them in the cache."""
    generator = torch.Generator().manual_seed(0)
    width = diffusers_classes.tiny("QwenImage21Transformer2DModel")[1]()["encoder_hidden_states"].shape[-1]
    picture = [True] * 4
    words = torch.ones(2, 24)
    words[1, -3:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 32, 4, dtype=torch.float64, generator=generator),
        "encoder_hidden_states": torch.randn(2, 24, width, dtype=torch.float64, generator=generator),
        "encoder_hidden_states_mask": words,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 5 + picture + [False] * 15 + picture] * 2),
        "return_dict": False,
    }
    cache = QwenImage21KVCache(len(model.transformer_blocks))
    with torch.no_grad():
        return [model(**inputs, kv_cache=cache, kv_cache_mode=mode)[0] for mode in ("extract", "cached")]


@pytest.mark.parametrize(
    ("build", "run"),
    [(flux_2, reference_pictures), (glm_image, in_each_mode), (qwen_image, text_and_picture)],
    ids=["flux_2", "glm", "qwen"],
)
def test_what_was_kept_is_the_oracles(build, run):
    stock, model = build(), build()
    before = run(stock)
    handle = patch_model(model)
    found = run(model)
    assert not handle.skipped and all(layer.reached for layer in handle.patched.values())
    with oracle_in(stock, list(handle.patched)):
        expected = run(stock)
    for ours, wanted, plain in zip(found, expected, before, strict=True):
        assert relative(ours, wanted) < 1e-9 and relative(ours, plain) > 1e-3
    with handle.disabled():
        assert all(map(torch.equal, run(model), before))


def test_blocks_of_frames_are_the_oracles():
    torch.manual_seed(0)
    stock, _ = every_transformer.build("SanaWMLTX2RefinerTransformer3DModel")
    model, _ = every_transformer.build("SanaWMLTX2RefinerTransformer3DModel")
    before = roll(stock)
    handle = patch_model(model)
    called = [name for name in handle.patched if "audio" not in name]
    found = roll(model)
    assert {name for name, layer in handle.patched.items() if layer.reached} == set(called)
    with oracle_in(stock, called):
        expected = roll(stock)
    for ours, wanted, plain in zip(found, expected, before, strict=True):
        assert relative(ours, wanted) < 1e-9 and relative(ours, plain) > 1e-3
    with handle.disabled():
        assert all(map(torch.equal, roll(model), before))
