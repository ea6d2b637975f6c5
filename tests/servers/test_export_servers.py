"""Exports for servers: ordinary folders to everybody else, and 4-bit attention to load_checkpoint."""

import copy
import dataclasses
import json
import logging
import subprocess
import sys

import peft
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import finetune_qwen3
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
from qat_patch.servers import AUTO_ENABLE, OTHERS, SERVERS, check_servable, check_spec, left_out
from support.models.exports import add_lora, logits, velocity
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import write_inputs
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.runs import command_line, reseal

SAGE = AttnQATConfig(spec=QuantSpec(preset="sage3"))


def config(preset="kv_nvfp4", **more):
    return AttnQATConfig(spec=QuantSpec(preset=preset), **more)


def qwen3(which=None, **options):
    model = tiny_qwen3(num_hidden_layers=2, **options)
    patch_model(model, which or config())
    return model


def wan(**options):
    return tiny_transformer(layers=1, head_dim=64, **options)


@pytest.mark.parametrize(
    ("server", "preset", "option"),
    [
        ("vllm", "kv_nvfp4", "nvfp4"),
        ("vllm", "kv_nvfp4_fp8", "nvfp4"),
        ("vllm", "kv_nvfp4_4over6", "nvfp4_4over6"),
        ("sglang", "kv_nvfp4", "nvfp4"),
        ("sglang", "kv_nvfp4_fp8", "nvfp4"),
    ],
)
def test_a_language_model_is_ordinary_to_others_and_4_bit_to_us(tmp_path, caplog, server, preset, option):
    model = qwen3(config(preset))
    folder = export_checkpoint(model, tmp_path / "out", server=server)
    # Servers refuse a config with a `quant_method` that they do not know.
    stored = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in stored and "qat_patch" not in json.dumps(stored)
    # And take every *.safetensors of a folder for weights.
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, framework="pt") as file:
        assert {*file.keys()} == model.state_dict().keys() - {"lm_head.weight" if model.config.tie_word_embeddings else ""}
    assert not (folder / "hf_quant_config.json").exists()
    text = (folder / "SERVING.md").read_text()
    assert f"--kv-cache-dtype {option} " in text and f"`{preset}`" in text and str(tmp_path) not in text
    assert ("vllm serve ." in text) == (server == "vllm")
    assert SERVERS[server].name in (folder / "README.md").read_text()

    loaded = load_checkpoint(folder)
    assert {spec.preset for spec in get_handle(loaded).specs.values()} == {preset}
    assert torch.equal(logits(loaded), logits(model))
    report = verify_checkpoint(folder)
    assert f"model, for {SERVERS[server].name}, written by" in report[0] and any("bit-equal" in line for line in report)

    with caplog.at_level(logging.WARNING):
        stock = AutoModelForCausalLM.from_pretrained(folder)
    assert get_handle(stock) is None and caplog.text == ""
    plain = copy.deepcopy(model)
    unpatch_model(plain)
    assert torch.equal(logits(stock), logits(plain)) and not torch.equal(logits(stock), logits(model))
    # Who patches it without a config means what it was made for.
    assert patch_model(stock).config == config(preset)
    assert torch.equal(logits(stock), logits(model))


def test_a_process_without_the_package_is_told_about_no_quantization(tmp_path):
    export_checkpoint(qwen3(), tmp_path / "out", server="vllm", auto_enable=True, dtype=torch.bfloat16)
    program = (
        "import sys; sys.modules['qat_patch'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model.config._attn_implementation, getattr(model, 'hf_quantizer', None), model.dtype)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sdpa", "None", "torch.bfloat16"] and "quantization" not in done.stderr


def test_what_switches_vllm_on_by_itself(tmp_path):
    folder = export_checkpoint(qwen3(head_dim=64), tmp_path / "out", server="vllm", auto_enable=True)
    auto = json.loads((folder / "hf_quant_config.json").read_text())
    assert auto == AUTO_ENABLE and auto["quantization"]["exclude_modules"] == ["*"]
    assert "vLLM needs no option" in (folder / "SERVING.md").read_text()
    load_checkpoint(folder)
    # A stranger's would make a server quantize something else.
    (folder / "hf_quant_config.json").write_text(json.dumps(auto | {"quantization": {"quant_algo": "FP8"}}))
    reseal(folder)
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: expected what switches vLLM's KV cache on"):
        load_checkpoint(folder)


def test_head_sizes_that_vllm_cannot_serve_are_reported(tmp_path):
    notes = {}
    for size in (32, 64, 128):
        export_checkpoint(qwen3(head_dim=size), tmp_path / str(size), server="vllm")
        notes[size] = "Head size" in (tmp_path / str(size) / "SERVING.md").read_text()
    export_checkpoint(qwen3(head_dim=64), tmp_path / "sglang", server="sglang")
    assert notes == {32: True, 64: True, 128: False}
    assert "Head size" not in (tmp_path / "sglang" / "SERVING.md").read_text()


def test_vllm_leaves_out_the_layers_that_were_left_out(tmp_path):
    model = qwen3(config(exclude=["model.layers.1.*"]))
    export_checkpoint(model, tmp_path / "out", server="vllm")
    assert "--kv-cache-dtype-skip-layers 1\n" in (tmp_path / "out" / "SERVING.md").read_text()
    assert list(get_handle(load_checkpoint(tmp_path / "out")).patched) == ["model.layers.0.self_attn"]


def test_an_image_encoder_has_no_cache_and_is_no_mixture():
    """Its attention is not causal: servers leave it as it is, and so may a patch."""
    model = qwen3(config(exclude=["*.1.*"]))
    handle = get_handle(model)
    assert left_out(handle) == ["model.layers.1.self_attn"]
    model.model.layers[1].self_attn.is_causal = False
    assert left_out(handle) == []
    for server in ("vllm", "sglang"):
        check_servable(server, handle)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="expected causal attention, which has a KV cache, got model.layers.0.self_attn"):
        check_servable("vllm", handle)


def test_adapters_alone(tmp_path):
    base = tiny_qwen3(num_hidden_layers=2)
    base.save_pretrained(tmp_path / "base")
    model = add_lora(base)
    patch_model(model, config())
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base")}
    for server, command in (
        ("vllm", "--enable-lora --max-lora-rank 8 --lora-modules tuned=."),
        ("sglang", "--lora-paths tuned=."),
    ):
        folder = export_checkpoint(model, tmp_path / server, server=server, **options)
        assert command in (folder / "SERVING.md").read_text()
        assert torch.equal(logits(load_checkpoint(folder)), logits(model))
        verify_checkpoint(folder)
    with pytest.raises(ValueError, match="adapters alone"):
        export_checkpoint(model, tmp_path / "auto", server="vllm", auto_enable=True, **options)
    other = tiny_qwen3(num_hidden_layers=2)
    dora = peft.get_peft_model(other, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    patch_model(dora, config())
    with pytest.raises(ValueError, match="expected plain LoRA, got LoraConfig with use_dora=True"):
        export_checkpoint(dora, tmp_path / "dora", server="vllm", **options)
    # Merged they are weights like others.
    export_checkpoint(model, tmp_path / "merged", server="vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "sglang", "vllm"]


def test_a_pipeline_for_sage_attention_3(tmp_path, caplog):
    pipe = tiny_pipeline(layers=1, head_dim=64)
    patch_model(pipe, SAGE)
    folder = export_checkpoint(pipe, tmp_path / "out", server="diffusers-sage3")
    assert "attention_quantization" not in (folder / "transformer" / "config.json").read_text()
    text = (folder / "SERVING.md").read_text()
    assert 'pipe.transformer.set_attention_backend("sage_blackwell_hub")' in text
    loaded = load_checkpoint(folder)
    assert torch.equal(velocity(loaded.transformer), velocity(pipe.transformer))
    verify_checkpoint(folder)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        stock = WanPipeline.from_pretrained(folder)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert get_handle(stock) is None and "quantization" not in caplog.text
    assert patch_model(stock).config == SAGE
    assert torch.equal(velocity(stock.transformer), velocity(pipe.transformer))
    unpatch_model(stock)
    assert patch_model(stock).config == AttnQATConfig()


def test_a_transformer_alone_and_modules_that_are_left_out(tmp_path):
    model = wan()
    patch_model(model, dataclasses.replace(SAGE, exclude=("*.attn2",)))
    folder = export_checkpoint(model, tmp_path / "out", server="diffusers-sage3", component="transformer", base_model="some/wan")
    text = (folder / "SERVING.md").read_text()
    assert 'WanPipeline.from_pretrained("some/wan", transformer=transformer' in text
    # What it runs to find the modules is there.
    (code,) = [part.removeprefix("python\n") for part in text.split("```") if part.startswith("python\n")]
    record = json.loads((folder / "qat_patch.json").read_text())
    assert record["attention"][""]["groups"][0]["modules"] == ["blocks.0.attn1"]
    assert 'record["attention"][""]["groups"][0]["modules"]' in code
    compile(code, "SERVING.md", "exec")
    stock = WanTransformer3DModel.from_pretrained(folder)
    assert list(patch_model(stock).patched) == ["blocks.0.attn1"]
    assert torch.equal(velocity(load_checkpoint(folder)), velocity(model))


def test_adapters_of_a_transformer_for_sage_attention_3(tmp_path):
    pipe = tiny_pipeline(layers=1, head_dim=64)
    pipe.save_pretrained(tmp_path / "base")
    model = add_lora(pipe.transformer)
    patch_model(model, SAGE)
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base"), "component": "transformer"}
    folder = export_checkpoint(model, tmp_path / "out", server="diffusers-sage3", **options)
    assert 'pipe.load_lora_weights(".")' in (folder / "SERVING.md").read_text()
    assert torch.equal(velocity(load_checkpoint(folder)), velocity(model))


def test_the_libraries_take_their_arguments_by_name(tmp_path):
    """What is wrapped to find the record has the signature that it had."""
    wan().save_pretrained(tmp_path / "wan")
    base = tiny_qwen3(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "qwen3")
    add_lora(base).save_pretrained(tmp_path / "lora")
    for kind, name in ((WanTransformer3DModel, "wan"), (Qwen3ForCausalLM, "qwen3")):
        kind.from_pretrained(pretrained_model_name_or_path=tmp_path / name)
    plain = Qwen3ForCausalLM.from_pretrained(tmp_path / "qwen3")
    peft.PeftModel.from_pretrained(model=plain, model_id=str(tmp_path / "lora"))


MIXED = {"*.1.*": QuantSpec(preset="kv_nvfp4_fp8")}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (qwen3, {"server": "tgi"}, "server: expected one of vllm, sglang, diffusers-sage3 or None, got 'tgi'"),
        (lambda: qwen3(AttnQATConfig()), {"server": "vllm"}, r"vLLM computes kv_nvfp4 \(sm_80, sm_90, sm_120\).* is 'nvfp4'"),
        (lambda: qwen3(config("fa4_fp4")), {"server": "vllm"}, "is 'fa4_fp4'"),
        (lambda: qwen3(config("kv_nvfp4_4over6")), {"server": "sglang"}, "SGLang computes .* is 'kv_nvfp4_4over6'"),
        (lambda: qwen3(AttnQATConfig(spec=QuantSpec(rotate=True))), {"server": "sglang"}, "is 'nvfp4'"),
        (lambda: qwen3(config(overrides=MIXED)), {"server": "vllm"}, "one preset for all modules, got kv_nvfp4, kv_nvfp4_fp8"),
        (lambda: qwen3(config(exclude=["*.0.*"])), {"server": "sglang"}, "one KV cache for all layers"),
        (lambda: qwen3(config(exclude=["*.0.*"])), {"server": "vllm", "auto_enable": True}, "layers that are left out"),
        (lambda: qwen3(config("kv_nvfp4_4over6")), {"server": "vllm", "auto_enable": True}, "with kv_nvfp4_4over6"),
        (qwen3, {"server": "sglang", "auto_enable": True}, "auto_enable: expected server='vllm'"),
        (qwen3, {"auto_enable": True}, "auto_enable: has no effect without server='vllm'"),
        (qwen3, {"server": "diffusers-sage3"}, "Diffusers with SageAttention3 computes sage3"),
        (lambda: patched_wan(SAGE), {"server": "vllm"}, "is 'sage3'"),
        (lambda: patched_wan(config()), {"server": "vllm"}, "expected a model of transformers, got one of diffusers"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        export_checkpoint(make(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def patched_wan(which):
    model = wan()
    patch_model(model, which)
    return model


@pytest.mark.parametrize(("which", "words"), [("k_shift", "K shifts"), ("q_shift", "Q shifts")])
def test_shifts_are_refused_because_no_server_subtracts_them(which, words):
    model = tiny_qwen3(num_hidden_layers=2)
    handle = patch_model(model, config(), **{which: {"model.layers.1.self_attn": torch.ones(2, 32)}})
    with pytest.raises(ValueError, match=f"server='vllm': expected no {words}, which vLLM does not subtract, got 1"):
        check_servable("vllm", handle)


def test_damaged_records_are_refused(tmp_path):
    folder = export_checkpoint(qwen3(), tmp_path / "out", server="vllm")
    manifest = json.loads((folder / "qat_patch.json").read_text())
    attention = manifest["attention"]
    for change, message in (
        ({"server": "tgi"}, "server: expected one of vllm"),
        ({"server": ["vllm"]}, "server: expected one of vllm"),
        ({"server": None}, "attention: expected metadata"),
        ({"attention": None}, "attention: expected metadata"),
        ({"attention": attention | {"..": attention[""]}}, "attention: expected metadata"),
        ({"attention": {}}, "attention: expected metadata"),
    ):
        reseal(folder, **manifest | change)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(folder)
    config_file = folder / "config.json"
    stored = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(stored | {"quantization_config": attention[""]}))
    reseal(folder, **{key: manifest[key] for key in ("server", "attention")})
    with pytest.raises(ValueError, match="sets 'quantization_config'"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change", [{"attention": None}, {"attention": []}, {"attention": {"": 3}}, {"server": None}, {"server": []}]
)
def test_ordinary_loading_does_not_mind_a_damaged_record(tmp_path, change):
    folder = export_checkpoint(qwen3(), tmp_path / "out", server="vllm")
    manifest = json.loads((folder / "qat_patch.json").read_text())
    (folder / "qat_patch.json").write_text(json.dumps(manifest | change))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert patch_model(model).config == AttnQATConfig()


def test_a_record_that_is_not_json_is_reported_and_the_weights_are_loaded(tmp_path, caplog):
    folder = export_checkpoint(qwen3(), tmp_path / "out", server="vllm")
    (folder / "qat_patch.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert "patch_model will not know which attention this model was trained for" in caplog.text
    assert patch_model(model).config == AttnQATConfig()


def test_a_name_on_the_hub_is_known_as_its_folder_is(tmp_path):
    """Patched without a config it runs what it was trained for, and not the default."""
    snapshot = tmp_path / "models--someone--served" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    export_checkpoint(qwen3(), tmp_path / "out", server="vllm").rename(snapshot)
    (tmp_path / "models--someone--served" / "refs").mkdir()
    (tmp_path / "models--someone--served" / "refs" / "main").write_text("0123")
    model = AutoModelForCausalLM.from_pretrained("someone/served", cache_dir=tmp_path, local_files_only=True)
    assert {layer.spec.preset for layer in patch_model(model).patched.values()} == {"kv_nvfp4"}


def test_saving_over_an_export_leaves_nothing_of_it(tmp_path):
    folder = export_checkpoint(qwen3(), tmp_path / "out", server="vllm", auto_enable=True)
    tiny_qwen3(num_hidden_layers=2).save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}


def test_every_preset_of_a_server_has_one():
    """Some server has each preset except our own, and each such preset can be exported for it."""
    ours = {"nvfp4", "nvfp4_qk"}
    served = {offer.preset for about in SERVERS.values() for offer in about.offers}
    names = QuantSpec.__dataclass_fields__["preset"].type
    from qat_kernels.spec import Preset

    assert names == "Preset" and {*Preset.__args__} == ours | served | OTHERS.keys()
    for server, about in SERVERS.items():
        for offer in about.offers:
            check_spec(server, QuantSpec(preset=offer.preset))


def recipe(tmp_path, **settings):
    changes = {"model.path": tmp_path / "model", "data.train.path": tmp_path / "train.txt", "output_dir": tmp_path / "run"}
    changes |= {"data.sequence_length": 64, "steps": 1, "batch_size": 1, "learning_rate": 1e-4} | settings
    return finetune_qwen3.main(command_line(changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.export_server": "vllm"}, "model.export_server: server='vllm': vLLM computes .*; qat.spec.preset is 'nvfp4'"),
        ({"model.export_server": "tgi"}, "export_server"),
        (
            {"model.export_server": "sglang", "qat.spec.preset": "kv_nvfp4", "qat.exclude": "['*.0.*']"},
            "one KV cache for all layers",
        ),
    ],
)
def test_a_recipe_refuses_before_it_trains(tmp_path, fresh_accelerate, settings, message):
    write_inputs(tmp_path)
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
