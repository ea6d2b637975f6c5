"""`patch_model` on pipelines for video, modular ones too: the receipt says what ran, and what did not."""

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel, MiniMaxH3ModularPipeline
from diffusers.modular_pipelines import Ideogram4AutoBlocks, MiniMaxH3Blocks
from diffusers.modular_pipelines.wan_animate_2.modular_blocks_wan_animate_2 import WanAnimate2CoreDenoiseStep

from qat_patch import get_handle, patch_model, unpatch_model
from support.families import diffusers_classes
from support.families.families import lively, relative
from support.models import tiny_video_pipelines as pipelines

pytestmark = pytest.mark.usefixtures("default_backend_stays")


@pytest.mark.parametrize(
    ("make", "modules", "number_of_calls"),
    [
        (pipelines.first_and_last_frame, 4, 6),  # text and images each have a call of their own
        (pipelines.ti2v_5b, 4, 4),
        (pipelines.ti2v_5b_from_an_image, 4, 4),
        (pipelines.vace, 6, 6),
        (pipelines.animate, 6, 8),  # as from images, and the face
        (pipelines.modular_wan, 4, 8),  # with guidance
        (pipelines.minimax_h3, 3, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_receipt_of_a_pipeline_is_true(make, modules, number_of_calls, calls):
    pipe, run = make()
    before = run()
    handle = patch_model(pipe)
    assert handle.models == [pipe.transformer]
    assert len(handle.patched) == modules and not handle.skipped
    assert not any(layer.reached for layer in handle.patched.values())
    patched = run()
    assert len(calls) == number_of_calls
    assert all(layer.reached for layer in handle.patched.values())
    receipt = str(get_handle(pipe)).splitlines()
    assert sum(line.endswith("reached") for line in receipt) == modules
    assert "not patched" not in str(get_handle(pipe))
    assert 1e-4 < relative(patched, before) < 0.5
    with handle.disabled():
        assert torch.equal(run(), before)
    unpatch_model(pipe)
    assert torch.equal(run(), before) and get_handle(pipe) is None


def test_every_transformer_of_a_pipeline_is_patched():
    """MiniMax-H3 has one for text and keyframes, and one for references; Ideogram 4 one without a prompt."""
    pipe = MiniMaxH3Blocks().init_pipeline()
    assert isinstance(pipe, MiniMaxH3ModularPipeline)
    pipe.update_components(transformer=pipelines.minimax_h3_transformer(), transformer_ref=pipelines.minimax_h3_transformer())
    handle = patch_model(pipe)
    assert {id(model) for model in handle.models} == {id(pipe.transformer), id(pipe.transformer_ref)}
    assert {name.partition(".")[0] for name in handle.patched} == {"transformer", "transformer_ref"}
    with handle.disabled():
        assert not any(layer.enabled for layer in handle.patched.values())
    unpatch_model(pipe)
    assert get_handle(pipe.transformer) is get_handle(pipe.transformer_ref) is None

    settings = {key: diffusers_classes.SIZES[key] for key in ("num_attention_heads", "attention_head_dim", "num_layers")}
    both = {
        name: Ideogram4Transformer2DModel(
            **settings, in_channels=4, llm_features_dim=16, mrope_section=(4, 2, 2), intermediate_size=32, adaln_dim=16
        )
        for name in ("transformer", "unconditional_transformer")
    }
    pipe = Ideogram4AutoBlocks().init_pipeline()
    pipe.update_components(**both)
    assert {name.partition(".")[0] for name in patch_model(pipe).patched} == both.keys()


def test_the_receipt_says_what_flex_attention_keeps():
    """Wan Animate 2: the generation attends to references by a mask of flex attention."""
    torch.manual_seed(0)
    transformer, _ = diffusers_classes.tiny("WanAnimate2Transformer3DModel")
    pipe = WanAnimate2CoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=lively(transformer).eval())
    handle = patch_model(pipe)
    assert list(handle.patched) == [f"transformer.blocks.{block}.cross_attn" for block in range(2)]
    reason = "its WanAnimate2AttnProcessor names a backend of its own: 'flex'"
    assert handle.skipped == {f"transformer.blocks.{block}.self_attn": reason for block in range(2)}
    assert str(get_handle(pipe)).count(reason) == 2
