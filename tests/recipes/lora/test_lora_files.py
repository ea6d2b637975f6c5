"""LoRA files of others: what is read is what Diffusers and PEFT make of the same file."""

import json

import peft
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from qat_patch.checkpoint.adapters import diffusers_name
from qat_recipes.lora.files import read_lora
from qat_recipes.lora.start import START, StartSettings, add_adapter, merge
from support.models.exports import velocity
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline, tiny_transformer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
NATIVE = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"]
NATIVE += [name.replace("self", "cross") for name in NATIVE] + ["ffn.0", "ffn.2"]
OUTSIDE = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"]


def sizes(model, name):
    module = model.get_submodule(name)
    return module.in_features, module.out_features


def low_rank(model, name, rank, seed):
    """The two matrices of a layer, by the name that Diffusers gives it."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = sizes(model, name)
    return torch.randn(rank, inputs, generator=generator) / 3, torch.randn(outputs, rank, generator=generator) / 3


def native_file(kind):
    """A LoRA of every kind of layer under names that are not those of Diffusers, with ranks and alphas that differ."""
    model, tensors = tiny_transformer(layers=2), {}
    names = [f"blocks.{block}.{name}" for block in range(2) for name in NATIVE] + (OUTSIDE if kind == "lightx2v" else [])
    for number, name in enumerate(names):
        down, up = low_rank(model, diffusers_name(name), 2 + (number % 3 if kind != "lightx2v" else 0), number)
        prefix = {"comfyui": f"diffusion_model.{name}", "kohya": f"lora_unet_{name.replace('.', '_')}"}.get(kind)
        prefix = prefix or f"diffusion_model.{name}"
        words = ("lora_A", "lora_B") if kind == "comfyui" else ("lora_down", "lora_up")
        tensors |= {f"{prefix}.{words[0]}.weight": down, f"{prefix}.{words[1]}.weight": up}
        if kind != "lightx2v":
            tensors[f"{prefix}.alpha"] = torch.tensor(1.0 + number % 4)
    return tensors


@pytest.mark.parametrize("kind", ["comfyui", "kohya", "lightx2v"])
@pytest.mark.parametrize("use", ["merged", "frozen"])
def test_files_act_as_in_diffusers(tmp_path, kind, use):
    save_file(native_file(kind), tmp_path / "lora.safetensors")
    pipe = tiny_pipeline(layers=2)
    before = velocity(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    expected = velocity(pipe.transformer)
    assert (expected - before).norm() / before.norm() > 0.05
    model = tiny_transformer(layers=2)
    start = StartSettings(path=str(tmp_path), use=use)
    if use == "merged":
        merge(model, start)
    else:
        assert add_adapter(model, start, START) is model
        assert all(x.dtype == torch.float32 for x in model.parameters())
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-4)
    assert (velocity(model) - before).norm() > 0.9 * (expected - before).norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_peft_and_diffusers_with_patterns(tmp_path, rslora):
    torch.manual_seed(0)
    options = {"rank_pattern": {"attn1.to_q": 3}, "alpha_pattern": {"ffn.net.2": 5.0}, "use_rslora": rslora}
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=TARGETS, init_lora_weights=False, **options)
    model = peft.get_peft_model(tiny_transformer(layers=1), config)
    model.save_pretrained(tmp_path / "peft")
    expected = velocity(model)
    state = {
        key.removeprefix("base_model.model."): x for key, x in load_file(tmp_path / "peft/adapter_model.safetensors").items()
    }
    metadata = {key: sorted(x) if isinstance(x, set) else x for key, x in config.to_dict().items()}
    WanPipeline.save_lora_weights(tmp_path / "diffusers", state, transformer_lora_adapter_metadata=metadata)
    for folder in ("peft", "diffusers"):
        merge(merged := tiny_transformer(layers=1), StartSettings(path=str(tmp_path / folder), use="merged"))
        torch.testing.assert_close(velocity(merged), expected, rtol=1e-4, atol=1e-4)
        beside = add_adapter(tiny_transformer(layers=1), StartSettings(path=str(tmp_path / folder), use="trained"), "default")
        torch.testing.assert_close(velocity(beside), expected, rtol=1e-4, atol=1e-4)


def test_a_file_of_peft_for_a_language_model(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_qwen3(), config)
    model.save_pretrained(tmp_path)
    ids = token_ids()
    with torch.no_grad():
        expected, before = model(ids).logits, tiny_qwen3()(ids).logits
        beside = add_adapter(tiny_qwen3(), StartSettings(path=str(tmp_path), use="trained"), "default")
        torch.testing.assert_close(beside(ids).logits, expected)
        half = tiny_qwen3()
        merge(half, StartSettings(path=str(tmp_path), use="merged", strength=0.5))
        assert 0.2 < (half(ids).logits - before).norm() / (expected - before).norm() < 0.8


def test_differences_are_added_too(tmp_path):
    """Biases and norms, which files of distillation have; adapters cannot hold them."""
    tensors = native_file("comfyui")
    bias, norm = torch.randn(32), torch.randn(32)
    tensors |= {"diffusion_model.blocks.0.self_attn.q.diff_b": bias, "diffusion_model.blocks.1.norm3.diff": norm}
    tensors |= {"diffusion_model.blocks.1.norm3.diff_b": torch.zeros(32)}
    save_file(tensors, tmp_path / "lora.safetensors")
    path = str(tmp_path / "lora.safetensors")
    start, model = tiny_transformer(layers=2), tiny_transformer(layers=2)
    merge(model, StartSettings(path=path, use="merged", strength=0.5))
    torch.testing.assert_close(model.blocks[0].attn1.to_q.bias, start.blocks[0].attn1.to_q.bias + bias / 2)
    torch.testing.assert_close(model.blocks[1].norm2.weight, start.blocks[1].norm2.weight + norm / 2)
    assert torch.equal(model.blocks[1].norm2.bias, start.blocks[1].norm2.bias)
    with pytest.raises(ValueError, match="changes 2 biases or norms too, .* which adapters cannot; expected merged, got frozen"):
        add_adapter(model, StartSettings(path=path, use="frozen"), START)


def test_weights_in_bfloat16_are_rounded_once(tmp_path):
    save_file(native_file("comfyui"), tmp_path / "lora.safetensors")
    model, exact = tiny_transformer(layers=2).bfloat16(), tiny_transformer(layers=2).bfloat16().float()
    for each in (model, exact):
        merge(each, StartSettings(path=str(tmp_path), use="merged"))
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(model.parameters(), exact.parameters(), strict=True))


def changed(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "expected .*adapter_config.json, in which PEFT writes the strength"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (lambda f: changed(f, use_dora=True), "use_dora=True: not known here; expected plain LoRA"),
        (lambda f: changed(f, init_lora_weights="pissa"), "init_lora_weights=pissa: not known here"),
        (lambda f: changed(f, peft_type="LOHA"), "peft_type=LOHA: not known here"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "expected one .safetensors file in .*, got none"),
        (lambda f: add_key(f, "blocks.0.attn1.to_q.dora_scale"), "dora_scale is not known to be part of a LoRA"),
        (lambda f: add_key(f, "diffusion_model.blocks.0.self_attn.z.lora_A.weight"), "self_attn.z.* is not known to be part"),
        (lambda f: add_key(f, "base_model.model.proj_out.lora_A.weight"), "expected both matrices of proj_out"),
        (lambda f: add_key(f, "transformer.blocks.0.attn1.to_q.lora_A.weight"), "to_q has two tensors for down"),
    ],
)
def test_files_that_are_not_lora(tmp_path, change, message):
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.get_peft_model(tiny_transformer(layers=1), config).save_pretrained(tmp_path)
    read_lora(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=f"lora.start.path: .*{message}"):
        read_lora(tmp_path)


def add_key(folder, key):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {key: torch.ones(2, 32)}, file, metadata={"format": "pt"})


def test_what_does_not_fit(tmp_path):
    save_file(native_file("comfyui"), tmp_path / "lora.safetensors")
    for model, message in (
        (tiny_transformer(layers=1), r"expected a linear layer blocks\.1\.\S+ of 32 inputs and 32 outputs, got none"),
        (tiny_transformer(layers=2, heads=3), r"linear layer \S+ of 32 inputs and 32 outputs, got 48 and 48"),
    ):
        for put in (merge, lambda model, start: add_adapter(model, start, START)):
            with pytest.raises(ValueError, match=message):
                put(model, StartSettings(path=str(tmp_path), use="merged"))
    with pytest.raises(ValueError, match="lora.start.path: there is no nowhere"):
        StartSettings(path="nowhere", use="merged")
    with pytest.raises(ValueError, match="with 0 the LoRA has no effect"):
        StartSettings(path=str(tmp_path), use="merged", strength=0)
