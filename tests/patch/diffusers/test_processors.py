"""Processors of every kind: users' own, of IP adapters, with a backend of their own: patched, skipped or refused."""

import copy
import pickle

import diffusers.models.attention_dispatch as dispatch_module
import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_kandinsky6_sr import Kandinsky6SRAttnProcessor
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2AttnProcessor

from qat_patch import AttnQATConfig, calibrate, get_handle, patch_model, unpatch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from support.families.diffusers_image_families import FAMILIES
from support.families.families import lively, relative
from support.models.lively_wan import processors, tiny_wan, velocity, wan_inputs

pytestmark = pytest.mark.usefixtures("default_backend_stays")
FLUX = next(family for family in FAMILIES if family.name == "Flux")


def heads(attn, hidden_states, context):
    context = hidden_states if context is None else context
    parts = (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context))
    return [x.unflatten(2, (attn.heads, -1)) for x in parts]


class ThroughSuper(WanAttnProcessor):
    def __call__(self, attn, *args, **kwargs):
        return 2 * super().__call__(attn, *args, **kwargs)


class ThroughTheBase(WanAttnProcessor):
    def __call__(self, attn, *args, **kwargs):
        return WanAttnProcessor.__call__(self, attn, *args, **kwargs)


class AsAttribute:
    _attention_backend = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        q, k, v = heads(attn, hidden_states, encoder_hidden_states)
        return attn.to_out[0](dispatch_module.dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2))


class ImportedInside(AsAttribute):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        from diffusers.models.attention_dispatch import dispatch_attention_fn as attend

        q, k, v = heads(attn, hidden_states, encoder_hidden_states)
        return attn.to_out[0](attend(q, k, v, backend=self._attention_backend).flatten(2))


def helper(attn, q, k, v, backend):
    return attn.to_out[0](aliased(q, k, v, backend=backend).flatten(2))


class ThroughAHelper(AsAttribute):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        return helper(attn, *heads(attn, hidden_states, encoder_hidden_states), self._attention_backend)


class WithoutBackend(AsAttribute):
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        q, k, v = heads(attn, hidden_states, encoder_hidden_states)
        out = dispatch_module.dispatch_attention_fn(q, k, v, backend=None, parallel_config=self._parallel_config)
        return attn.to_out[0](out.flatten(2))


aliased = dispatch_module.dispatch_attention_fn


@pytest.mark.parametrize(
    "kind",
    [ThroughSuper, ThroughTheBase, AsAttribute, ImportedInside, ThroughAHelper, WithoutBackend],
    ids=lambda kind: kind.__name__,
)
def test_processors_of_users(kind, calls):
    model = tiny_wan()
    model.set_attn_processor({name: kind() for name in model.attn_processors})
    before = velocity(model)
    handle = patch_model(model)
    patched = velocity(model)
    assert len(calls) == len(handle.patched) == 4
    assert 1e-3 < relative(patched, before) < 0.5
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(velocity(clone), patched)
    with handle.disabled():
        assert torch.equal(velocity(model), before)
    unpatch_model(model)
    assert torch.equal(velocity(model), before)


class OverridesAll(WanAttnProcessor):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


class Around:
    _attention_backend = None

    def __init__(self):
        self.inner = WanAttnProcessor()

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", [OverridesAll, Around])
def test_what_does_not_reach_the_dispatcher_by_its_code_is_skipped(kind):
    model = tiny_wan()
    model.blocks[0].attn1.set_processor(kind())
    handle = patch_model(model)
    assert handle.skipped == {"blocks.0.attn1": f"its {kind.__name__} does not go through diffusers' attention dispatcher"}


class IgnoresItsBackend(AsAttribute):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        q, k, v = heads(attn, hidden_states, encoder_hidden_states)
        return attn.to_out[0](dispatch_module.dispatch_attention_fn(q, k, v, backend=None).flatten(2))


class ComputesItsBackend(AsAttribute):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args):
        q, k, v = heads(attn, hidden_states, encoder_hidden_states)
        backend = "_".join(("", "native", "math"))
        out = dispatch_module.dispatch_attention_fn(q, k, v, backend=backend, parallel_config=self._parallel_config)
        return attn.to_out[0](out.flatten(2))


def test_what_bypasses_the_patch_at_run_time_raises():
    for kind, message in (
        (IgnoresItsBackend, "its IgnoresItsBackend computed attention without its backend"),
        (ComputesItsBackend, "backend: expected that of the processor, got '_native_math'; exclude this module"),
    ):
        model = tiny_wan()
        model.blocks[1].attn2.set_processor(kind())
        handle = patch_model(model)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"4-bit attention \(blocks.1.attn2\).*{message}"):
                velocity(model)
        with pytest.raises(Exception, match=message):
            velocity(torch.compile(model, backend="aot_eager", fullgraph=True))
        assert handle.patched["blocks.0.attn1"].reached and not handle.patched["blocks.1.attn2"].reached


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (QwenImage21FlexAttnProcessor, "names a backend of its own: 'flex'"),
        (WanAnimate2AttnProcessor, "names a backend of its own: 'flex'"),
        (Kandinsky6SRAttnProcessor, "names a backend of its own: 'flex'"),
        (CosmosAttnProcessor2_0, "passes no backend on to diffusers' attention dispatcher"),
        (AnyFlowCausalAttnProcessor, "is made for the backend 'flex'"),
        (AceStepAttnProcessor2_0, "asks which backend is set, in _get_current_attention_backend"),
    ],
)
def test_processors_whose_code_shows_that_no_patch_can_work(kind, reason):
    module = torch.nn.Module()
    module.processor = object.__new__(kind)
    assert diffusers_adapter.reason_to_skip(module) == f"its {kind.__name__} {reason}"


def qwen_image_21():
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": 16, "axes_dims_rope": (4, 6, 6)}
    return lively(QwenImage21Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, **sizes)).eval()


def qwen_image_21_inputs(text=7):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * text + [True] * 4]),
    }


def test_a_processor_that_passes_no_backend_on_and_a_causal_mask(calls, monkeypatch):
    """Qwen-Image 2.1: text attends to itself, causally; the image to all; both calls come with backend=None."""
    model = qwen_image_21()
    with torch.no_grad():
        before = model(**qwen_image_21_inputs()).sample
        handle = patch_model(model)
        assert 1e-3 < relative(model(**qwen_image_21_inputs()).sample, before) < 0.5
        assert [(call["q"].shape[2], call["causal"], call["key_mask"]) for call in calls] == [
            (7, True, None),
            (16, False, None),
        ] * 2
        with handle.disabled():
            assert torch.equal(model(**qwen_image_21_inputs()).sample, before)
        unpatch_model(model)
        assert torch.equal(model(**qwen_image_21_inputs()).sample, before)
        model.set_attn_processor(QwenImage21FlexAttnProcessor())
        with pytest.raises(ValueError, match="nothing to patch.*names a backend of its own: 'flex'"):
            patch_model(model)


class Identity(torch.nn.Module):
    def forward(self, x):
        return x


def with_ip_adapter(model):
    torch.manual_seed(3)
    model.encoder_hid_proj = Identity()
    new = {
        name: processor if name.startswith("single") else lively(FluxIPAdapterAttnProcessor(32, 16))
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(new)
    return model


def flux(model):
    images = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(**FLUX.inputs(), joint_attention_kwargs={"ip_adapter_image_embeds": [images]}).sample


def test_ip_adapters_are_patched_with_the_model(calls):
    model = with_ip_adapter(FLUX.build())
    before, state = flux(model), {name: x.clone() for name, x in model.state_dict().items()}
    handle = patch_model(model)
    patched = flux(model)
    assert len(handle.patched) == 3 and len(calls) == 4  # the adapter attends to its image by itself
    assert relative(patched, before) > 1e-3
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(flux(clone), patched) and list(clone.state_dict()) == list(state)
    images = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(1, 4, 16)]}}
    with pytest.raises(ValueError, match="transformer_blocks.0.attn attends to several sets of keys"):
        calibrate(model, [FLUX.inputs() | images], shifts=("k_shift",))
    calibrate(model, [FLUX.inputs() | images])
    handle = get_handle(model)
    assert handle.q_shift.keys() - handle.k_shift.keys() == {"transformer_blocks.0.attn"}
    unpatch_model(model)
    assert torch.equal(flux(model), before)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_ip_adapters_in_a_patched_model_do_not_remove_the_patch_silently():
    model = FLUX.patched()
    with torch.no_grad():
        model(**FLUX.inputs())
    single = model.single_transformer_blocks[0].attn.processor
    with pytest.raises(ValueError, match="got that of a FluxAttnProcessor whose module runs the 4-bit attention of patch_model"):
        single.__class__()  # as diffusers' loader builds the processors of single blocks
    with_ip_adapter(model)
    with pytest.raises(ValueError, match="FluxIPAdapterAttnProcessor was put in its place after the patch; call unpatch_model"):
        flux(model)
    assert "LOST" in str(get_handle(model))


def test_what_is_known_of_a_class_is_known_of_its_patched_one():
    model = tiny_wan()
    stock = type(model.blocks[0].attn1.processor)
    known = {stock: "something"}
    patch_model(model)
    patched = type(model.blocks[0].attn1.processor)
    assert patched is not stock and known[patched] == "something"
    assert patched == stock and stock == patched and patched in (stock,) and patched != torch.nn.Module
    assert isinstance(model.blocks[0].attn1.processor, stock)


def test_backends_are_refused_whole():
    """Also those of modules that the patch leaves out: nothing has changed when the error comes."""
    model = tiny_wan()
    handle = patch_model(model, AttnQATConfig(exclude_first_blocks=1))
    for call, got in (
        (lambda: model.set_attention_backend("_native_math"), "'_native_math'"),
        (model.reset_attention_backend, "a reset"),
    ):
        for context in (handle.disabled(), handle.observed(print)):
            with context, pytest.raises(ValueError, match=f"blocks.1.attn1 runs the 4-bit attention of patch_model.*got {got}"):
                call()
        with pytest.raises(ValueError, match="call unpatch_model first"):
            call()
    with pytest.raises(ValueError, match="blocks.1.attn2 runs the 4-bit attention of patch_model"):
        model.blocks[1].attn2.set_attention_backend("_native_math")
    assert {processor._attention_backend for name, processor in processors(model).items() if "blocks.0" in name} == {None}
    clone = copy.deepcopy(model)
    unpatch_model(model)
    model.reset_attention_backend()
    with pytest.raises(ValueError, match="blocks.1.attn1 runs"):
        clone.reset_attention_backend()


def test_two_sets_of_keys_are_seen_however_attention_is_called():
    model = tiny_wan(i2v=True)
    handle = patch_model(model)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="blocks.0.attn2 attends to several sets"):
            calibrate(model, [wan_inputs(i2v=True)], shifts=("k_shift",))
        calibrate(model, [wan_inputs(i2v=True)])
    assert handle.q_shift.keys() - handle.k_shift.keys() == {"blocks.0.attn2", "blocks.1.attn2"}
    plain = tiny_wan()
    patch_model(plain)  # other texts in other calls are no other sets of keys
    batches = [wan_inputs(False), wan_inputs(False) | {"encoder_hidden_states": torch.randn(2, 512, 32)}]
    calibrate(plain, batches)
    assert len(get_handle(plain).k_shift) == 4
