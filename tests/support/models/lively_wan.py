"""Wan models whose attention matters, and what tests of patched ones do with them."""

import itertools

import torch

from qat_patch import QuantSpec
from support.models.tiny_wan import CHANNELS, IMAGE_DIM, TEXT_DIM, tiny_pipeline, tiny_transformer

SPECS = [
    QuantSpec(preset=preset, rotate=rotate, four_over_six=four_over_six)
    for preset, rotate, four_over_six in itertools.product(("nvfp4", "nvfp4_qk"), (False, True), (False, True))
]
LAYERS = 2


def lively(model):
    """As initialized, attention is next to uniform and its output next to nothing: no error of it would show."""
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            torch.nn.init.constant_(attn.norm_q.weight, 2.0)
            torch.nn.init.normal_(attn.to_v.weight, std=0.5)
    return model


def tiny_wan(i2v=False, seed=0):
    return lively(tiny_transformer(i2v, layers=LAYERS, head_dim=32, seed=seed))


def tiny_wan_pipeline(i2v=False, two_transformers=False):
    pipe = tiny_pipeline(i2v, transformer_2=two_transformers, layers=LAYERS, head_dim=32)
    lively(pipe.transformer)
    if two_transformers:
        lively(pipe.transformer_2)
        pipe.register_to_config(boundary_ratio=0.9)  # so that of two steps each transformer gets one
    return pipe


def wan_inputs(i2v, batch=2):
    """What a pipeline passes: 3 x 4 x 3 = 36 video tokens, 512 text tokens, and the 257 image tokens of I2V."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch, 3 * CHANNELS if i2v else CHANNELS, 3, 8, 6, generator=generator),
        "timestep": torch.tensor([700, 300])[:batch],
        "encoder_hidden_states": torch.randn(batch, 512, TEXT_DIM, generator=generator),
    }
    if i2v:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 257, IMAGE_DIM, generator=generator)
    return inputs


def velocity(model):
    with torch.no_grad():
        return model(**wan_inputs(model.config.image_dim is not None)).sample


def sample(pipe, *, steps=2, callback=None, whole=False):
    """Latents from text embeddings; the `whole` pipeline makes a video [1, 5, 3, 32, 32] of a prompt, and takes longer.

    With guidance: each step calls a transformer twice.
    """
    generator = torch.Generator().manual_seed(0)
    if whole:
        inputs = {"prompt": "a red square", "negative_prompt": "black ground", "output_type": "pt"}
    else:
        # Wan's processor takes the last 512 keys of image to video for text.
        shape = (1, 512 if "image_encoder" in pipe.components else 20, TEXT_DIM)
        # Where the pipeline computes, as its own text encoder would leave them: Wan moves time embeddings to them.
        names, device = ("prompt_embeds", "negative_prompt_embeds"), pipe._execution_device
        inputs = {name: torch.randn(shape, generator=generator).to(device) for name in names}
        inputs["output_type"] = "latent"
    if "image_encoder" in pipe.components:
        inputs["image"] = torch.rand(1, 3, 32, 32, generator=generator)
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": steps, "generator": generator}
    return pipe(**inputs, **options, callback_on_step_end=callback).frames


def sdpa(q, k, v, *, scale, causal, key_mask, bounds=None, **_):
    mask = None if key_mask is None else key_mask[:, None, None]
    if bounds is not None:
        lower, upper = (bound[:, None, :, None] for bound in bounds)
        place = torch.arange(k.shape[2])
        inside = (lower <= place) & (place <= upper)
        mask = inside if mask is None else inside & mask
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


def processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def same_objects(a, b):
    return list(a) == list(b) and all(a[name] is b[name] for name in a)
