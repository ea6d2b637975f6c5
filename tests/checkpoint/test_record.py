"""What save_pretrained writes about a patched model, and what is read back."""

import json
import logging

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat_patch import (
    AttnQATConfig,
    QuantSpec,
    export_checkpoint,
    get_handle,
    load_checkpoint,
    patch_model,
    unpatch_model,
)
from support.models.exports import add_lora, logits, velocity
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline, tiny_transformer

CONFIG = AttnQATConfig(spec=QuantSpec(rotate=True), exclude=["*.0.*"])
FILES = {which: f"qat_patch_{which}.safetensors" for which in ("k_shift", "q_shift")}
SHIFTS = {
    which: {"model.layers.1.self_attn": torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))}
    for seed, which in enumerate(FILES)
}


def patched(config=CONFIG, shifted=True, **options):
    model = tiny_qwen3(num_hidden_layers=2, **options)
    patch_model(model, config, **(SHIFTS if shifted else {}))
    return model


def assert_same(loaded, model):
    a, b = get_handle(loaded), get_handle(model)
    assert a.specs == b.specs
    torch.testing.assert_close(a.shifts, b.shifts, rtol=0, atol=0)
    assert torch.equal(logits(loaded), logits(model))


def files(folder):
    return {which: load_file(folder / file) for which, file in FILES.items()}


def test_a_model_that_was_patched_by_hand(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "out")
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        block = json.loads(file.metadata()["qat_patch"])
    assert block == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, Qwen3ForCausalLM])
def test_the_name_of_4_bit_attention_loads_what_was_saved_patched(loader, tmp_path):
    """As TRL loads a reference model: by the name in the config of the model that it trains."""
    model = patched()
    name = model.config._attn_implementation
    model.save_pretrained(tmp_path / "patched")
    loaded = loader.from_pretrained(tmp_path / "patched", attn_implementation=name)
    assert_same(loaded, model)
    unpatch_model(loaded)
    assert loaded.config._attn_implementation == "sdpa"
    loaded.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="'qat_fp4_sdpa' is the name that patch_model.*attn_implementation='sdpa'.*trainer.ref_model"
    ):
        loader.from_pretrained(tmp_path / "plain", attn_implementation=name)


def test_what_is_in_force_counts_not_what_was_loaded(tmp_path):
    export_checkpoint(patched(), tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    unpatch_model(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    patch_model(loaded, AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk")))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert len(get_handle(again).patched) == 2
    assert_same(again, loaded)
    # Over what was saved before: nothing of that is left.
    loaded.save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("qat_patch*")]
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), loaded)
    # Attention that was replaced after the patch is not in force.
    loaded.set_attn_implementation("sdpa")
    loaded.save_pretrained(tmp_path / "lost")
    assert get_handle(AutoModelForCausalLM.from_pretrained(tmp_path / "lost")) is None
    with pytest.raises(ValueError, match="expected 4-bit attention, got sdpa, which was put in its place"):
        export_checkpoint(loaded, tmp_path / "refused")


def test_what_the_caller_passes_is_saved(tmp_path):
    """Under FSDP the weights come as an argument; other processes write nothing."""
    model = patched()
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].any()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("origin", ["export", "hand"])
def test_checkpoints_of_trainer(tmp_path, origin):
    model = patched()
    if origin == "export":
        export_checkpoint(model, tmp_path / "export")
        model = load_checkpoint(tmp_path / "export")
    data = [{"input_ids": x, "labels": x} for x in token_ids()]
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments(output_dir=tmp_path / "run", **options), train_dataset=data).train()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1"), model.eval())


def test_without_the_head_and_with_another(tmp_path):
    """Names of modules are those of the class that is loaded, those of shifts too."""
    model = patched()
    export_checkpoint(model, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    handle = get_handle(base)
    assert list(handle.patched) == list(handle.k_shift) == list(handle.q_shift) == ["layers.1.self_attn"]
    with torch.no_grad():
        assert torch.equal(base(token_ids())[0], model.model(token_ids())[0])
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert get_handle(again).specs == get_handle(model).specs
    export_checkpoint(base, tmp_path / "again")
    handle = get_handle(load_checkpoint(tmp_path / "again"))
    assert list(handle.k_shift) == list(handle.q_shift) == ["layers.1.self_attn"]


def test_a_model_inside_of_the_one_that_is_saved(tmp_path):
    model = tiny_qwen3(num_hidden_layers=2)
    patch_model(model.model, AttnQATConfig(exclude=["layers.0.*"]))
    model.save_pretrained(tmp_path / "out")
    assert list(get_handle(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).patched) == ["model.layers.1.self_attn"]


class OthersConfig(QuantizationConfigMixin):
    """Stands for bitsandbytes and the like, and leaves the weights alone."""

    def __init__(self, **kwargs):
        self.quant_method = "others"


class OthersQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self):
        return True


@pytest.fixture
def others(monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "others", OthersConfig)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "others", OthersQuantizer)
    return OthersConfig()


def test_where_the_config_belongs_to_another_quantizer(tmp_path, others, caplog):
    tiny_qwen3(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=others)
    patch_model(model, CONFIG, **SHIFTS)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "others"
    with caplog.at_level(logging.WARNING, "qat_patch"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert get_handle(again) is None
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("qat_patch")]
    assert "runs original attention; qat_patch.patch_model(model) switches it on" in message and "\n" not in message
    with pytest.raises(ValueError, match="K shifts and Q shifts, .*pass k_shift={}, q_shift={} to do without"):
        patch_model(again)
    with pytest.raises(ValueError, match="with Q shifts, which are in a file next to its weights.*pass q_shift={} to do without"):
        patch_model(again, k_shift={})
    assert patch_model(again, **files(tmp_path / "out")).config == CONFIG
    assert_same(again, model)
    with pytest.raises(ValueError, match="was saved by save_pretrained and is no export"):
        load_checkpoint(tmp_path / "out")
    unpatch_model(again)
    assert patch_model(again).config == AttnQATConfig()
    unpatch_model(again)
    again.save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("qat_patch*")]
    with pytest.raises(ValueError, match="expected weights as ordinary tensors, got a Qwen3ForCausalLM quantized by others"):
        export_checkpoint(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_adapters_that_peft_saves(tmp_path, caplog):
    """As Trainer does: the base is loaded as it was, so the record stands beside the adapters."""
    tiny_qwen3(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    patch_model(model, CONFIG)
    model.save_pretrained(tmp_path / "adapters")
    with caplog.at_level(logging.WARNING, "qat_patch"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert "qat_patch.patch_model(model) switches it on" in caplog.text
    assert patch_model(again).config == CONFIG
    assert torch.equal(logits(again), logits(model))


def test_diffusers(tmp_path):
    model = tiny_transformer()
    shifts = {which: {"blocks.1.attn1": torch.ones(2, 16) * number} for number, which in enumerate(FILES, 1)}
    config = AttnQATConfig(include=["*.attn1"], exclude_first_blocks=1)
    patch_model(model, config, **shifts)
    model.save_pretrained(tmp_path / "out")
    assert not [key for key in model.config if "attention_quantization" in key]
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert patch_model(again, **files(tmp_path / "out")).config == config
    assert torch.allclose(velocity(again), velocity(model), atol=1e-5)  # its weights lie in the mapped file: other addresses
    # Patched otherwise, or not at all, since it was loaded.
    unpatch_model(again)
    assert not [key for key in again.config if "attention_quantization" in key]
    patch_model(again, AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk")))
    again.save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("qat_patch*")]
    third = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert patch_model(third).specs == get_handle(again).specs
    unpatch_model(third)
    third.save_pretrained(tmp_path / "plain")
    assert "attention_quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_transformer])
def test_the_order_of_patterns_survives(tmp_path, build):
    """Of the patterns that match, the first one counts, and configs are sorted when they are saved."""
    model = build()
    names = list(patch_model(model).patched)
    unpatch_model(model)
    specs = {names[-1]: QuantSpec(rotate=True), "*": QuantSpec(preset="nvfp4_qk")}
    patch_model(model, AttnQATConfig(overrides=specs))
    assert list(specs) != sorted(specs)
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert (get_handle(again) or patch_model(again)).specs == get_handle(model).specs


def test_a_pipeline_of_diffusers(tmp_path):
    pipe = tiny_pipeline(transformer_2=True, layers=1)
    patch_model(pipe.transformer_2, AttnQATConfig(include=["*.attn1"]))
    pipe.save_pretrained(tmp_path / "out")
    again = type(pipe).from_pretrained(tmp_path / "out")
    assert not [key for key in again.transformer.config if "attention_quantization" in key]
    assert patch_model(again.transformer_2).specs == get_handle(pipe.transformer_2).specs
