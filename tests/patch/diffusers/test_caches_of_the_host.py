"""Caches of keys and values that models of Diffusers keep themselves: plain tensors, all of which 4-bit attention reads at once.

SANA-WM's refiner has a rolling one, for autoregressive video: blocks of frames attend to a sink, to the frames before them in a
window, and to themselves. Flux 2 keeps those of reference pictures from the first step.
"""

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from torch.utils._pytree import tree_map_only

from qat_patch import patch_model
from support.families import every_transformer
from support.families.diffusers_classes import sana_wm_refiner
from support.families.diffusers_image_families import image
from support.families.diffusers_reference import oracle_in
from support.families.families import relative

transformer = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm_refiner")
TOKENS, BLOCKS, WINDOW = 12, 4, 18
"""Of a block, in the video, and tokens of the history that are kept: no multiple of a group."""


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


def test_flux_2_is_the_oracle():
    stock, model = flux_2(), flux_2()
    before = reference_pictures(stock)
    handle = patch_model(model)
    found = reference_pictures(model)
    assert not handle.skipped and all(layer.reached for layer in handle.patched.values())
    with oracle_in(stock, list(handle.patched)):
        expected = reference_pictures(stock)
    for ours, wanted, plain in zip(found, expected, before, strict=True):
        assert relative(ours, wanted) < 1e-9 and relative(ours, plain) > 1e-3
    with handle.disabled():
        assert all(map(torch.equal, reference_pictures(model), before))


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
