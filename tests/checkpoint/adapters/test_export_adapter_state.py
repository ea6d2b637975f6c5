"""How adapters act when a model is exported (strength, several, names, off) is what the export computes, or it is refused."""

import logging

import peft
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qat_patch import export_checkpoint, get_handle, load_checkpoint, patch_model, verify_checkpoint
from support.models.exports import velocity
from support.models.tiny_qwen3 import logits as logits_of
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_transformer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PROJECTIONS = ["q_proj", "v_proj"]


def wan(*names):
    model = tiny_transformer(layers=1)
    for number, name in enumerate(names):
        torch.manual_seed(number)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    return model


def language_model(*names):
    torch.manual_seed(0)
    configs = {name: peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False) for name in names}
    model = peft.get_peft_model(tiny_qwen3(num_hidden_layers=2), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    return model


def set_scales(model):
    """Another strength in each layer, by hand."""
    for number, layer in enumerate(module for module in model.modules() if hasattr(module, "set_scale")):
        layer.set_scale("default", 0.3 + number)


# How the adapters get there; whether they can be exported alone.
STATES = {
    "wan, weaker": (lambda: wan("default"), lambda model: model.set_adapters(["default"], [0.3]), True),
    "wan, no strength": (lambda: wan("default"), lambda model: model.set_adapters(["default"], [0.0]), True),
    "wan, by layer": (lambda: wan("default"), set_scales, True),
    "wan, one of two": (lambda: wan("a", "b"), lambda model: model.set_adapters(["a"]), True),
    "wan, two": (
        lambda: wan("a", "b"),
        lambda model: model.set_adapters(["a", "b"], [0.3, 0.9]),
        "expected one adapter .* got a, b",
    ),
    "wan, off": (lambda: wan("a"), lambda model: model.disable_adapters(), "adapters are switched off"),
    "wan, fused": (lambda: wan("a"), lambda model: model.fuse_lora(lora_scale=0.5), "adapters are merged into the weights"),
    "by layer": (lambda: language_model("default"), set_scales, True),
    "one of two": (lambda: language_model("a", "b"), lambda model: model.set_adapter("b"), True),
    "two": (lambda: language_model("a", "b"), lambda model: model.base_model.set_adapter(["a", "b"]), "expected one adapter"),
    "off": (lambda: language_model("a"), lambda model: model.base_model.disable_adapter_layers(), "adapters are switched off"),
    "merged": (lambda: language_model("a"), lambda model: model.merge_adapter(), "adapters are merged into the weights"),
}


@pytest.mark.parametrize("state", STATES)
def test_states(tmp_path, state):
    build, change, is_alone = STATES[state]
    base, run = (tiny_transformer(layers=1), velocity) if state.startswith("wan") else (tiny_qwen3(num_hidden_layers=2), logits)
    base.save_pretrained(tmp_path / "base")
    model = build()
    ordinary = run(model)
    change(model)
    assert state == "merged" or not torch.allclose(run(model), ordinary, rtol=1e-3, atol=1e-3), "the change matters"
    patch_model(model)
    expected = run(model)
    export_checkpoint(model, tmp_path / "out")
    assert distance(run(load_checkpoint(tmp_path / "out")), expected) < 1e-3
    alone = {"merge_adapters": False, "base_model": str(tmp_path / "base")}
    if is_alone is not True:
        with pytest.raises(ValueError, match=f"export_checkpoint: {is_alone}.*or export merged weights"):
            export_checkpoint(model, tmp_path / "alone", **alone)
        assert not (tmp_path / "alone").exists()
        return
    export_checkpoint(model, tmp_path / "alone", **alone)
    assert distance(run(load_checkpoint(tmp_path / "alone")), expected) < 1e-3
    assert torch.equal(run(model), expected)  # the model itself is as it was


def logits(model):
    return logits_of(model, token_ids())


def distance(a, b):
    return ((a - b).norm() / b.norm()).item() if a.shape == b.shape else float("inf")


def experts():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3MoeConfig(
        **sizes, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, vocab_size=128, initializer_range=0.1
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


# What PEFT trains; whether it can be merged.
KINDS = {
    "experts": (peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]), True),
    "dora": (peft.LoraConfig(target_modules=PROJECTIONS, use_dora=True, use_rslora=True), True),
    "ia3": (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), True),
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "got PromptTuningConfig"),
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "got PrefixTuningConfig"),
    "alora": (
        peft.LoraConfig(target_modules=PROJECTIONS, task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
        "PEFT cannot add the adapters of model.layers.0.self_attn.q_proj",
    ),
    "lora bias": (peft.LoraConfig(target_modules=PROJECTIONS, lora_bias=True), "PEFT cannot add the adapters"),
    "modules_to_save": (peft.LoraConfig(target_modules=PROJECTIONS, modules_to_save=["lm_head"]), "a copy of a module"),
}
SLOW = {
    "p-tuning": (
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
        "got PromptEncoderConfig",
    ),
    "tokens": (peft.TrainableTokensConfig(token_indices=list(range(5, 40))), True),
    "embedding": (peft.LoraConfig(target_modules=["embed_tokens"]), True),
    "patterns": (peft.LoraConfig(target_modules=PROJECTIONS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), True),
    "adalora": (peft.AdaLoraConfig(target_modules=PROJECTIONS, total_step=10), True),
    "loha": (peft.LoHaConfig(target_modules=PROJECTIONS), True),
    "lokr": (peft.LoKrConfig(target_modules=PROJECTIONS), True),
    "oft": (peft.OFTConfig(r=0, oft_block_size=8, target_modules=PROJECTIONS), True),
    "boft": (peft.BOFTConfig(boft_block_size=4, target_modules=PROJECTIONS), True),
    "vera": (peft.VeraConfig(target_modules=["q_proj"]), True),
    "hra": (peft.HRAConfig(r=2, target_modules=PROJECTIONS), True),
    "fourier": (peft.FourierFTConfig(n_frequency=10, target_modules=PROJECTIONS), True),
    "norms": (peft.LNTuningConfig(target_modules=["input_layernorm"]), True),
    "vblora": (peft.VBLoRAConfig(target_modules=PROJECTIONS, num_vectors=8, vector_length=16), True),
    "shira": (peft.ShiraConfig(r=2, target_modules=PROJECTIONS), True),
    "miss": (peft.MissConfig(r=4, target_modules=PROJECTIONS), True),
    "c3a": (peft.C3AConfig(block_size=16, target_modules=PROJECTIONS), True),
    "road": (peft.RoadConfig(target_modules=PROJECTIONS), True),
}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_what_peft_trains(tmp_path, kind):
    config, is_mergeable = (KINDS | SLOW)[kind]
    base = experts() if kind == "experts" else tiny_qwen3(num_hidden_layers=2)
    base.save_pretrained(tmp_path / "base")
    ordinary = logits(base)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    patch_model(model.eval())
    with get_handle(model).disabled():
        assert distance(logits(model)[:, -50:], ordinary) > 1e-3, "training matters"
    expected = logits(model)
    if is_mergeable is True:
        export_checkpoint(model, tmp_path / "merged")
        assert distance(logits(load_checkpoint(tmp_path / "merged")), expected) < 1e-2
    else:
        with pytest.raises(ValueError, match=f"export_checkpoint: .*{is_mergeable}"):
            export_checkpoint(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    export_checkpoint(model, tmp_path / "alone", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert torch.equal(logits(load_checkpoint(tmp_path / "alone")), expected)
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "alone")) == 2


def test_what_diffusers_cannot_read_is_refused(tmp_path):
    tiny_transformer(layers=1).save_pretrained(tmp_path / "base")
    model = tiny_transformer(layers=1)
    model.add_adapter(peft.LoHaConfig(r=4, target_modules=["to_q"], init_weights=False))
    patch_model(model)
    export_checkpoint(model, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"what would be written cannot be loaded: .*merge_adapters=True"):
        export_checkpoint(model, tmp_path / "alone", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert not (tmp_path / "alone").exists()


def test_the_wrong_base_is_noticed(tmp_path, caplog):
    """The adapters are read back on the base that is named; on one that is somewhere else they cannot be."""
    tiny_qwen3(num_hidden_layers=2, seed=1).save_pretrained(tmp_path / "base")
    model = language_model("default")
    patch_model(model)
    with pytest.raises(
        ValueError, match="computes something else than the model does: for a reference input the original_output"
    ):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING, "qat_patch"):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model="someone/not-here")
    assert "someone/not-here is not on this machine, so the adapters were not read back" in caplog.text


def test_what_is_exported_is_compared_with_what_the_model_computes(tmp_path):
    """Whatever a wrapper or a hook does to a model that no weight holds."""
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output + 0.1)
    with pytest.raises(ValueError, match="what would be written computes something else than the model does"):
        export_checkpoint(model, tmp_path / "out")
    hook.remove()
    with get_handle(model).disabled(), pytest.raises(ValueError, match="model.layers.0.* got original attention inside"):
        export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
