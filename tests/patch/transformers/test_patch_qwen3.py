"""patch_model on Transformers language models: what changes, what does not, and the way back."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from qat_patch import AttnQATConfig, QuantSpec, get_handle, patch_model, unpatch_model
from support.families.families import relative
from support.models.tiny_qwen3 import checkpoint_activations, logits, pad, tiny_llama, tiny_qwen3, token_ids


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_patch_and_unpatch_is_bit_equal(build, implementation, calls):
    model, ids = build(), token_ids()
    model.set_attn_implementation(implementation)
    padded, mask = pad(ids, 5, "left")
    before, before_padded = logits(model, ids), logits(model, padded, attention_mask=mask)
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    state = {name: x.clone() for name, x in model.state_dict().items()}

    handle = patch_model(model)
    assert 1e-3 < relative(logits(model, ids), before) < 0.5
    assert len(calls) == model.config.num_hidden_layers
    assert list(model.state_dict()) == list(state)
    with handle.disabled():
        assert torch.equal(logits(model, ids), before)
        assert torch.equal(logits(model, padded, attention_mask=mask), before_padded)
        again = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(again, generated)
    assert not torch.equal(logits(model, ids), before)

    unpatch_model(model)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, padded, attention_mask=mask), before_padded)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert get_handle(model) is None
    assert not any(key.startswith("_qat") for module in model.modules() for key in module.__dict__)


def test_receipt_names_every_module():
    model = tiny_qwen3()
    handle = patch_model(model, AttnQATConfig(exclude=["model.layers.1.*"], spec=QuantSpec(rotate=True, preset="nvfp4_qk")))
    assert list(handle.patched) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert handle.skipped == {"model.layers.1.self_attn": "excluded by 'model.layers.1.*'"}
    receipt = str(handle)
    assert "4-bit attention in 2 of 3 attention modules" in receipt
    for name in (*handle.patched, *handle.skipped):
        assert name in receipt
    assert "nvfp4_qk, rotate" in receipt
    assert get_handle(model) is handle


def test_receipt_says_what_was_replaced_after_the_patch():
    model = tiny_qwen3()
    handle = patch_model(model)
    assert "LOST" not in str(handle)
    model.set_attn_implementation("sdpa")
    assert "model.layers.1.self_attn: nvfp4 - LOST: sdpa was put in its place after the patch" in str(handle)


def test_every_layer_has_its_own_spec(calls):
    model = tiny_qwen3()
    patch_model(
        model, AttnQATConfig(overrides={"*.0.self_attn": QuantSpec(preset="nvfp4_qk"), "*.[12].*": QuantSpec(rotate=True)})
    )
    logits(model, token_ids())
    assert [call["spec"] for call in calls] == [QuantSpec(preset="nvfp4_qk"), QuantSpec(rotate=True), QuantSpec(rotate=True)]
    with pytest.raises(ValueError, match="applies to no patched module"):
        patch_model(tiny_qwen3(), AttnQATConfig(exclude_first_blocks=1, overrides={"*.0.*": QuantSpec(preset="nvfp4_qk")}))


def test_excluded_layers_run_the_original_attention(calls):
    ids, padded, mask = token_ids(), *pad(token_ids(), 5, "right")
    for implementation in ("sdpa", "eager"):
        model = tiny_qwen3()
        model.set_attn_implementation(implementation)
        captured = {}

        def capture(module, args, output, into=captured):
            into[module.layer_idx] = output[0].detach()

        hooks = [layer.self_attn.register_forward_hook(capture) for layer in model.model.layers]
        logits(model, ids), logits(model, padded, attention_mask=mask)
        first = captured[0]
        patch_model(model, AttnQATConfig(include=["*.1.*", "*.2.*"]))
        calls.clear()
        logits(model, padded, attention_mask=mask)
        assert len(calls) == 2
        assert torch.equal(captured[0], first)
        for hook in hooks:
            hook.remove()


def test_two_models_in_one_process_are_independent(calls):
    first, second, third = tiny_qwen3(seed=1), tiny_qwen3(seed=2), tiny_qwen3(seed=3)
    ids = token_ids()
    stock = logits(third, ids)
    patch_model(first, AttnQATConfig(spec=QuantSpec(rotate=True)))
    patch_model(second, AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk"), exclude=["*.0.*"]))
    logits(first, ids)
    assert [call["spec"] for call in calls] == [QuantSpec(rotate=True)] * 3
    calls.clear()
    logits(second, ids)
    assert [call["spec"] for call in calls] == [QuantSpec(preset="nvfp4_qk")] * 2
    calls.clear()
    assert torch.equal(logits(third, ids), stock)
    assert not calls
    unpatch_model(first)
    logits(second, ids)
    assert len(calls) == 2


def test_a_shared_config_object_does_not_leak_the_patch(calls):
    model = tiny_qwen3()
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    ids = token_ids()
    stock = logits(twin, ids)
    shared = model.config is twin.config
    patch_model(model)
    assert torch.equal(logits(twin, ids), stock)
    assert not calls
    if shared:
        with pytest.raises(ValueError, match="config already names 4-bit attention"):
            patch_model(twin)


def test_deep_copy_is_patched_and_unpatches_alone():
    model, ids = tiny_qwen3(), token_ids()
    before = logits(model, ids)
    handle = patch_model(model)
    patched = logits(model, ids)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone, ids), patched)
    with get_handle(clone).disabled():
        assert torch.equal(logits(clone, ids), before)
        assert torch.equal(logits(model, ids), patched)
    unpatch_model(clone)
    assert torch.equal(logits(clone, ids), before)
    assert torch.equal(logits(model, ids), patched)
    assert get_handle(model) is handle


def test_context_manager_and_wrappers():
    model, ids = tiny_qwen3(), token_ids()
    before = logits(model, ids)
    wrapped = torch.nn.Sequential(model)
    with patch_model(wrapped) as handle:
        assert get_handle(model) is get_handle(wrapped) is handle
        with handle.disabled(), handle.disabled():
            pass
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_a_failure_half_way_undoes_everything(monkeypatch):
    model, ids = tiny_qwen3(), token_ids()
    before = logits(model, ids)

    def fail(*args, **kwargs):
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(AttentionMaskInterface, "register", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            patch_model(model)
    assert get_handle(model) is None
    assert torch.equal(logits(model, ids), before)
    patch_model(model)


def test_training_step_reaches_every_parameter():
    model, ids = tiny_qwen3().train(), token_ids()
    patch_model(model)
    checkpoint_activations(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.norm() > 0, name


def test_autocast_casts_query_key_and_value(calls):
    model, ids = tiny_qwen3(), token_ids()
    patch_model(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, ids, use_cache=False)
    assert {call[name].dtype for call in calls for name in "qkv"} == {torch.bfloat16}


def test_compile_without_graph_breaks():
    model, ids = tiny_qwen3(), token_ids()
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Without a mask transformers cannot rule out packed samples while tracing, and asks for a block mask.
    arguments = {"use_cache": False, "attention_mask": torch.ones_like(ids)}
    assert relative(logits(compiled, ids, **arguments), logits(model, ids, **arguments)) < 1e-6
    with pytest.raises(Exception, match="inside torch.compile pass attention_mask"):
        logits(compiled, ids, use_cache=False)


def test_another_implementation_is_what_runs_where_the_patch_is_off(calls):
    """Whichever the model was loaded with, in layers that are left out and inside `disabled`, with masks of its own."""
    seen = []

    def mask(batch_size, **kwargs):
        return "the mask of another"

    def forward(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, module.config._attn_implementation, attention_mask))
        return query.transpose(1, 2), None

    AttentionInterface.register("attention_of_another", forward)
    AttentionMaskInterface.register("attention_of_another", mask)
    model, ids = tiny_qwen3(), token_ids()
    model.set_attn_implementation("attention_of_another")
    handle = patch_model(model, AttnQATConfig(exclude=["*.1.*"]))
    with handle.disabled():
        logits(model, ids)
    stock = [(layer, "attention_of_another", "the mask of another") for layer in range(3)]
    assert seen == stock and not calls
    logits(model, ids)
    assert seen[3:] == [stock[1]] and len(calls) == 2
    unpatch_model(model)
    logits(model, ids)
    assert seen[4:] == stock and len(calls) == 2
