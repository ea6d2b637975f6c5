"""Which models are patched: those in modules of users, in modular pipelines and beside ControlNets; by classes of any file."""

import sys
import types

import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline, WanTransformer3DModel
from diffusers.modular_pipelines import WanBlocks, WanModularPipeline
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from qat_patch import get_handle, patch_model, unpatch_model
from support.families.diffusers_image_families import FAMILIES
from support.models.lively_wan import tiny_wan, velocity
from support.models.tiny_qwen3 import logits, tiny_qwen3, token_ids

QWEN_IMAGE = next(family for family in FAMILIES if family.name == "Qwen-Image")


def test_a_module_around_several_models_is_refused_by_name():
    wan, qwen3 = tiny_wan(), tiny_qwen3()
    trainer = torch.nn.ModuleDict({"transformer": wan, "inner": torch.nn.ModuleDict({"text": qwen3})})
    message = (
        r"expected a module around one model, got a ModuleDict around 2: transformer \(WanTransformer3DModel\), inner.text "
        r"\(Qwen3ForCausalLM\); patch those that you mean"
    )
    with pytest.raises(ValueError, match=message):
        patch_model(trainer)
    assert get_handle(wan) is get_handle(qwen3) is get_handle(trainer) is None
    handle = patch_model(trainer["transformer"])
    assert get_handle(trainer) is handle
    other = patch_model(qwen3)
    both = get_handle(trainer)
    assert both.models == [wan, qwen3]
    assert list(both.patched) == [f"transformer.{name}" for name in handle.patched] + [f"inner.text.{n}" for n in other.patched]
    with both.disabled():
        assert not any(layer.enabled for layer in both.patched.values())
    unpatch_model(trainer)
    assert get_handle(wan) is get_handle(qwen3) is None
    twice = torch.nn.ModuleDict({"a": wan, "b": torch.nn.Sequential(wan)})  # one model under two names
    assert patch_model(twice).models == [wan]


def test_a_name_is_no_model_yet():
    with pytest.raises(ValueError, match="got 'Qwen/Qwen3-0.6B'; load the model first"):
        patch_model("Qwen/Qwen3-0.6B")


def test_modular_pipelines():
    pipe = WanModularPipeline(blocks=WanBlocks())
    with pytest.raises(ValueError, match="or a diffusers pipeline with a transformer, got .*WanModularPipeline"):
        patch_model(pipe)
    pipe.update_components(transformer=tiny_wan())
    assert next(iter(patch_model(pipe).patched)) == "transformer.blocks.0.attn1"
    unpatch_model(pipe)
    assert get_handle(pipe) is None


def test_the_receipt_names_a_controlnet_that_is_left_alone():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
    controlnet = QwenImageControlNetModel(in_channels=4, out_channels=1, num_layers=1, **sizes)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipe = QwenImageControlNetPipeline(**parts, transformer=QWEN_IMAGE.build(), controlnet=controlnet)
    handle = patch_model(pipe)
    assert handle.models == [pipe.transformer]
    assert "  not patched  controlnet: patch_model(pipe.controlnet) patches this QwenImageControlNetModel" in str(handle)
    assert list(patch_model(pipe.controlnet).patched) == ["transformer_blocks.0.attn"]
    assert "not patched" not in str(get_handle(pipe))


class OwnWan(WanTransformer3DModel):
    pass


class OwnQwen3(Qwen3ForCausalLM):
    pass


class OwnAttention(Qwen3Attention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


HUB = """
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import (ALL_ATTENTION_FUNCTIONS, Qwen3Attention, apply_rotary_pos_emb,
                                                      eager_attention_forward as original)

def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    out, weights = original(module, query, key, value, attention_mask, scaling, **kwargs)
    return 2 * out, weights  # what only this file knows

class HubAttention(Qwen3Attention):
    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape[:-2], -1)), weights

class HubModel(Qwen3ForCausalLM):
    pass
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A modelling file as transformers takes it from the Hub: imported under a name of its own."""
    module = types.ModuleType("transformers_modules.somebody.modeling_hub")
    module.__file__ = str(tmp_path / "modeling_hub.py")
    (tmp_path / "modeling_hub.py").write_text(HUB)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(HUB, module.__file__, "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", ["subclass", "hub"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_language_models_whose_classes_stand_anywhere(kind, implementation, hub, calls):
    model, ids = tiny_qwen3(), token_ids()
    model.__class__, attention = (OwnQwen3, OwnAttention) if kind == "subclass" else (hub.HubModel, hub.HubAttention)
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    model.set_attn_implementation(implementation)
    before = logits(model, ids, use_cache=False)
    handle = patch_model(model)
    assert not torch.equal(logits(model, ids, use_cache=False), before) and len(calls) == 3
    assert str(handle).count("reached") == 3
    with handle.disabled():
        assert torch.equal(logits(model, ids, use_cache=False), before)
    unpatch_model(model)
    assert torch.equal(logits(model, ids, use_cache=False), before)


def test_diffusers_models_whose_class_stands_anywhere():
    model = tiny_wan()
    before = velocity(model)
    model.__class__ = OwnWan
    handle = patch_model(model)
    assert not torch.equal(velocity(model), before)
    with handle.disabled():
        assert torch.equal(velocity(model), before)
