"""Exports of Diffusers transformers and pipelines, and of models with PEFT adapters."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, WanTransformer3DModel
from safetensors import safe_open

from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, get_handle, load_checkpoint, patch_model, unpatch_model
from support.models.exports import add_lora, logits, velocity
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import CHANNELS, TEXT_DIM, tiny_pipeline, tiny_transformer
from support.runs.runs import reseal

CONFIG = AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk"), include=["*.attn1"], exclude=["blocks.0.*"])


def test_transformer_round_trip(tmp_path):
    model = tiny_transformer()
    stock = velocity(model)
    patch_model(model, CONFIG)
    expected = velocity(model)
    assert not torch.equal(expected, stock)
    export_checkpoint(model, tmp_path / "out", training={"steps": 2})
    loaded = load_checkpoint(tmp_path / "out")
    assert get_handle(loaded).config == CONFIG
    assert list(get_handle(loaded).patched) == ["blocks.1.attn1"]
    assert torch.equal(velocity(loaded), expected)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["_attention_quantization"]
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["qat_patch"]) == block
    # plain diffusers, then patched by hand: patch_model finds the config
    plain = AutoModel.from_pretrained(str(tmp_path / "out"))
    assert get_handle(plain) is None
    assert torch.allclose(velocity(plain), stock, atol=1e-5)  # its weights lie in the mapped file: other addresses
    assert patch_model(plain).config == CONFIG


def test_stock_diffusers_says_in_one_line_what_it_leaves_out(tmp_path):
    model = tiny_transformer()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    program = (
        "import sys; sys.modules['qat_patch'] = None\n"
        "from diffusers import WanTransformer3DModel\n"
        "for folder in sys.argv[1:]: WanTransformer3DModel.from_pretrained(folder)"
    )
    folders = [str(tmp_path / name) for name in ("out", "saved")]
    printed = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True).stderr
    said = [line for line in printed.splitlines() if "attention_quantization" in line]
    assert len(said) == 2
    assert all("original attention without it" in line and len(line) < 300 for line in said)


def test_with_this_package_nothing_is_said_about_it(tmp_path, caplog):
    """But what else is in a config, and unknown, still is."""
    model = tiny_transformer()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    load_checkpoint(tmp_path / "out")
    WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert "attention_quantization" not in caplog.text
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flavour": 1}))
    WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert "'flavour': 1" in caplog.text


def test_earlier_exports_have_their_metadata_in_a_key_that_diffusers_prints(tmp_path):
    model = tiny_transformer()
    patch_model(model, CONFIG)
    export_checkpoint(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["attention_quantization"] = config.pop("_attention_quantization")
    file.write_text(json.dumps(config))
    reseal(tmp_path / "out")
    assert get_handle(load_checkpoint(tmp_path / "out")).config == CONFIG
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert patch_model(plain).config == CONFIG
    unpatch_model(plain)
    assert not {"attention_quantization", "_attention_quantization"} & {*plain.config}


def test_a_fresh_process_reproduces_the_output_with_and_without_the_package(tmp_path):
    model = tiny_transformer()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    program = (
        "import sys, torch\n"
        "{first}\n"
        f"torch.manual_seed(0); x, text = torch.randn(1, {CHANNELS}, 2, 8, 8), torch.randn(1, 512, {TEXT_DIM})\n"
        "with torch.no_grad(): out = {load}.eval()(x, torch.tensor([500]), text, return_dict=False)[0]\n"
        "print(out.double().sum().item().hex())"
    )
    ours = {"first": "import qat_patch", "load": f"qat_patch.load_checkpoint({str(tmp_path / 'out')!r})"}
    plain = {
        "first": "sys.modules['qat_patch'] = None; from diffusers import WanTransformer3DModel",
        "load": f"WanTransformer3DModel.from_pretrained({str(tmp_path / 'out')!r})",
    }
    printed = [
        subprocess.run([sys.executable, "-c", program.format(**kind)], capture_output=True, text=True, check=True).stdout.strip()
        for kind in (ours, plain)
    ]
    torch.manual_seed(0)
    inputs = (torch.randn(1, CHANNELS, 2, 8, 8), torch.tensor([500]), torch.randn(1, 512, TEXT_DIM))
    expected = []
    with torch.no_grad():
        expected.append(model(*inputs, return_dict=False)[0].double().sum().item().hex())
        unpatch_model(model)
        expected.append(model(*inputs, return_dict=False)[0].double().sum().item().hex())
    assert printed[0] == expected[0]
    assert float.fromhex(printed[1]) == pytest.approx(float.fromhex(expected[1]), rel=1e-4)
    assert abs(float.fromhex(expected[0]) - float.fromhex(expected[1])) > 1e-3


def test_pipeline_round_trip(tmp_path):
    pipe = tiny_pipeline()
    patch_model(pipe, CONFIG)
    expected = velocity(pipe.transformer)
    export_checkpoint(pipe, tmp_path / "out", training={"steps": 2}, base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(velocity(loaded.transformer), expected)
    assert list(get_handle(loaded).patched) == ["transformer.blocks.1.attn1"]
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert get_handle(plain) is None
    assert patch_model(plain).config == CONFIG
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card and "pipeline_tag: text-to-video" in card
    assert "base_model_relation: finetune" in card
    with pytest.raises(ValueError, match="a pipeline is saved as it is"):
        export_checkpoint(pipe, tmp_path / "cast", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    del config["_attention_quantization"]
    (tmp_path / "out" / "transformer" / "config.json").write_text(json.dumps(config))
    reseal(tmp_path / "out")
    with pytest.raises(ValueError, match="no model in .* has attention metadata"):
        load_checkpoint(tmp_path / "out")


def test_fused_projections_are_not_exported(tmp_path):
    model = tiny_transformer()
    patch_model(model)
    expected = velocity(model)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"got those of fuse_qkv_projections \(blocks.0.attn1\); call unfuse_qkv_projections"):
        export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.unfuse_qkv_projections()
    export_checkpoint(model, tmp_path / "out")
    assert torch.equal(velocity(load_checkpoint(tmp_path / "out")), expected)


def test_dtype(tmp_path):
    model = tiny_transformer()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out", dtype=torch.bfloat16)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "out", dtype=torch.float32).dtype == torch.float32
    kept = {name for name in model.state_dict() if set(name.split(".")) & {*WanTransformer3DModel._keep_in_fp32_modules}}
    assert kept and len(kept) < len(model.state_dict())
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), x if name in kept else x.bfloat16().float()), name
    assert model.dtype == torch.float32


@pytest.mark.parametrize("build", [tiny_transformer, tiny_qwen3])
def test_merged_adapters(tmp_path, build):
    model = build()
    output = velocity if build is tiny_transformer else logits
    names = set(model.state_dict())
    with_adapters = add_lora(model)
    patch_model(with_adapters, AttnQATConfig(exclude=["*.0.*"]))
    expected, state = output(with_adapters), {name: x.clone() for name, x in with_adapters.state_dict().items()}
    export_checkpoint(with_adapters, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert set(loaded.state_dict()) == names
    # merged, W + B A rounds once; where a code flips at the last bit, more shows
    assert (output(loaded) - expected).norm() / expected.norm() < 1e-2
    with get_handle(loaded).disabled(), get_handle(with_adapters).disabled():
        assert (output(loaded) - output(with_adapters)).norm() / expected.norm() < 1e-5
    assert all(torch.equal(x, state[name]) for name, x in with_adapters.state_dict().items())
    # From there on nothing is rounded any more.
    export_checkpoint(loaded, tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in again.state_dict().items())
    assert torch.equal(output(again), output(loaded))


@pytest.mark.parametrize("build", [tiny_transformer, tiny_qwen3])
def test_adapters_alone(tmp_path, build):
    model = build()
    output = velocity if build is tiny_transformer else logits
    model.save_pretrained(tmp_path / "base")
    with_adapters = add_lora(model)
    patch_model(with_adapters, AttnQATConfig(exclude=["*.0.*"]))
    expected = output(with_adapters)
    export_checkpoint(with_adapters, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*[a-z].safetensors")) < 100_000
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(output(loaded), expected)
    assert len(get_handle(loaded).patched) == len(get_handle(with_adapters).patched)
    assert "base_model_relation: adapter" in (tmp_path / "out" / "README.md").read_text()
    reseal(tmp_path / "out", attention={})
    with pytest.raises(ValueError, match="no attention metadata"):
        load_checkpoint(tmp_path / "out")


def test_adapters_alone_need_adapters_and_a_base(tmp_path):
    model = tiny_transformer()
    patch_model(model)
    with pytest.raises(ValueError, match="0 models with adapters"):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model="base")
    add_lora(model)
    with pytest.raises(ValueError, match="base_model=None"):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False)
    assert not list(tmp_path.iterdir())
