"""What patch_model refuses of Transformers: models and layers, and later the calls of a patched model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from qat_patch import AttnQATConfig, QuantSpec, get_handle, patch_model, unpatch_model
from support.families.families import relative
from support.models.tiny_qwen3 import VOCAB, logits, pad, tiny_qwen3, token_ids


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
LLAMA = SMALL | {"num_key_value_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: build(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB)), "found no attention"),
        (lambda: tiny_qwen3(attention_dropout=0.1), "dropout .0.1."),
        (lambda: tiny_qwen3(head_dim=24), "head_dim 24; expected a multiple of 16"),
        (lambda: torch.nn.Linear(4, 4), "expected a model of"),
        (lambda: "Qwen/Qwen3-0.6B", "expected a model of"),
    ],
)
def test_models_that_are_refused(model, message):
    model = model()
    before = model.config._attn_implementation if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message):
        patch_model(model)
    assert get_handle(model) is None
    if before is not None:
        assert model.config._attn_implementation == before


def test_rotation_needs_a_power_of_two():
    model = tiny_qwen3(head_dim=48)
    with pytest.raises(ValueError, match="head_dim 48; expected a power of two"):
        patch_model(model, AttnQATConfig(spec=QuantSpec(rotate=True)))
    patch_model(model)


def test_refused_layers_can_be_excluded(calls):
    model = tiny_qwen3(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ids, (padded, mask) = token_ids(), pad(token_ids(), 5, "right")
    patch_model(model, AttnQATConfig(include=["model.layers.0.*"]))
    logits(model, ids)
    assert len(calls) == 1
    # the layers with a window got it: a token out of every window changes nothing but through layer 0
    assert relative(logits(model, padded, attention_mask=mask)[:, :50], logits(model, ids)) < 1e-2


def test_mistakes_in_patching():
    model = tiny_qwen3()
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)
    for field in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{field}: the pattern 'layers.9' matches no attention module"):
            patch_model(model, AttnQATConfig(**{field: ["layers.9"]}))
    with pytest.raises(ValueError, match="nothing to patch"):
        patch_model(model, AttnQATConfig(exclude=["*"]))
    patch_model(model)
    for again in (model, torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match="patched already"):
            patch_model(again)
    with pytest.raises(ValueError, match="part of a patched model"):
        patch_model(model.model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 50, 50, dtype=torch.bool)}, "unsupported mask"),
        ({"attention_mask": torch.zeros(2, 1, 50, 50)}, "unsupported mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
    ],
)
def test_calls_that_are_refused(arguments, message):
    model = tiny_qwen3()
    patch_model(model)
    with pytest.raises(ValueError, match=message):
        logits(model, token_ids(), **arguments)


def test_dropout_set_after_patching_is_refused():
    model = tiny_qwen3().train()
    patch_model(model)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        model(token_ids())
