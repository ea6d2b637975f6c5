"""The weights of exports: each in its type, where the host library keeps float32, on disk, or quantized by others."""

import json

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.quantizers.gguf.utils import GGUFParameter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qat_patch import export_checkpoint, get_handle, load_checkpoint, patch_model, unpatch_model, verify_checkpoint
from support.models.exports import add_lora, logits, velocity
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import tiny_pipeline, tiny_transformer

BFLOAT16 = torch.bfloat16


def types(model):
    return {name: x.dtype for name, x in model.named_parameters()}


@pytest.mark.parametrize("adapters", [False, True])
def test_what_the_host_keeps_in_float32_is_not_rounded(tmp_path, adapters):
    tiny_transformer(layers=1).save_pretrained(tmp_path / "stock")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "stock", dtype=BFLOAT16)
    model = tiny_transformer(layers=1)
    if adapters:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "time_embedder.linear_1"]))  # which change nothing yet
    patch_model(model)
    export_checkpoint(model, tmp_path / "out", dtype="bfloat16")
    loaded = load_checkpoint(tmp_path / "out")
    assert types(loaded) == types(stock) and len({*types(stock).values()}) == 2
    assert all(torch.equal(x, stock.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_patterns_of_transformers(tmp_path):
    """`_keep_in_fp32_modules_strict` is for both narrow types, `_keep_in_fp32_modules` for float16 only."""
    model = tiny_qwen3(num_hidden_layers=1)
    model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"input_layernorm"}, {"k_norm"}
    patch_model(model)
    for dtype, kept in ((BFLOAT16, {"input_layernorm"}), (torch.float16, {"input_layernorm", "k_norm"})):
        with pytest.MonkeyPatch.context() as patch:  # norms of two types do not compute
            patch.setattr("qat_patch.checkpoint.export.default_inputs", lambda model, host: None)
            export_checkpoint(model, tmp_path / str(dtype), dtype=dtype)
        stored = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert {name.split(".")[-2] for name, x in stored.items() if x.dtype == torch.float32} == kept
        assert {name: x.dtype for name, x in load_checkpoint(tmp_path / str(dtype)).state_dict().items()}.items() >= {
            name: x.dtype for name, x in stored.items()
        }.items()


def test_models_that_were_cast_come_back_as_they_were(tmp_path):
    whole = tiny_transformer(layers=1).to(BFLOAT16)
    patch_model(whole)
    mixed = tiny_transformer(layers=1)
    mixed.blocks[0].ffn.to(BFLOAT16)  # another part than Diffusers would choose
    mixed.blocks[0].norm3.to(BFLOAT16)
    pipe = tiny_pipeline(layers=1).to(BFLOAT16)
    patch_model(pipe)
    for name, model in {"whole": whole, "pipe": pipe}.items():
        export_checkpoint(model, tmp_path / name)
        verify_checkpoint(tmp_path / name)
    assert types(load_checkpoint(tmp_path / "whole")) == types(whole)
    loaded = load_checkpoint(tmp_path / "pipe")
    for name in ("transformer", "text_encoder", "vae"):
        assert types(getattr(loaded, name)) == types(getattr(pipe, name)) and {*types(getattr(pipe, name)).values()} == {BFLOAT16}
    patch_model(mixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat_patch.checkpoint.export.default_inputs", lambda model, host: None)
        export_checkpoint(mixed, tmp_path / "mixed")
    again = load_checkpoint(tmp_path / "mixed")
    assert types(again) == types(mixed)
    assert all(torch.equal(x, mixed.state_dict()[name]) for name, x in again.state_dict().items())


def test_types_by_name(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    for dtype in ("bf16", "int8", torch.int8, 3):
        with pytest.raises(
            ValueError, match="export_checkpoint: dtype: expected one of float64, float32, float16, bfloat16, got"
        ):
            export_checkpoint(model, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())
    export_checkpoint(model, tmp_path / "out", dtype="bfloat16")
    assert load_checkpoint(tmp_path / "out").dtype == BFLOAT16
    assert load_checkpoint(tmp_path / "out", dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="load_checkpoint: dtype: expected one of"):
        load_checkpoint(tmp_path / "out", dtype="fp32")


class Packed(torch.Tensor):
    """Stands for the tensor classes of torchao and quanto."""


def gguf(model):
    linear = model.blocks[0].attn1.to_q
    linear.weight = GGUFParameter(linear.weight.detach(), requires_grad=False, quant_type=8)


def torchao(model):
    linear = model.blocks[0].attn1.to_q
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Packed))


def bytes_of(model):
    linear = model.blocks[0].attn1.to_q
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.uint8), requires_grad=False)


def eight_bits(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("quantize", [gguf, torchao, bytes_of, eight_bits])
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_that_others_quantized(tmp_path, quantize, adapters):
    model = tiny_transformer(layers=1)
    if adapters:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    quantize(model)
    patch_model(model)
    for target in (model, tiny_pipeline(layers=1)):
        if target is not model:
            if adapters:
                continue
            target.register_modules(transformer=model)
        with pytest.raises(ValueError, match=r"export_checkpoint: expected weights as ordinary tensors, .*merge_adapters=False"):
            export_checkpoint(target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_adapters_of_a_quantized_base(tmp_path):
    """The reference is computed on the base as `load_checkpoint` loads it; what 4 bits lose is no fault of the adapters."""
    tiny_transformer(layers=1).save_pretrained(tmp_path / "base")
    model = tiny_transformer(layers=1)
    with torch.no_grad():
        model.blocks[0].attn1.to_k.weight.mul_(1.05)  # as if quantized
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    patch_model(model)
    with pytest.raises(ValueError, match="computes something else than the model does"):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    linear = model.blocks[0].attn1.to_k
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Packed))
    export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "out")) == 2


def test_weights_on_disk(tmp_path):
    tiny_qwen3(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu")

    def load(number):
        folder = tmp_path / f"offload{number}"
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places | {"model.layers.1": "disk"}, offload_folder=folder
        )

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0], init_lora_weights=False)
    model = peft.get_peft_model(load(0), config)
    assert {x.device.type for x in model.parameters()} == {"cpu", "meta"}
    patch_model(model)
    expected = logits(model)
    for name, options in {"merged": {}, "alone": {"merge_adapters": False, "base_model": str(tmp_path / "base")}}.items():
        export_checkpoint(model, tmp_path / name, **options)
        torch.testing.assert_close(logits(load_checkpoint(tmp_path / name)), expected, rtol=1e-3, atol=1e-3)
    unpatch_model(model)
    lost = add_lora(load(1))
    patch_model(lost)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_A.default.weight has no values"):
        export_checkpoint(lost, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_diffusers_model_on_disk(tmp_path):
    tiny_transformer(layers=2).save_pretrained(tmp_path / "base")
    parts = ["rope", "patch_embedding", "condition_embedder", "blocks.0", "norm_out", "proj_out", "scale_shift_table"]
    places = dict.fromkeys(parts, "cpu") | {"blocks.1": "disk"}
    model = WanTransformer3DModel.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload")
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    assert torch.equal(velocity(load_checkpoint(tmp_path / "out")), velocity(model))


def test_what_is_written_about_the_training(tmp_path, monkeypatch):
    """Names of files and folders of this machine mean nothing elsewhere; names on the Hub do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    training = {
        "model": {"path": str(tmp_path), "revision": "main"},
        "data": {"dataset": "someone/stories", "train": ["clips/a.mp4", "~/b", "other/name"], "folder": tmp_path},
        "output_dir": "clips/run",
        "steps": 3,
    }
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    export_checkpoint(model, "out", training=training, base_model=str(tmp_path / "clips"))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = {"model": {"revision": "main"}, "data": {"dataset": "someone/stories", "train": ["other/name"]}, "steps": 3}
    assert block["training"] == expected
    assert get_handle(load_checkpoint("out")) is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "datasets:\n- someone/stories" in card and "pipeline_tag: text-generation" in card
    with pytest.raises(ValueError, match="training: expected plain values"):
        export_checkpoint(model, "again", training={"optimizer": object()})
    assert not (tmp_path / "again").exists()


def test_a_chat_template_that_is_added_later(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    assert get_handle(load_checkpoint(tmp_path / "out")) is not None
