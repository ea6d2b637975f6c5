"""Exports with packed linear layers: read back by compressed-tensors, Transformers and ModelOpt, and by load_checkpoint."""

import json
import logging

import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qat_kernels import unpack
from qat_patch import (
    AttnQATConfig,
    LinearQATConfig,
    QuantSpec,
    export_checkpoint,
    get_handle,
    get_linear_handle,
    load_checkpoint,
    patch_model,
    quantize_linears,
    unquantize_linears,
    verify_checkpoint,
)
from qat_patch.checkpoint import export
from support.models.exports import logits
from support.models.tiny_qwen3 import tiny_llama, tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.runs import reseal

KV = AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4"))
A16 = LinearQATConfig(format="nvfp4a16")


def quantized(config=None, attention=KV, model=None):
    model = tiny_qwen3(num_hidden_layers=2) if model is None else model
    patch_model(model, attention)
    handle = quantize_linears(model, config)
    if handle.config.rounds_inputs:
        with torch.no_grad(), handle.calibration():
            model(token_ids())
    return model


def stored(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def of_layer(tensors, name):
    return {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["power_of_two", "compressed_tensors"])
@pytest.mark.parametrize("form", ["nvfp4", "nvfp4a16"])
def test_readers_get_the_weights_that_computed(tmp_path, form, rule):
    """compressed-tensors, ModelOpt and we: what is stored stands for exactly the values of the forward pass in training."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    model = quantized(LinearQATConfig(format=form, global_scale=rule))
    folder = export_checkpoint(model, tmp_path / "out", server="vllm")
    tensors, handle = stored(folder), get_linear_handle(model)
    scheme = preset_name_to_scheme(form, ["Linear"])
    for name, module in handle.modules.items():
        found = of_layer(tensors, name)
        layer = handle.layers[name]
        # F(x) F(W)^T with x = 1: F(W) itself, column by column.
        layer.rounds_inputs = False
        computed = module(torch.eye(module.in_features)).T.detach()
        of_input = {"input_global_scale"} if form == "nvfp4" else set()
        assert found.keys() == {*NVFP4PackedCompressor.compression_param_names(scheme)} | of_input
        assert found["weight_packed"].dtype == torch.uint8 and found["weight_scale"].dtype == torch.float8_e4m3fn
        theirs = NVFP4PackedCompressor.decompress(found, scheme)["weight"]
        assert theirs.dtype == torch.bfloat16
        if rule == "power_of_two":
            assert torch.equal(theirs.float(), computed)
        torch.testing.assert_close(theirs.float(), computed, rtol=2**-7, atol=0)
        double_scale = 1 / found["weight_global_scale"]
        modelopt = NVFP4QTensor(module.weight.shape, torch.float32, found["weight_packed"])
        read = modelopt.dequantize(scale=found["weight_scale"], double_scale=double_scale, block_sizes={-1: 16})
        if rule == "power_of_two":
            assert torch.equal(read, computed)
        torch.testing.assert_close(read, computed, rtol=1e-6, atol=0)
        if form == "nvfp4":
            assert found["input_global_scale"].item() == layer.input_scale
    assert {name for name in tensors if name.endswith(".weight")} == {
        *(name for name in tensors if "norm" in name),
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4a16"])
def test_the_config_is_what_compressed_tensors_writes(tmp_path, form):
    model = quantized(LinearQATConfig(format=form, exclude=("*.o_proj",)))
    config = json.loads((export_checkpoint(model, tmp_path / "out") / "config.json").read_text())["quantization_config"]
    scheme = preset_name_to_scheme(form, ["Linear"])
    scheme.format = "nvfp4-pack-quantized"
    left_out = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    theirs = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed", ignore=left_out
    )
    assert QuantizationConfig.model_validate(config) == theirs
    assert config["quant_method"] == "compressed-tensors" and config.keys() <= theirs.model_dump().keys()


@pytest.mark.parametrize("server", ["vllm", "sglang", None])
@pytest.mark.parametrize("form", ["nvfp4", "nvfp4a16"])
def test_it_loads_as_it_was_exported_and_in_transformers(tmp_path, caplog, form, server):
    """By its own reader of compressed-tensors, without our quantizer; weights are bit-equal, and patch_model knows the
    attention."""
    model = quantized(LinearQATConfig(format=form), KV if server else AttnQATConfig())
    folder = export_checkpoint(model, tmp_path / "out", server=server)
    loaded = load_checkpoint(folder)
    assert torch.equal(logits(loaded), logits(model))
    report = "\n".join(verify_checkpoint(folder))
    assert f"14 linear layers in {form}, packed" in report and report.count("bit-equal") == 3
    assert "packed  " not in report and " (packed)" in str(get_linear_handle(loaded))
    card = (folder / "README.md").read_text()
    assert f"`{form}`: weights" in card and "compressed-tensors" in card
    assert get_linear_handle(loaded).scales == get_linear_handle(model).scales
    with get_linear_handle(loaded).disabled(), get_linear_handle(model).disabled():
        assert not torch.equal(logits(loaded), logits(model))  # its weights stay on the grid

    with caplog.at_level(logging.WARNING):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(stock.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer" and get_handle(stock) is None
    assert "qat_patch" not in caplog.text
    theirs, ours = logits(stock).float(), load_checkpoint(folder, dtype="bfloat16")
    with get_handle(ours).disabled():
        distance = ((logits(ours).float() - theirs).norm() / theirs.norm()).item()
    # It rounds inputs in bfloat16, and so others of them go to other codes.
    assert distance == 0 if form == "nvfp4a16" else distance < 0.2
    for name, module in get_linear_handle(ours).modules.items():
        assert torch.equal(module.weight, stock.get_submodule(name).weight)
    assert patch_model(stock).config == get_handle(model).config


def test_weights_are_rounded_once_whatever_the_rest_is_cast_to(tmp_path, monkeypatch):
    """And in several files, with an index."""
    monkeypatch.setattr(export, "_SHARD_SIZE", "40KB")
    model = quantized(model=tiny_llama())
    narrow = export_checkpoint(model, tmp_path / "narrow", dtype="bfloat16", server="vllm")
    assert len(list(narrow.glob("model-*.safetensors"))) > 1
    export_checkpoint(model, tmp_path / "wide", server="vllm")
    wide, stored_narrow = stored(tmp_path / "wide"), stored(narrow)
    assert wide.keys() == stored_narrow.keys()
    packed = [name for name in wide if not name.endswith(".weight")]
    assert len(packed) == 4 * 14 and all(torch.equal(wide[name].float(), stored_narrow[name].float()) for name in packed)
    assert stored_narrow["model.norm.weight"].dtype == torch.bfloat16
    verify_checkpoint(narrow)
    loaded = load_checkpoint(narrow)
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config == model.generation_config
    # Once more: the same codes, but for the sign of zeros.
    again = stored(export_checkpoint(loaded, tmp_path / "again", server="vllm"))
    assert stored_narrow.keys() == again.keys()
    for name, x in stored_narrow.items():
        codes = [t if t.dtype != torch.uint8 else unpack(t, t.shape[1] * 2) for t in (x, again[name])]
        assert torch.equal(*(t.float() if t.dtype != torch.uint8 else t.masked_fill(t == 8, 0) for t in codes)), name


def test_what_a_server_is_told(tmp_path):
    folder = export_checkpoint(quantized(), tmp_path / "out", server="vllm")
    text = (folder / "SERVING.md").read_text()
    assert "vllm serve ." in text and "--kv-cache-dtype nvfp4" in text and "ordinary weights" not in text
    assert "packed in NVFP4 (nvfp4: weights and inputs in 4 bits)" in text and "GPUs without FP4 units" in text
    assert "GPUs without" not in (export_checkpoint(quantized(A16), tmp_path / "a16", server="sglang") / "SERVING.md").read_text()
    manifest = json.loads((folder / "qat_patch.json").read_text())
    assert manifest["attention"][""]["quant_method"] == "qat_patch" and len(manifest["linear"]["layers"]) == 14
    with pytest.raises(ValueError, match="auto_enable: expected ordinary linear layers"):
        export_checkpoint(quantized(), tmp_path / "auto", server="vllm", auto_enable=True)
    with pytest.raises(
        ValueError, match=r"vLLM merges gate_proj, up_proj into one layer: .* without model\.layers\.0\.mlp\.up_proj"
    ):
        export_checkpoint(quantized(LinearQATConfig(exclude=("*.0.mlp.up_proj",))), tmp_path / "merged", server="vllm")


def test_packed_weights_are_for_inference(tmp_path):
    folder = export_checkpoint(quantized(), tmp_path / "out")
    model = load_checkpoint(folder)
    assert not any(module.weight.requires_grad for module in get_linear_handle(model).modules.values())
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="steps smaller than the grid would be lost"):
        model(token_ids())
    logits(model)
    module = get_linear_handle(model).modules["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        module.weight += 1e-4
    with pytest.raises(ValueError, match=r"up_proj: expected the weight of the packed export"):
        export_checkpoint(model, tmp_path / "again")
    with pytest.raises(ValueError, match="quantized by compressed-tensors"):
        quantize_linears(AutoModelForCausalLM.from_pretrained(folder))


def test_save_pretrained_says_that_it_does_not_pack(tmp_path, caplog):
    model = quantized(A16)
    with caplog.at_level(logging.WARNING):
        export_checkpoint(model, tmp_path / "out")
        assert "save_pretrained" not in caplog.text
        model.save_pretrained(tmp_path / "saved")
    assert "call quantize_linears after loading" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    quantize_linears(again, A16)
    assert torch.equal(logits(again), logits(model))


def moe():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()


def unmeasured():
    model = tiny_qwen3(num_hidden_layers=2)
    patch_model(model)
    quantize_linears(model)
    return model


def pipeline():
    pipe = tiny_pipeline(layers=1)
    patch_model(pipe)
    quantize_linears(pipe.transformer, A16)
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: quantized(A16, AttnQATConfig(), tiny_transformer(layers=1)),
            "no library is known that reads .* WanTransformer3D",
        ),
        (pipeline, "no library is known that reads"),
        (lambda: quantized(A16, KV, moe()), r"servers take experts for quantized too, and model.layers.0.mlp.experts"),
        (unmeasured, "has not been measured: expected a calibrated model"),
    ],
)
def test_what_no_reader_would_understand_is_refused_by_name(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_checkpoint(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_switched_off_and_undone(tmp_path):
    model = quantized(A16)
    with get_linear_handle(model).disabled(), pytest.raises(ValueError, match="inside disabled"):
        export_checkpoint(model, tmp_path / "out")
    unquantize_linears(model)
    config = json.loads((export_checkpoint(model, tmp_path / "out") / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qat_patch"


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=header)


def edit(name, change):
    def editor(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return editor


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edit("config.json", lambda c: c["quantization_config"].update(ignore=[])), "expected what qat_patch.json says"),
        (edit("config.json", lambda c: c.pop("quantization_config")), "expected what qat_patch.json says"),
        (edit("qat_patch.json", lambda m: m.pop("linear")), "quantization_config|attention: expected"),
        (edit("qat_patch.json", lambda m: m["linear"].update(more=1)), "unknown key 'more'"),
        (edit("qat_patch.json", lambda m: m["linear"]["config"].pop("exclude")), "'exclude' is missing"),
        (edit("qat_patch.json", lambda m: m["linear"].update(layers={})), "expected a mapping of layers"),
        (edit("qat_patch.json", lambda m: m["linear"]["layers"].pop(LAYER)), "not those of the config|not used|scales"),
        (edit("qat_patch.json", lambda m: m["linear"]["layers"][LAYER].update(weight_global_scale=3.0)), "codes .* E4M3 scales"),
        (
            edit("qat_patch.json", lambda m: m["linear"]["layers"][LAYER].update(input_global_scale=None)),
            "expected the global scales",
        ),
        (lambda f: change_tensors(f, lambda t: t.pop(f"{LAYER}.weight_scale")), "weight_scale is missing"),
        (
            lambda f: change_tensors(
                f, lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, 1:].contiguous()})
            ),
            "codes",
        ),
        (lambda f: change_tensors(f, lambda t: t.update(x=torch.zeros(2).to(torch.float8_e4m3fn))), "got 'x' of F8_E4M3"),
        (lambda f: change_tensors(f, lambda t: t[f"{LAYER}.weight_scale"].view(torch.uint8).fill_(127)), "not finite"),
    ],
)
def test_a_folder_that_was_edited_is_refused(tmp_path, tamper, message):
    folder = export_checkpoint(quantized(), tmp_path / "out")
    tamper(folder)
    reseal(folder)
    with pytest.raises(ValueError, match=message):
        verify_checkpoint(folder)
