"""K shifts and specs of single modules in exports: they come back bit for bit, and never without the weights they belong to."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat_patch import (
    AttnQATConfig,
    QuantSpec,
    export_checkpoint,
    get_handle,
    load_checkpoint,
    patch_model,
    unpatch_model,
    verify_checkpoint,
)
from qat_patch.checkpoint import export
from support.models.exports import add_lora, logits, velocity
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import reseal

NAMES = ["model.layers.0.self_attn", "model.layers.2.self_attn"]
FILE = "qat_patch_k_shift.safetensors"


def shifts(names, heads, head_dim):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(heads, head_dim, generator=generator) for name in names}


def patched():
    model = tiny_qwen3()
    overrides = {"*.2.*": QuantSpec(rotate=True), "*.layers.*": QuantSpec(preset="nvfp4_qk")}
    patch_model(model, AttnQATConfig(overrides=overrides, exclude=["*.1.*"]), k_shift=shifts(NAMES, 2, 32))
    return model


def assert_same(loaded, model):
    a, b = get_handle(loaded), get_handle(model)
    assert {name: x.spec for name, x in a.patched.items()} == {name: x.spec for name, x in b.patched.items()}
    assert a.k_shift.keys() == b.k_shift.keys() and len(b.k_shift) > 0
    assert all(torch.equal(a.k_shift[name], x) for name, x in b.k_shift.items())
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
def test_language_model(tmp_path, monkeypatch, shard_size):
    monkeypatch.setattr(export, "_SHARD_SIZE", shard_size)
    model = patched()
    export_checkpoint(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / FILE)) == set(NAMES)
    loaded = load_checkpoint(tmp_path / "out")
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(stock, model)
    assert torch.equal(logits(stock), logits(model))
    assert any("2 of them with a K shift" in line for line in verify_checkpoint(tmp_path / "out"))
    # The first pattern that matches counts: their order survives.
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(block["attention"]["overrides"]) == ["*.2.*", "*.layers.*"]
    assert [group["spec"]["rotate"] for group in block["groups"]] == [False, True]
    export_checkpoint(loaded, tmp_path / "again")
    assert torch.equal(logits(load_checkpoint(tmp_path / "again")), logits(model))


def test_save_pretrained_takes_them_along(tmp_path):
    export_checkpoint(patched(), tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)
    assert torch.equal(logits(again), logits(loaded))


def test_adapters(tmp_path):
    base = tiny_qwen3()
    base.save_pretrained(tmp_path / "base")
    model = add_lora(base)
    patch_model(model, AttnQATConfig(), k_shift=shifts(NAMES, 2, 32))
    for name, options in {"merged": {}, "alone": {"merge_adapters": False, "base_model": str(tmp_path / "base")}}.items():
        export_checkpoint(model, tmp_path / name, **options)
        loaded = load_checkpoint(tmp_path / name)
        assert {n: x.tolist() for n, x in get_handle(loaded).k_shift.items()} == {
            n: x.tolist() for n, x in get_handle(model).k_shift.items()
        }
    assert torch.equal(logits(loaded), logits(model))


def test_pipeline(tmp_path):
    pipe = tiny_pipeline()
    names = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    patch_model(pipe, AttnQATConfig(include=["*.attn1"]), k_shift=shifts(names, 2, 16))
    export_checkpoint(pipe, tmp_path / "out")
    assert (tmp_path / "out" / "transformer" / FILE).is_file()
    loaded = load_checkpoint(tmp_path / "out")
    assert_same(loaded.transformer, pipe.transformer)
    assert torch.equal(velocity(loaded.transformer), velocity(pipe.transformer))
    plain = WanPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="from an export with K shifts.*load_checkpoint brings them along"):
        patch_model(plain)
    assert get_handle(plain) is None
    patch_model(plain, k_shift=get_handle(loaded).k_shift)
    assert_same(plain.transformer, pipe.transformer)
    unpatch_model(plain)
    assert not patch_model(plain, k_shift={}).k_shift


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), f"{FILE} is missing, and the attention metadata says that there are K shifts"),
        (lambda file: save_file({NAMES[0]: torch.zeros(2, 32)}, file), "is not the one that the attention metadata names"),
        (lambda file: file.write_bytes(b""), "is not the one that the attention metadata names"),
    ],
)
def test_shifts_of_another_model_are_refused(tmp_path, harm, message):
    export_checkpoint(patched(), tmp_path / "out")
    harm(tmp_path / "out" / FILE)
    for load in (load_checkpoint, AutoModelForCausalLM.from_pretrained):
        reseal(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "out")
