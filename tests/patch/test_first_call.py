"""The receipt says what calls did: the first one of each module is checked, and every action asks what is in force."""

import copy
import pickle

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from qat_patch import calibrate, export_checkpoint, get_handle, patch_model, sensitivity, unpatch_model
from qat_patch.first_call import FirstCall
from support.models.lively_wan import tiny_wan, velocity
from support.models.tiny_qwen3 import logits, tiny_qwen3, token_ids

NAME = "model.layers.1.self_attn"
MASK = {"use_cache": False, "attention_mask": torch.ones(2, 50, dtype=torch.long)}


def statuses(handle):
    return [line.rpartition(" - ")[2] for line in str(handle).splitlines()[1:]]


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    found = [hook for module in model.modules() for kind in kinds for hook in vars(module)[kind].values()]
    return [hook for hook in found if isinstance(hook, FirstCall)]


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_wan])
def test_calls_are_reported_and_later_ones_meet_no_hook(build):
    def run(model):
        return velocity(model) if build is tiny_wan else logits(model, token_ids())

    model = build()
    handle = patch_model(model)
    layers = len(handle.patched)
    assert statuses(handle) == ["not yet called"] * layers
    assert len(hooks(model)) == 2 * layers
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with handle.disabled():
        run(model)
    assert statuses(handle) == ["not yet called"] * layers
    with handle.observed(lambda layer, call: None):
        run(model)
    assert statuses(handle) == ["not yet called"] * layers
    out = run(model)
    assert statuses(handle) == ["reached"] * layers
    assert not hooks(model)
    for clone in copies:  # checked for themselves
        assert statuses(get_handle(clone)) == ["not yet called"] * layers
        assert torch.equal(run(clone), out)
        assert statuses(get_handle(clone)) == ["reached"] * layers and not hooks(clone)
    second = build()
    patch_model(second)
    unpatch_model(second)
    assert not hooks(second)
    assert {name: set(vars(module)) for name, module in second.named_modules()} == {
        name: set(vars(module)) for name, module in build().named_modules()
    }


def test_a_failed_call_is_no_answer():
    model = tiny_qwen3()
    handle = patch_model(model)
    with pytest.raises(ValueError, match="softcap"):
        logits(model, token_ids(), softcap=30.0)
    assert statuses(handle) == ["not yet called"] * 3
    assert not any(layer.probed for layer in handle.patched.values())
    logits(model, token_ids())
    assert statuses(handle) == ["reached"] * 3


def replace_name(model):
    model.set_attn_implementation("sdpa")


def replace_in_config(model):
    model.config._attn_implementation = "eager"


def replace_inner(model):
    model.model.set_attn_implementation({"": "eager"})


def replace_module(model):
    other = tiny_qwen3()
    model.model.layers[0].self_attn = other.model.layers[0].self_attn


@pytest.mark.parametrize("replace", [replace_name, replace_in_config, replace_inner, replace_module])
def test_every_action_asks_what_is_in_force(replace, tmp_path):
    model, ids = tiny_qwen3(), token_ids()
    handle = patch_model(model)
    replace(model)
    assert "LOST" in str(handle)
    message = "model.layers.0.self_attn: expected 4-bit attention, got (sdpa|eager|Qwen3Attention), which was put in its place"
    actions = {
        "cache": handle.cache,
        "calibrate": lambda: calibrate(model, [ids]),
        "sensitivity": lambda: sensitivity(model, [ids]),
        "export_checkpoint": lambda: export_checkpoint(model, tmp_path / "export"),
    }
    for action, run in actions.items():
        with pytest.raises(ValueError, match=f"{action}: {message}"):
            run()
    assert not list(tmp_path.iterdir()) and handle.k_shift == {}
    unpatch_model(model)
    with pytest.raises(ValueError, match="cache: expected a patched model, got a Qwen3ForCausalLM that is no longer patched"):
        handle.cache()
    with pytest.raises(ValueError, match="calibrate: the model is not patched"):
        calibrate(model, [ids])


def test_no_action_mistakes_disabled_for_4_bits(tmp_path):
    model, ids = tiny_qwen3(), token_ids()
    handle = patch_model(model)
    for action in (lambda: calibrate(model, [ids]), lambda: export_checkpoint(model, tmp_path / "export")):
        with handle.disabled(), pytest.raises(ValueError, match="got original attention inside handle.disabled"):
            action()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("replace", [replace_name, replace_inner])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_lost_patch_raises_at_the_next_call(replace, called_before):
    model, ids = tiny_qwen3(), token_ids()
    handle = patch_model(model)
    ours = model.config._attn_implementation
    if called_before:
        logits(model, ids)
    replace(model)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"4-bit attention \(model.layers.0.self_attn\): expected a call.*(sdpa|eager) was put"
        ):
            logits(model, ids)
    model.set_attn_implementation(ours)
    logits(model, ids)
    assert statuses(handle) == ["reached"] * 3 and not hooks(model)


class OwnWay(Qwen3Attention):
    """Its code names the interface, and goes around it."""

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] > 9999:
            return super().forward(hidden_states, **kwargs)
        return hidden_states, None


def test_a_module_that_bypasses_the_interface_does_not_run_original_attention_silently():
    model, ids = tiny_qwen3(), token_ids()
    model.model.layers[1].self_attn.__class__ = OwnWay
    handle = patch_model(model)
    assert NAME in handle.patched
    with pytest.raises(
        ValueError, match=rf"4-bit attention \({NAME}\).*its OwnWay did not call transformers' AttentionInterface"
    ):
        logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="its OwnWay did not call transformers' AttentionInterface"):
        logits(compiled, ids, **MASK)
    with handle.disabled():
        logits(model, ids)


def test_compiled_calls_are_marked_and_the_check_adds_no_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = tiny_qwen3(), token_ids()
    handle = patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = logits(compiled, ids, **MASK)
    assert statuses(handle) == ["compiled"] * 3
    logits(model, ids, **MASK)  # not compiled
    assert statuses(handle) == ["reached"] * 3
    assert torch.equal(logits(compiled, ids, **MASK), out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    model = tiny_qwen3()
    patch_model(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(Exception, match="sdpa was put in its place after the patch"):
        logits(torch.compile(model, fullgraph=True, backend="aot_eager"), ids, **MASK)


def test_compiled_blocks_share_one_graph_and_all_are_marked():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_wan()
    handle = patch_model(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert statuses(handle) == ["not yet called"] * 4
    velocity(model)
    assert statuses(handle) == ["compiled"] * 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_of_transformers_share_their_graph_too():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = tiny_qwen3(), token_ids()
    patch_model(model)
    for block in model.model.layers:
        block.compile(backend="eager")
    out = logits(model, ids, use_cache=False)
    # torch.compile gives up after eight graphs, and models have more blocks than that.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(logits(model, ids, use_cache=False), out)
