"""Pipelines: parts left out, classes of Diffusers' own pipelines, and parts that could not be loaded."""

import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from qat_patch import export_checkpoint, get_handle, load_checkpoint, patch_model, verify_checkpoint
from support.models.exports import velocity
from support.models.tiny_wan import tiny_pipeline, tiny_transformer, tiny_vae


def test_parts_that_were_left_out(tmp_path):
    pipe = tiny_pipeline(layers=1)
    pipe.register_modules(text_encoder=None, tokenizer=None, vae=None)
    patch_model(pipe)
    export_checkpoint(pipe, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.text_encoder is None and torch.equal(velocity(loaded.transformer), velocity(pipe.transformer))
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "out")) == 2


def test_classes_of_the_pipelines_of_diffusers(tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "num_learnable_registers": None}
    heads = {f"{kind}_connector_{name}": x for kind in ("video", "audio") for name, x in sizes.items()}
    audio = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16}
    transformer = LTX2VideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        num_layers=1,
        audio_cross_attention_dim=32,
        caption_channels=16,
        **audio,
    )
    connectors = LTX2TextConnectors(caption_channels=8, text_proj_in_factor=2, **heads)
    nothing = dict.fromkeys(["vae", "audio_vae", "text_encoder", "tokenizer", "vocoder"])
    pipe = LTX2Pipeline(**nothing, scheduler=FlowMatchEulerDiscreteScheduler(), connectors=connectors, transformer=transformer)
    patch_model(pipe)
    export_checkpoint(pipe, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert type(loaded.connectors) is LTX2TextConnectors and get_handle(loaded).specs == get_handle(pipe).specs


class OwnVae(type(tiny_vae())):
    """A class of the user's."""


def test_a_part_that_could_not_be_loaded(tmp_path):
    pipe = tiny_pipeline(layers=1)
    vae = OwnVae.from_config(pipe.vae.config)
    pipe.register_modules(vae=vae)
    patch_model(pipe)
    with pytest.raises(ValueError, match=r"export_checkpoint: vae: expected a class of diffusers or transformers, got .*OwnVae"):
        export_checkpoint(pipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_which_component_it_is(tmp_path):
    model = tiny_transformer(layers=1)
    patch_model(model)
    for wrong in ("vae", "transformer_3"):
        with pytest.raises(
            ValueError,
            match="expected transformer or transformer_2 or transformer_ref or unconditional_transformer for a Diffusers",
        ):
            export_checkpoint(model, tmp_path / "out", component=wrong)
    assert not list(tmp_path.iterdir())
    export_checkpoint(model, tmp_path / "out", component="transformer_2")
    assert "for the component `transformer_2`" in (tmp_path / "out" / "README.md").read_text()
    # A loaded export says so again.
    assert get_handle(load_checkpoint(tmp_path / "out")) is not None


def test_cards_of_image_models(tmp_path):
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 0, "num_attention_heads": 2, "attention_head_dim": 16}
    model = FluxTransformer2DModel(**sizes, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6)).eval()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    assert "pipeline_tag: text-to-image" in (tmp_path / "out" / "README.md").read_text()
    wan = tiny_transformer(i2v=True, layers=1)
    patch_model(wan)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    export_checkpoint(wan, tmp_path / "wan", base_model=str(tmp_path / "base"))
    card = (tmp_path / "wan" / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "license: apache-2.0" in card and str(tmp_path) not in card


def test_a_plain_load_prints_no_message_of_ours_twice(tmp_path, caplog):
    """Loading a Diffusers model whose record lies in its config needs no message of this package."""
    model = tiny_transformer(layers=1)
    patch_model(model)
    model.save_pretrained(tmp_path / "out")
    with caplog.at_level(logging.WARNING, "qat_patch"):
        type(model).from_pretrained(tmp_path / "out")
    assert not [record for record in caplog.records if record.name.startswith("qat_patch")]
