"""patch_model on Wan: what changes, what does not, and the way back."""

import configparser
import copy
import inspect
import itertools
import pickle
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from packaging.requirements import Requirement

from qat_kernels import attention
from qat_patch import AttnQATConfig, QuantSpec, calibrate, diffusers_adapter, get_handle, patch_model, unpatch_model
from qat_patch.block import AttentionBlock
from qat_patch.layer import AttentionLayer
from tiny_wan import CHANNELS, IMAGE_DIM, TEXT_DIM, tiny_pipeline, tiny_transformer

SPECS = [
    QuantSpec(pv=pv, rotate=rotate, four_over_six=four_over_six)
    for pv, rotate, four_over_six in itertools.product(("nvfp4", "bf16"), (False, True), (False, True))
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


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def sdpa(q, k, v, *, scale, causal, key_mask, **_):
    mask = None if key_mask is None else key_mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


def processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def same_objects(a, b):
    return list(a) == list(b) and all(a[name] is b[name] for name in a)


@pytest.fixture(autouse=True)
def _default_backend_stays():
    before = _AttentionBackendRegistry.get_active_backend()
    yield
    assert _AttentionBackendRegistry.get_active_backend() == before


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of 4-bit attention."""
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append(kwargs | {"q": q, "k": k, "v": v})
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(diffusers_adapter, "attention", spy)
    return seen


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


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_pipeline(i2v, calls):
    pipe = tiny_wan_pipeline(i2v)
    before = sample(pipe, whole=True)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    states = {name: copy.deepcopy(part.state_dict()) for name, part in models.items()}
    stock = processors(pipe.transformer)

    handle = patch_model(pipe)
    assert handle.models == [pipe.transformer]
    assert list(handle.patched) == [f"transformer.{name}" for name in stock]
    assert [name for name, part in models.items() if any("_qat_handle" in vars(m) for m in part.modules())] == ["transformer"]
    assert 1e-5 < relative(sample(pipe, whole=True), before) < 0.5
    assert len(calls) == 2 * 2 * LAYERS * (3 if i2v else 2)  # steps, guidance
    with get_handle(pipe).disabled():
        assert torch.equal(sample(pipe, whole=True), before)

    unpatch_model(pipe)
    assert get_handle(pipe) is get_handle(pipe.transformer) is None
    assert same_objects(processors(pipe.transformer), stock)
    assert torch.equal(sample(pipe, whole=True), before)
    for name, part in models.items():
        assert list(part.state_dict()) == list(states[name])
        assert all(torch.equal(x, states[name][key]) for key, x in part.state_dict().items())


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_wan_2_2_has_two_transformers(i2v, calls):
    pipe = tiny_wan_pipeline(i2v, two_transformers=True)
    before = sample(pipe)
    stock = {"transformer": processors(pipe.transformer), "transformer_2": processors(pipe.transformer_2)}
    handle = patch_model(pipe, AttnQATConfig(include=["blocks.*.attn1"]))
    assert list(handle.patched) == [f"{part}.blocks.{i}.attn1" for part in stock for i in range(LAYERS)]
    patched = sample(pipe)
    assert len(calls) == 2 * 2 * LAYERS
    assert not torch.equal(patched, before)
    with handle.disabled():
        assert torch.equal(sample(pipe), before)

    # Each has a handle of its own: a copy of one does not copy the other, and one can go back alone.
    clone = copy.deepcopy(pipe.transformer)
    assert get_handle(clone).models == [clone]
    unpatch_model(pipe.transformer)
    assert get_handle(pipe).models == [pipe.transformer_2]
    with pytest.raises(ValueError, match="transformer_2 is patched already"):
        patch_model(pipe)
    assert get_handle(pipe.transformer) is None
    with handle.disabled():  # the older handle does not patch it again
        pass
    assert same_objects(processors(pipe.transformer), stock["transformer"])
    unpatch_model(pipe)
    assert same_objects(processors(pipe.transformer_2), stock["transformer_2"])
    assert torch.equal(sample(pipe), before)
    pipe.transformer, pipe.transformer_2 = None, pipe.transformer
    assert patch_model(pipe).models == [pipe.transformer_2]


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


@pytest.mark.parametrize("two_transformers", [False, True])
def test_a_failure_half_way_undoes_everything(two_transformers, monkeypatch):
    pipe = tiny_wan_pipeline(two_transformers=two_transformers)
    models = [pipe.transformer, *([pipe.transformer_2] if two_transformers else [])]
    stock = [processors(model) for model in models]
    fine = [diffusers_adapter._patched] * (LAYERS * 2 * len(models) - 1)

    def fail(processor, layer):
        if not fine:
            assert not any(same_objects(processors(model), before) for model, before in zip(models, stock, strict=True))
            raise RuntimeError("half-way")
        return fine.pop()(processor, layer)

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_adapter, "_patched", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            patch_model(pipe)
    assert get_handle(pipe) is None
    assert all(same_objects(processors(model), before) for model, before in zip(models, stock, strict=True))
    patch_model(pipe)


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
    shifted = velocity(model)
    assert not torch.equal(shifted, patched)
    assert relative(velocity(compiled), shifted) < 1e-6
    for layer in handle.patched.values():
        layer.k_shift = None
    with get_handle(compiled).disabled():
        assert relative(velocity(compiled), stock) < 1e-6
    assert relative(velocity(compiled), patched) < 1e-6


def qkv(batch=2, queries=40, keys=53, heads=4, key_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, 32), (batch, keys, key_heads, 32), (batch, keys, key_heads, 32)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def dispatch(q, k, v, mask=None, spec=SPECS[0], k_shift=None, **kwargs):
    layer = AttentionLayer(name="blocks.0.attn1", spec=spec, original=None, k_shift=k_shift)
    return diffusers_adapter._knowing_layers(dispatch_attention_fn)(q, k, v, mask, backend=layer, **kwargs)


def direct(q, k, v, **kwargs):
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), **kwargs).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 53), (1, 53), (2, 1, 1, 53), (1, 1, 1, 53), (2, 4, 1, 53)])
@pytest.mark.parametrize("excluded", [False, -10000.0, -torch.inf])
def test_key_mask(shape, excluded):
    q, k, v = qkv()
    allowed = torch.rand(shape[0], 53, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = allowed.view(shape[0], *[1] * (len(shape) - 2), 53).expand(shape).contiguous()
    if excluded is not False:
        mask = torch.zeros(shape, dtype=torch.bfloat16).masked_fill(~mask, excluded)
    out = dispatch(q, k, v, mask)
    assert torch.equal(out, direct(q, k, v, key_mask=allowed.expand(2, 53)))
    assert not torch.equal(out, dispatch(q, k, v))
    k[~allowed.expand(2, 53)] = torch.nan
    assert torch.equal(dispatch(q, k, v, mask), out)


def test_outer_product_of_what_is_no_padding():
    """As HunyuanVideo 1.5 masks: padding sees nothing and is not seen."""
    q, k, v = qkv(queries=53)
    allowed = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) < 0.7
    outer = (allowed[:, :, None] & allowed[:, None])[:, None]
    out = dispatch(q, k, v, outer)
    assert torch.equal(out[allowed], direct(q, k, v, key_mask=allowed)[allowed])
    assert not out[~allowed].any()


def test_masks_are_checked_inside_a_graph():
    run = torch.compile(dispatch, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 1, 53).masked_fill(torch.arange(53) > 40, -10000.0)
    assert torch.equal(run(q, k, v, mask), dispatch(q, k, v, mask))
    with pytest.raises(RuntimeError, match="expected a key mask, got an additive mask with other values"):
        run(q, k, v, mask / 100)


def test_causal_scale_groups_of_heads_and_contiguity():
    q, k, v = qkv(keys=40, key_heads=2)
    out = dispatch(q, k, v, enable_gqa=True, is_causal=True, scale=0.3)
    assert torch.equal(out, direct(q, k, v, causal=True, scale=0.3))
    assert out.is_contiguous()
    q, k, v = qkv()
    fused = torch.cat([k, v], dim=2).chunk(2, dim=2)  # as fuse_qkv_projections leaves them
    assert not fused[0].is_contiguous()
    assert torch.equal(dispatch(q, *fused), dispatch(q, k, v))


def test_autocast_casts_what_arrives_in_other_dtypes():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatch(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, direct(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize(
    ("mask", "kwargs", "message"),
    [
        (None, {"dropout_p": 0.1}, "dropout_p: expected 0, got 0.1"),
        (None, {"is_causal": True}, "as many queries as keys, got 40 queries and 53 keys"),
        (None, {"attention_kwargs": {"return_lse": True}}, "return_lse"),
        (
            torch.full((2, 1, 1, 53), -1.0),
            {},
            r"a key mask \[2, 1, 1, 53\] or \[2, 53\].* got an additive mask with other",
        ),
        (torch.eye(4, 53, dtype=torch.bool).expand(2, 1, 4, 53).mT.mT.transpose(1, 2), {}, "got another mask for each head"),
        (torch.ones(2, 1, 40, 53, dtype=torch.bool).tril(), {}, "got another mask for each query"),
        (torch.ones(2, 1, 39, 53, dtype=torch.bool), {}, r"got torch.bool \(2, 1, 39, 53\)"),
        (torch.ones(40, 53, dtype=torch.bool), {}, r"got torch.bool \(40, 53\)"),
    ],
)
def test_refused_arguments(mask, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dispatch(*qkv(), mask, **kwargs)


def test_every_argument_of_the_dispatcher_is_declared():
    ours = inspect.signature(diffusers_adapter._knowing_layers(dispatch_attention_fn), follow_wrapped=False).parameters
    assert list(ours) == list(inspect.signature(dispatch_attention_fn).parameters)


def test_what_comes_without_a_layer_goes_to_the_stock_dispatcher():
    wrapped = diffusers_adapter._knowing_layers(dispatch_attention_fn)
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 53, dtype=torch.bool)
    for backend in (None, "native", AttentionBackendName._NATIVE_MATH):
        stock = dispatch_attention_fn(q, k, v, mask, scale=0.3, backend=backend)
        assert torch.equal(wrapped(q, k, v, mask, scale=0.3, backend=backend), stock)
    patch_model(tiny_wan())
    first = vars(transformer_wan)["dispatch_attention_fn"]
    patch_model(tiny_wan())
    assert vars(transformer_wan)["dispatch_attention_fn"] is first  # wrapped once


def test_each_spec_and_shift_reaches_attention():
    shift = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    outputs = []
    for spec in SPECS:
        outputs.append(dispatch(*qkv(), spec=spec, k_shift=shift))
        assert torch.equal(outputs[-1], direct(*qkv(), spec=spec, k_shift=shift))
        assert not torch.equal(outputs[-1], direct(*qkv(), spec=spec))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_another_backend_set_after_the_patch_is_no_silent_override():
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
    assert "blocks.1.attn1: QK nvfp4, PV nvfp4 - LOST: WanAttnProcessor was put in its place" in str(handle)
    unpatch_model(model)
    assert same_objects(processors(model), stock)
    model.set_attention_backend("_native_math")
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_copied_and_pickled_processors_keep_their_layer():
    model = tiny_wan()
    patch_model(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = get_handle(clone).patched
        assert all(clone.get_submodule(name).processor._attention_backend is layer for name, layer in layers.items())
        assert torch.equal(velocity(clone), velocity(model))


def test_unknown_versions_of_diffusers_are_refused(monkeypatch):
    model = tiny_wan()
    stock = processors(model)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "__version__", "0.43.0")
        with pytest.raises(ValueError, match="expected diffusers 0.42.*got 0.43.0; install"):
            patch_model(model)
    assert get_handle(model) is None
    assert same_objects(processors(model), stock)


def test_supported_versions_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    extra = [Requirement(line) for line in setup["options.extras_require"]["wan"].strip().splitlines()]
    pinned = next(requirement.specifier for requirement in extra if requirement.name == "diffusers")
    admitted = [f"0.{minor}" for minor in range(30, 60) if f"0.{minor}.1" in pinned]
    assert admitted == list(diffusers_adapter.SUPPORTED_VERSIONS)


def test_config_of_an_export_is_found(tmp_path):
    config = AttnQATConfig(spec=QuantSpec(rotate=True), include=["*.attn1"])
    model = tiny_wan()
    block = AttentionBlock(
        config=config, specs=dict.fromkeys(("blocks.0.attn1", "blocks.1.attn1"), config.spec), package_version="0.1.0"
    )
    model.register_to_config(attention_quantization=block.to_dict())
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert patch_model(loaded).config == config
    assert patch_model(tiny_wan()).config == AttnQATConfig()


def tiny_hunyuan():
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def test_another_model_of_the_dispatcher_with_key_masks(calls, monkeypatch):
    model = tiny_hunyuan()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
        "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]]),
        "guidance": torch.tensor([6.0]),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        handle = patch_model(model)
        assert not torch.equal(model(**inputs).sample, before)
        monkeypatch.setattr(diffusers_adapter, "attention", sdpa)
        assert torch.equal(model(**inputs).sample, before)
    assert len(handle.patched) == len(calls) == 2
    assert all(call["key_mask"].sum() == 32 + 6 for call in calls)
    assert len(handle.skipped) == 1
    assert "does not go through diffusers' attention dispatcher" in next(iter(handle.skipped.values()))


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


@pytest.fixture
def steps_in_4_bits(calls):
    """Runs a pipeline and returns which of its steps ran 4-bit attention."""

    def run(pipe, callback, steps=5):
        counts = [len(calls)]

        def count(*args):
            counts.append(len(calls))
            return callback(*args)

        sample(pipe, steps=steps, callback=count)
        return [step for step, (a, b) in enumerate(itertools.pairwise(counts)) if b > a]

    return run


@pytest.mark.parametrize(
    ("first", "last", "two_transformers", "expected"),
    [(2, 1, False, [2, 3]), (1, 2, True, [1, 2]), (0, 2, False, [0, 1, 2]), (4, 0, False, [4]), (0, 0, False, [0, 1, 2, 3, 4])],
)
def test_original_steps(first, last, two_transformers, expected, steps_in_4_bits):
    pipe = tiny_wan_pipeline(two_transformers=two_transformers)
    handle = patch_model(pipe)
    with handle.original_steps(first=first, last=last) as callback:
        assert steps_in_4_bits(pipe, callback) == expected
        assert steps_in_4_bits(pipe, callback) == expected  # a second call of the pipeline begins anew
    assert all(layer.enabled for layer in handle.patched.values())
    assert steps_in_4_bits(pipe, lambda pipe, step, timestep, tensors: tensors) == [0, 1, 2, 3, 4]


def test_original_steps_give_the_original_numbers():
    pipe = tiny_wan_pipeline()
    seen = {}

    def latents_after_step(name, callback=lambda pipe, step, timestep, tensors: tensors):
        def keep(pipe, step, timestep, tensors):
            seen[name, step] = tensors["latents"].clone()
            return callback(pipe, step, timestep, tensors)

        sample(pipe, steps=4, callback=keep)

    latents_after_step("stock")
    handle = patch_model(pipe)
    latents_after_step("patched")
    with handle.original_steps(first=2) as callback:
        latents_after_step("mixed", callback)
    assert torch.equal(seen["mixed", 1], seen["stock", 1])
    assert not torch.equal(seen["mixed", 2], seen["stock", 2])
    assert not torch.equal(seen["patched", 0], seen["stock", 0])


def test_original_steps_leave_the_state_as_it_was(steps_in_4_bits):
    pipe = tiny_wan_pipeline()
    stock = processors(pipe.transformer)
    handle = patch_model(pipe)

    def ours():
        return [layer.enabled for layer in handle.patched.values()] == [True] * (2 * LAYERS) and not any(
            processor is stock[name] for name, processor in processors(pipe.transformer).items()
        )

    with pytest.raises(RuntimeError, match="in the middle"), handle.original_steps(first=1):
        assert not ours()
        raise RuntimeError("in the middle")
    assert ours()
    with handle.disabled(), handle.original_steps(first=1) as callback:
        assert steps_in_4_bits(pipe, callback) == []
    assert ours()
    too_many = pytest.raises(ValueError, match="expected fewer than the 3 steps of this call, got first=2 and last=1")
    with too_many, handle.original_steps(first=2, last=1) as callback:
        steps_in_4_bits(pipe, callback, steps=3)
    assert ours()
    with pytest.raises(ValueError, match="the callback was not called"), handle.original_steps(first=1):
        sample(pipe)
    assert ours()
    for numbers in ({"first": -1}, {"last": -2}, {"first": 1.5}):
        with pytest.raises(ValueError, match="expected numbers of steps from 0 up"), handle.original_steps(**numbers):
            raise AssertionError("must not get here")


@pytest.mark.gpu
def test_model_cpu_offload():
    pipe = tiny_wan_pipeline()
    handle = patch_model(pipe)
    calibrate(pipe.transformer, [wan_inputs(i2v=False)])
    expected = sample(pipe)
    pipe.enable_model_cpu_offload()
    assert relative(sample(pipe).cpu(), expected) < 0.05
    assert {shift.device.type for shift in handle.k_shift.values()} == {"cuda"}
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert torch.equal(sample(pipe), expected)


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
