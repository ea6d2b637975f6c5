"""Autoregressive video with a rolling cache of keys and values, as Diffusers has it: SANA-WM's refiner.

Blocks of frames attend to a sink, to the frames before them in a window, and to themselves. The cache is the host's and stays as
it is: its keys and values are those of the stock model, and 4-bit attention reads all of them at once.
"""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from qat_patch import patch_model
from support.families import every_transformer
from support.families.diffusers_classes import sana_wm_refiner
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


def test_blocks_are_the_oracles():
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
