"""4-bit attention computes what a call asks for, or refuses it by name; stock code runs wherever the patch is off."""

import copy

import pytest
import torch
import transformers
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import ALL_ATTENTION_FUNCTIONS, Qwen3Attention, eager_attention_forward

from qat_patch import AttnQATConfig, patch_model, unpatch_model
from support.families import every_causal_lm
from support.families.families import relative
from support.models.tiny_qwen3 import logits, pad, tiny_qwen3, token_ids


@pytest.mark.parametrize("asked", [{"block_indices": torch.zeros(2, 4)}, {"indices": [3]}, {"is_causal": False}, {"anything": 0}])
def test_an_argument_that_is_not_known_is_refused_by_name(asked):
    model = tiny_qwen3()
    handle = patch_model(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn.*{next(iter(asked))}"):
        logits(model, token_ids(), **asked)
    with handle.disabled():
        logits(model, token_ids(), **asked)


def test_arguments_that_ask_for_nothing_are_taken():
    model, ids = tiny_qwen3(), token_ids()
    patch_model(model)
    nothing = {"block_indices": None, "output_attentions": False, "is_causal": True, "num_items_in_batch": torch.tensor(7)}
    assert torch.equal(logits(model, ids, **nothing), logits(model, ids))


def test_a_module_that_stops_being_causal_is_refused():
    model = tiny_qwen3()
    patch_model(model)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\): is_causal=False"):
        logits(model, token_ids())


class Sparse(Qwen3Attention):
    """As DeepSeek V3.2 and MiniMax M3 have it: a choice of keys, by mask or by argument as the implementation's name says."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (x(hidden_states).view(shape).transpose(1, 2) for x in (self.q_proj, self.k_proj, self.v_proj))
        chosen = torch.arange(key.shape[2]) % 3 != 1
        if self.config._attn_implementation in ("eager", "sdpa"):
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
            attention_mask, chosen = (causal & chosen)[None, None].expand(len(query), -1, -1, -1), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, chosen_keys=chosen)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def with_layer(kind, layer=1):
    model = tiny_qwen3(torch.float64)
    model.model.layers[layer].self_attn.__class__ = kind
    return model


def test_sparse_attention_is_refused_at_once_and_exact_where_it_is_left_out():
    model, ids = with_layer(Sparse), token_ids()
    stock = copy.deepcopy(model)
    with pytest.raises(ValueError, match="its Sparse passes chosen_keys to attention, which is not known here"):
        patch_model(model)
    expected = logits(stock, ids)
    assert relative(expected, logits(tiny_qwen3(torch.float64), ids)) > 1e-3
    # The layer before it is left out too, so that what comes in is what the stock model has.
    handle = patch_model(model, AttnQATConfig(include=["*.2.self_attn"]))
    captured = []
    for each in (stock, model):
        each.model.layers[1].self_attn.register_forward_hook(lambda _, args, out: captured.append(out[0]))
        result = logits(each, ids)
    assert torch.equal(*captured) and relative(result, expected) > 1e-4
    with handle.disabled():
        assert torch.equal(logits(model, ids), expected)


class OwnMask(Qwen3Attention):
    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attention_mask = torch.cat([attention_mask, attention_mask], 1)
        return attend(self, hidden_states, hidden_states, hidden_states, attention_mask)


def test_a_module_that_makes_a_mask_of_its_own_is_refused_at_once():
    with pytest.raises(ValueError, match="its OwnMask makes a mask of its own: attention_mask = torch.cat"):
        patch_model(with_layer(OwnMask))


class OwnWay(Qwen3Attention):
    """Never asks the interface, but takes the mask that its model makes."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        values = hidden_states[:, None]
        causal = attention_mask is None
        out = torch.nn.functional.scaled_dot_product_attention(values, values, values, attn_mask=attention_mask, is_causal=causal)
        return out[:, 0], None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_module_with_its_own_attention_gets_the_masks_that_it_knows(implementation):
    """Layer 0, so that what comes in is what the stock model has."""
    model, (padded, mask) = with_layer(OwnWay, layer=0), pad(token_ids(), 5, "left")
    model.set_attn_implementation(implementation)
    captured = []
    model.model.layers[0].self_attn.register_forward_hook(lambda _, args, out: captured.append(out[0]))
    logits(model, padded, attention_mask=mask), logits(model, padded)
    handle = patch_model(model)
    assert list(handle.skipped) == ["model.layers.0.self_attn"]
    logits(model, padded, attention_mask=mask), logits(model, padded)
    assert torch.equal(captured[0], captured[2]) and torch.equal(captured[1], captured[3])


def test_names_of_implementations_come_back_one_by_one():
    """Of a model with parts that have their own, also while the patch is off; parts without patched modules keep theirs."""
    model = every_causal_lm.build("gemma3")
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    configs = [model.config, model.config.text_config, model.config.vision_config]
    names = [config._attn_implementation for config in configs]
    handle = patch_model(model, AttnQATConfig(exclude=["*.layers.0.self_attn"]))
    shared = model.model.language_model.layers[0].self_attn
    assert [config._attn_implementation for config in configs][2] == names[2]
    assert len({config._attn_implementation for config in configs} & set(names)) == 1
    assert shared.config._attn_implementation == "eager" and shared.config is not configs[1]
    with handle.disabled():
        assert [config._attn_implementation for config in configs] == names
        assert "LOST" not in str(handle)
    unpatch_model(model)
    assert [config._attn_implementation for config in configs] == names
    assert shared.config is configs[1]


@pytest.mark.parametrize("before", ["flash_attention_2", "kernels-community/flash-attn2", "paged|eager", "sdpa"])
def test_names_of_ours_are_not_taken_for_others(before):
    """Transformers looks for "flash" in a name, and for the signs of a repository."""
    model = tiny_qwen3()
    model.config._attn_implementation_internal = before
    handle = patch_model(model)
    name = model.config._attn_implementation
    assert name.startswith("qat_fp4_") and "flash" not in name and name.replace("_", "").isalnum()
    with handle.disabled():
        assert model.config._attn_implementation == before
    unpatch_model(model)
    assert model.config._attn_implementation == before


def test_gpt2_that_branches_by_the_name_of_eager():
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, reorder_and_upcast_attn=True)).eval()
    model.set_attn_implementation("eager")
    ids, first = token_ids(), []
    model.transformer.h[0].attn.register_forward_hook(lambda _, args, out: first.append(out[0]))
    stock = logits(model, ids)
    handle = patch_model(model, AttnQATConfig(include=["*.1.attn"]))
    assert relative(logits(model, ids), stock) > 1e-4
    with handle.disabled():
        assert torch.equal(logits(model, ids), stock)
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_may_be_a_module(rate):
    """Persimmon's attention_dropout is one."""
    model = every_causal_lm.build("persimmon")
    model.model.layers[1].self_attn.attention_dropout.p = rate
    if rate:
        with pytest.raises(ValueError, match=r"dropout \(0.1\); set it to 0 in the config"):
            patch_model(model)
    else:
        assert len(patch_model(model).patched) == 2


def test_an_observer_sees_the_original_attention_of_a_users_subclass(monkeypatch):
    """Its class stands in another file than the function that it calls for "eager"."""
    model, seen = with_layer(type("Mine", (Qwen3Attention,), {"__module__": __name__})), []
    model.set_attn_implementation("eager")
    monkeypatch.delattr(modeling_qwen3, "Mine", raising=False)
    stock = logits(model, token_ids())
    with patch_model(model).observed(lambda layer, call: seen.append(layer.name)):
        assert torch.equal(logits(model, token_ids()), stock)
    assert len(seen) == 3
