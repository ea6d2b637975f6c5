"""Shifts and specs of single modules in exports: they come back bit for bit, and never without the weights they belong to."""

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
FILES = {"k_shift": "qat_patch_k_shift.safetensors", "q_shift": "qat_patch_q_shift.safetensors"}


def shifts(names, heads, head_dim, kinds=tuple(FILES)):
    generator = torch.Generator().manual_seed(3)
    return {which: {name: torch.randn(heads, head_dim, generator=generator) for name in names} for which in kinds}


def patched(kinds=tuple(FILES)):
    model = tiny_qwen3()
    overrides = {"*.2.*": QuantSpec(rotate=True), "*.layers.*": QuantSpec(preset="nvfp4_qk")}
    patch_model(model, AttnQATConfig(overrides=overrides, exclude=["*.1.*"]), **shifts(NAMES, 2, 32, kinds))
    return model


def assert_same(loaded, model):
    a, b = get_handle(loaded), get_handle(model)
    assert {name: x.spec for name, x in a.patched.items()} == {name: x.spec for name, x in b.patched.items()}
    assert any(b.shifts.values())
    torch.testing.assert_close(a.shifts, b.shifts, rtol=0, atol=0)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("shard_size", "kinds"), [("5GB", tuple(FILES)), ("50KB", tuple(FILES)), ("5GB", ("q_shift",))])
def test_language_model(tmp_path, monkeypatch, shard_size, kinds):
    monkeypatch.setattr(export, "_SHARD_SIZE", shard_size)
    model = patched(kinds)
    export_checkpoint(model, tmp_path / "out")
    for which, file in FILES.items():
        assert (tmp_path / "out" / file).is_file() == (which in kinds)
        assert which not in kinds or {*load_file(tmp_path / "out" / file)} == {*NAMES}
    loaded = load_checkpoint(tmp_path / "out")
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(stock, model)
    assert torch.equal(logits(stock), logits(model))
    found = f"2 modules patched as exported, of them {2 * ('k_shift' in kinds)} with a K shift and 2 with a Q shift"
    assert any(found in line for line in verify_checkpoint(tmp_path / "out"))
    # The first pattern that matches counts: their order survives.
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(block["attention"]["overrides"]) == ["*.2.*", "*.layers.*"]
    assert [group["spec"]["rotate"] for group in block["groups"]] == [False, True]
    export_checkpoint(loaded, tmp_path / "again")
    assert torch.equal(logits(load_checkpoint(tmp_path / "again")), logits(model))


def test_metadata_without_q_shifts_is_that_of_earlier_versions(tmp_path):
    """Which refuse the key that they do not know, and do not compute something else."""
    for kinds, more in (((), set()), (("k_shift",), set()), (("q_shift",), {"q_shift"})):
        export_checkpoint(patched(kinds), tmp_path / "-".join(("out", *kinds)))
        block = json.loads((tmp_path / "-".join(("out", *kinds)) / "config.json").read_text())["quantization_config"]
        earlier = {"quant_method", "format_version", "package_version", "attention", "groups", "k_shift", "training"}
        assert block.keys() == earlier | more


def test_save_pretrained_takes_them_along(tmp_path):
    export_checkpoint(patched(), tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    for file in FILES.values():
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)
    assert torch.equal(logits(again), logits(loaded))


def test_adapters(tmp_path):
    base = tiny_qwen3()
    base.save_pretrained(tmp_path / "base")
    model = add_lora(base)
    patch_model(model, AttnQATConfig(), **shifts(NAMES, 2, 32))
    for name, options in {"merged": {}, "alone": {"merge_adapters": False, "base_model": str(tmp_path / "base")}}.items():
        export_checkpoint(model, tmp_path / name, **options)
        loaded = load_checkpoint(tmp_path / name)
        torch.testing.assert_close(get_handle(loaded).shifts, get_handle(model).shifts, rtol=0, atol=0)
    assert torch.equal(logits(loaded), logits(model))


def test_pipeline(tmp_path):
    pipe = tiny_pipeline()
    names = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    patch_model(pipe, AttnQATConfig(include=["*.attn1"]), **shifts(names, 2, 16))
    export_checkpoint(pipe, tmp_path / "out")
    assert all((tmp_path / "out" / "transformer" / file).is_file() for file in FILES.values())
    loaded = load_checkpoint(tmp_path / "out")
    assert_same(loaded.transformer, pipe.transformer)
    assert torch.equal(velocity(loaded.transformer), velocity(pipe.transformer))
    plain = WanPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="from an export with K shifts.*load_checkpoint brings them along"):
        patch_model(plain)
    assert get_handle(plain) is None
    with pytest.raises(ValueError, match="from an export with Q shifts.*load_checkpoint brings them along"):
        patch_model(plain, k_shift={})
    patch_model(plain, **get_handle(loaded).shifts)
    assert_same(plain.transformer, pipe.transformer)
    unpatch_model(plain)
    assert not any(patch_model(plain, k_shift={}, q_shift={}).shifts.values())


@pytest.mark.parametrize(("which", "words"), [("k_shift", "K shifts"), ("q_shift", "Q shifts")])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "FILE is missing, and the attention metadata says that there are WORDS"),
        (lambda file: save_file({NAMES[0]: torch.zeros(2, 32)}, file), "FILE is not the one that the attention metadata names"),
        (lambda file: file.write_bytes(b""), "FILE is not the one that the attention metadata names"),
    ],
)
def test_shifts_of_another_model_are_refused(tmp_path, which, words, harm, message):
    export_checkpoint(patched(), tmp_path / "out")
    harm(tmp_path / "out" / FILES[which])
    message = message.replace("FILE", FILES[which]).replace("WORDS", words)
    for load in (load_checkpoint, AutoModelForCausalLM.from_pretrained):
        reseal(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "out")


def test_a_file_of_shifts_that_no_metadata_names_is_refused(tmp_path):
    export_checkpoint(patched(("k_shift",)), tmp_path / "out")
    save_file(shifts(NAMES, 2, 32)["q_shift"], tmp_path / "out" / FILES["q_shift"])
    with pytest.raises(ValueError, match=f"holds {FILES['q_shift']}, which was not there when it was exported"):
        load_checkpoint(tmp_path / "out")
