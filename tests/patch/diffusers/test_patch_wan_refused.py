"""What patch_model refuses of Diffusers: unknown versions, models that it cannot patch or has patched already."""

import diffusers
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from qat_patch import AttnQATConfig, get_handle, patch_model, unpatch_model
from support.models.lively_wan import processors, same_objects, tiny_wan, tiny_wan_pipeline
from support.models.tiny_wan import tiny_transformer

pytestmark = pytest.mark.usefixtures("default_backend_stays")


def test_unknown_versions_of_diffusers_are_refused(monkeypatch):
    model = tiny_wan()
    stock = processors(model)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "__version__", "0.43.0")
        with pytest.raises(ValueError, match="expected diffusers 0.42.*got 0.43.0; install"):
            patch_model(model)
    assert get_handle(model) is None
    assert same_objects(processors(model), stock)


def test_nothing_to_patch():
    cog = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=8)
    with pytest.raises(ValueError, match="nothing to patch in CogVideoX.*AttnProcessor2_0 does not go through diffusers'"):
        patch_model(cog)
    pipe = tiny_wan_pipeline()
    with pytest.raises(ValueError, match="found no attention in AutoencoderKLWan"):
        patch_model(pipe.vae)
    pipe.transformer = None
    with pytest.raises(ValueError, match="or a diffusers pipeline with a transformer, got .*WanPipeline"):
        patch_model(pipe)
    with pytest.raises(ValueError, match="expected a model of transformers or diffusers"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to patch in WanTransformer3DModel.*excluded by"):
        patch_model(tiny_wan(), AttnQATConfig(exclude=["*"]))


def test_refused_models():
    model = tiny_wan()
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)
    patch_model(model)
    with pytest.raises(ValueError, match="this model is patched already"):
        patch_model(model)
    with pytest.raises(ValueError, match="the pattern 'transformer.*' matches no attention module"):
        patch_model(tiny_wan_pipeline(), AttnQATConfig(include=["transformer.*"]))
    with pytest.raises(ValueError, match="blocks.0.attn1 and 3 more: head_dim 24; expected a multiple of 16"):
        patch_model(tiny_transformer(head_dim=24))

    by_hand = tiny_wan()
    by_hand.blocks[0].attn1.set_processor(model.blocks[0].attn1.processor)
    with pytest.raises(ValueError, match="belongs to a patched model"):
        patch_model(by_hand)
