"""patch_model on Wan transformers: what changes, what does not, and the way back."""

import copy
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from qat_kernels import attention
from qat_patch import AttnQATConfig, QuantSpec, calibrate, get_handle, patch_model, unpatch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_patch.metadata import AttentionMetadata
from support.families.families import relative
from support.models.lively_wan import LAYERS, SPECS, processors, same_objects, sdpa, tiny_wan, velocity, wan_inputs

pytestmark = pytest.mark.usefixtures("default_backend_stays")


@pytest.mark.parametrize(("i2v", "calls_per_block"), [(False, 2), (True, 3)], ids=["t2v", "i2v"])
def test_patch_and_unpatch_is_bit_equal(i2v, calls_per_block, calls):
    model, other = tiny_wan(i2v), tiny_wan(i2v, seed=5)
    before, before_other = velocity(model), velocity(other)
    stock = processors(model)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    default = _AttentionBackendRegistry.get_active_backend()

    handle = patch_model(model)
    assert get_handle(model) is handle
    assert handle.models == [model]
    assert 1e-3 < relative(velocity(model), before) < 0.5
    assert len(calls) == LAYERS * calls_per_block
    assert sorted({call["k"].shape[2] for call in calls}) == sorted({36, 512} | ({257} if i2v else set()))
    assert list(model.state_dict()) == list(state)
    with handle.disabled():
        assert torch.equal(velocity(model), before)
    assert not torch.equal(velocity(model), before)
    calls.clear()
    assert _AttentionBackendRegistry.get_active_backend() == default
    assert torch.equal(velocity(other), before_other)
    assert torch.equal(velocity(tiny_wan(i2v, seed=5)), before_other)
    assert not calls

    unpatch_model(model)
    assert get_handle(model) is None
    assert same_objects(processors(model), stock)
    assert torch.equal(velocity(model), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_our_backend_around_sdpa_is_bit_equal(i2v, monkeypatch):
    """Layouts, scale and dtypes: with the quantization taken out of our backend, what is left is stock attention."""
    model = tiny_wan(i2v)
    before = velocity(model)
    patch_model(model)
    assert not torch.equal(velocity(model), before)
    monkeypatch.setattr(diffusers_adapter, "attention", sdpa)
    assert torch.equal(velocity(model), before)


class DenseProcessor:
    """Wan's attention written out, through `qat_kernels.attention` and without the dispatcher."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        def heads(x):
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        def rope(x, cos, sin):
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = cos[..., ::2].transpose(1, 2), sin[..., 1::2].transpose(1, 2)
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        image, text = (context[:, :-512], context[:, -512:]) if attn.add_k_proj is not None else (None, context)
        query, key = heads(attn.norm_q(attn.to_q(hidden_states))), heads(attn.norm_k(attn.to_k(text)))
        if rotary_emb is not None:
            query, key = rope(query, *rotary_emb), rope(key, *rotary_emb)
        out = attention(query, key, heads(attn.to_v(text)))
        if image is not None:
            out = out + attention(query, heads(attn.norm_added_k(attn.add_k_proj(image))), heads(attn.add_v_proj(image)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_same_numbers_as_a_processor_of_our_own(i2v):
    patched, dense = tiny_wan(i2v), tiny_wan(i2v)
    patch_model(patched)
    dense.set_attn_processor(DenseProcessor())
    assert relative(velocity(patched), velocity(dense)) < 1e-6


@pytest.mark.parametrize(
    ("include", "lengths"),
    [(("*",), {36, 257, 512}), (("*.attn1",), {36}), (("*.attn2",), {257, 512}), (("blocks.0.attn1",), {36})],
)
def test_self_cross_or_all(include, lengths, calls):
    model = tiny_wan(i2v=True)
    stock = processors(model)
    handle = patch_model(model, AttnQATConfig(include=include))
    velocity(model)
    assert {call["k"].shape[2] for call in calls} == lengths
    assert len(calls) == sum({"attn1": 1, "attn2": 2}[name.split(".")[-1]] for name in handle.patched)
    assert handle.patched.keys() | handle.skipped.keys() == stock.keys()
    assert all(processors(model)[name] is stock[name] for name in handle.skipped)
    assert all(f"{name}: " in str(handle) for name in stock)


def test_two_models_are_patched_differently():
    one, two = tiny_wan(), tiny_wan()
    before = velocity(one)
    alone = {}
    for spec in (SPECS[0], SPECS[-1]):
        with patch_model(one, AttnQATConfig(spec=spec)):
            alone[spec] = velocity(one)
    assert not torch.equal(alone[SPECS[0]], alone[SPECS[-1]])
    patch_model(one, AttnQATConfig(spec=SPECS[0]))
    patch_model(two, AttnQATConfig(spec=SPECS[-1]))
    assert torch.equal(velocity(one), alone[SPECS[0]])
    assert torch.equal(velocity(two), alone[SPECS[-1]])
    unpatch_model(one)
    assert torch.equal(velocity(one), before)
    assert torch.equal(velocity(two), alone[SPECS[-1]])


def test_deep_copy_is_patched_and_unpatches_alone():
    model = tiny_wan()
    before = velocity(model)
    handle = patch_model(model)
    patched = velocity(model)
    clone = copy.deepcopy(model)
    assert torch.equal(velocity(clone), patched)
    with get_handle(clone).disabled():
        assert torch.equal(velocity(clone), before)
        assert torch.equal(velocity(model), patched)
    unpatch_model(clone)
    assert torch.equal(velocity(clone), before)
    assert torch.equal(velocity(model), patched)
    assert get_handle(model) is handle


def test_copied_and_pickled_processors_keep_their_layer():
    model = tiny_wan()
    patch_model(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = get_handle(clone).patched
        assert all(clone.get_submodule(name).processor._attention_backend is layer for name, layer in layers.items())
        assert torch.equal(velocity(clone), velocity(model))


def test_what_a_processor_was_set_to_comes_back():
    model = tiny_wan()
    shared = WanAttnProcessor()
    shared._attention_backend = AttentionBackendName._NATIVE_MATH
    model.set_attn_processor(shared)
    before = velocity(model)
    handle = patch_model(model, AttnQATConfig(include=["*.attn1"]))
    assert {name for name, processor in processors(model).items() if processor is shared} == set(handle.skipped)
    with handle.disabled():
        assert torch.equal(velocity(model), before)
    unpatch_model(model)
    assert all(processor is shared for processor in processors(model).values())
    assert shared._attention_backend is AttentionBackendName._NATIVE_MATH


def test_another_backend_set_after_the_patch_does_not_override_it_silently():
    model = tiny_wan()
    stock = processors(model)
    handle = patch_model(model, AttnQATConfig(include=["*.attn1"]))
    patched = velocity(model)
    for override in (lambda: model.set_attention_backend("_native_math"), model.reset_attention_backend):
        with pytest.raises(ValueError, match="blocks.0.attn1 runs the 4-bit attention of patch_model.*call unpatch_model first"):
            override()
    assert torch.equal(velocity(model), patched)
    assert "LOST" not in str(handle)
    model.blocks[1].attn1.set_processor(WanAttnProcessor())
    assert "blocks.1.attn1: nvfp4 - LOST: WanAttnProcessor was put in its place" in str(handle)
    unpatch_model(model)
    assert same_objects(processors(model), stock)
    model.set_attention_backend("_native_math")
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_an_old_handle_does_nothing():
    model = tiny_wan()
    stock = processors(model)
    with patch_model(model) as handle, handle.disabled():
        unpatch_model(model)
    assert same_objects(processors(model), stock)
    with patch_model(model):
        unpatch_model(model)
        second = patch_model(model, AttnQATConfig(include=["*.attn1"]))
    assert get_handle(model) is second


def test_config_of_an_export_is_found(tmp_path):
    config = AttnQATConfig(spec=QuantSpec(rotate=True), include=["*.attn1"])
    model = tiny_wan()
    block = AttentionMetadata(
        config=config, specs=dict.fromkeys(("blocks.0.attn1", "blocks.1.attn1"), config.spec), package_version="0.1.0"
    )
    model.register_to_config(attention_quantization=block.to_dict())
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert patch_model(loaded).config == config
    assert patch_model(tiny_wan()).config == AttnQATConfig()


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_training_step_with_gradient_checkpointing(i2v, calls):
    def gradients(model):
        model.zero_grad()
        model(**wan_inputs(i2v)).sample.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = tiny_wan(i2v).train()
    stock = gradients(model)
    patch_model(model)
    plain = gradients(model)
    forward = len(calls)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model)
    assert len(calls) == 3 * forward
    assert plain.keys() == checkpointed.keys() == stock.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == stock[name].any(), name
        assert torch.equal(gradient, checkpointed[name]), name
    assert not torch.equal(plain["blocks.0.attn1.to_q.weight"], stock["blocks.0.attn1.to_q.weight"])
    assert sum(gradient.any() for gradient in plain.values()) > 0.9 * len(plain)


def test_compiled_in_one_graph():
    model = tiny_wan(i2v=True)
    stock = velocity(model)
    handle = patch_model(model)
    patched = velocity(model)
    assert not torch.equal(patched, stock)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(velocity(compiled), patched) < 1e-6
    assert get_handle(compiled) is handle
    calibrate(compiled, [wan_inputs(i2v=True)])  # runs eagerly
    assert len(handle.k_shift) == 2 and len(handle.q_shift) == 4
    shifted = velocity(model)
    assert not torch.equal(shifted, patched)
    assert relative(velocity(compiled), shifted) < 1e-6
    for layer in handle.patched.values():
        layer.k_shift = layer.q_shift = None
    with get_handle(compiled).disabled():
        assert relative(velocity(compiled), stock) < 1e-6
    assert relative(velocity(compiled), patched) < 1e-6


@pytest.mark.gpu
def test_cuda_autocast_leaves_no_float32_query(calls):
    """There RMSNorm runs in float32: queries and keys arrive in float32, values in bfloat16."""
    model = tiny_wan().cuda().train()
    patch_model(model)
    inputs = {name: x.cuda() for name, x in wan_inputs(i2v=False).items()}
    with torch.autocast("cuda", torch.bfloat16):
        model(**inputs).sample.square().mean().backward()
    assert {call[name].dtype for call in calls for name in "qkv"} == {torch.bfloat16}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
