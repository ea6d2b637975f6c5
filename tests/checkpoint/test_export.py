"""export_checkpoint and load_checkpoint: round trips, loading without the package, and damaged folders."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qat_patch
from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, get_handle, load_checkpoint, patch_model, unpatch_model
from qat_patch.checkpoint import export
from qat_patch.checkpoint.lock import locked
from support.models.exports import add_lora, logits
from support.models.tiny_qwen3 import tiny_qwen3
from support.runs.runs import reseal

CONFIG = AttnQATConfig(spec=QuantSpec(rotate=True), exclude=["model.layers.0.*"])


@pytest.fixture
def exported(tmp_path):
    """A patched model and the folder it was exported to."""
    model = tiny_qwen3()
    patch_model(model, CONFIG)
    export_checkpoint(model, tmp_path / "out", training={"steps": 3, "optimizer": {"lr": 1e-5}}, metrics={"eval_loss_fp4": 1.25})
    return model, tmp_path / "out"


def edit_block(folder, edit):
    """As if it had been exported so: in the config, and in the manifest's hashes."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))
    reseal(folder)


def test_round_trip_is_bit_equal(exported):
    model, folder = exported
    loaded = load_checkpoint(folder)
    assert get_handle(loaded).config == CONFIG
    assert list(get_handle(loaded).patched) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(stock), logits(model))


def test_what_the_folder_says(exported):
    _, folder = exported
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "qat_patch"
    assert block["format_version"] == 3
    assert block["package_version"] == qat_patch.__version__
    assert AttnQATConfig.from_dict(block["attention"]) == CONFIG
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["qat_patch"]) == block
        assert file.metadata()["format"] == "pt"
    card = (folder / "README.md").read_text()
    assert "| optimizer.lr | 1e-05 |" in card and "| eval_loss_fp4 | 1.25 |" in card and "with rotation" in card
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_a_fresh_process_without_the_package_loads_ordinary_attention(exported):
    model, folder = exported
    unpatch_model(model)
    program = (
        "import sys, torch; sys.modules['qat_patch'] = sys.modules['qat_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(model.config._attn_implementation, model(torch.arange(3, 40)[None]).logits.double().sum().item().hex())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = model(torch.arange(3, 40)[None]).logits.double().sum().item().hex()
    assert done.stdout.split() == ["sdpa", expected]


@pytest.mark.parametrize("first", ["qat_patch", "transformers"])
def test_from_pretrained_patches_whichever_is_imported_first(exported, first):
    _, folder = exported
    second = {"qat_patch": "transformers", "transformers": "qat_patch"}[first]
    program = (
        f"import {first}, {second}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(len(qat_patch.get_handle(model).patched))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_save_pretrained_of_a_loaded_export_keeps_the_patch(exported, tmp_path):
    model, folder = exported
    loaded = load_checkpoint(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    with pytest.raises(ValueError, match=r"not written by this version's export_checkpoint"):
        load_checkpoint(tmp_path / "again")
    unpatch_model(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    export_checkpoint(load_checkpoint(folder), tmp_path / "exported-again", dtype=torch.bfloat16)
    assert load_checkpoint(tmp_path / "exported-again").dtype == torch.bfloat16


def test_dtype_sharding_and_loaded_dtype(exported, tmp_path, monkeypatch):
    model, folder = exported
    monkeypatch.setattr(export, "_SHARD_SIZE", "100KB")
    export_checkpoint(model, tmp_path / "sharded", dtype=torch.bfloat16)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load_checkpoint(tmp_path / "sharded")
    assert loaded.dtype == torch.bfloat16
    expected = {name: x.bfloat16() for name, x in model.state_dict().items()}
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    assert load_checkpoint(folder, dtype=torch.float64).dtype == torch.float64
    assert logits(loaded.half()).dtype == torch.float16


def test_patch_model_finds_the_stored_config(exported):
    _, folder = exported
    model = load_checkpoint(folder)
    block = model.config.quantization_config.to_dict()
    unpatch_model(model)
    model.config.quantization_config = block  # what transformers leaves there when it does not know the method
    assert patch_model(model).config == CONFIG


def test_export_refuses(tmp_path):
    model = tiny_qwen3()
    with pytest.raises(ValueError, match="not patched"):
        export_checkpoint(model, tmp_path / "out")
    patch_model(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        export_checkpoint(model, tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_qwen3()
    patch_model(model)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_load_refuses_what_is_not_an_export(tmp_path, exported):
    model, _ = exported
    with pytest.raises(ValueError, match=r"qat_patch.json does not exist; expected a folder"):
        load_checkpoint(tmp_path / "nowhere")
    unpatch_model(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="load it with its own library and call patch_model"):
        load_checkpoint(tmp_path / "plain")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda block: block.update(format_version=4), "reads format_version 2 and 3, got 4; it is newer: upgrade"),
        (lambda block: block.update(format_version=1), "reads format_version 2 and 3, got 1; it is older: export again"),
        (lambda block: block.pop("format_version"), "reads format_version 2 and 3, got None; it is damaged"),
        (lambda block: block.update(quant_method="other"), "has no attention metadata of qat_patch"),
        (lambda block: block.update(group=[]), "unknown key 'group'.*did you mean 'groups'"),
        (lambda block: block.pop("groups"), "the key 'groups' is missing"),
        (lambda block: block.update(groups="all"), "groups: expected a list of groups"),
        (lambda block: block.update(training=3), "training: expected a mapping or null, got 3"),
        (lambda block: block.update(k_shift="../shift"), "k_shift: expected a SHA-256 or null"),
        (lambda block: block.update(q_shift=3), "q_shift: expected a SHA-256 or null, got 3"),
        (lambda block: block["groups"][0].update(modules="all"), "modules: expected a list of module names"),
        (lambda block: block["groups"].append(block["groups"][0]), "model.layers.1.self_attn occurs twice"),
        (lambda block: block["groups"][0]["spec"].pop("rotate"), "spec: the key 'rotate' is missing"),
        (
            lambda block: block["groups"][0]["numerics"]["value"].update(axis="head_dim"),
            "computes value as .*'axis': 'key_tokens'",
        ),
        (lambda block: block["groups"][0]["numerics"].update(rotation=None), "computes rotation as .*the export expects None"),
        (lambda block: block["attention"].update(exlude=[]), "unknown key 'exlude'.*did you mean 'exclude'"),
        (lambda block: block["attention"]["spec"].update(preset="fp8"), "QuantSpec.preset: expected one of nvfp4, .*, got 'fp8'"),
        (lambda block: block["attention"].update(exclude=[]), "attention metadata in model.safetensors differs"),
    ],
)
def test_a_damaged_block_is_refused(exported, edit, message):
    _, folder = exported
    edit_block(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda block: block["groups"][0].update(modules=["model.layers.1.self_attn", "model.layers.7.self_attn"]),
            r"missing: \['model.layers.7.self_attn'\], not in the export: \['model.layers.2.self_attn'\]",
        ),
        (
            lambda block: block["attention"]["spec"].update(rotate=False),
            r"`groups` says .*rotate=True.* its config .*rotate=False",
        ),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(exported, edit, message):
    _, folder = exported
    edit_block(folder, edit)
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "qat_patch": json.dumps(block, sort_keys=True)})
    reseal(folder)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_the_block_says_in_full_what_inference_has_to_do(exported):
    _, folder = exported
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = block["groups"]
    assert group["modules"] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert group["spec"] == {"preset": "nvfp4", "rotate": True, "four_over_six": False}
    assert {name: group["numerics"][name]["axis"] for name in ("query", "key", "value", "probabilities")} == {
        "query": "head_dim",
        "key": "head_dim",
        "value": "key_tokens",
        "probabilities": "key_tokens",
    }
    assert [group["numerics"][name]["global_scale"] for name in ("query", "key", "value", "probabilities")] == [1, 1, 1, 2688]
    assert group["numerics"]["kept_groups"] == {"causal": ["sink", "open"], "not_causal": []}
    assert group["numerics"]["rotation"]["entry"] == 0.125
    assert block["training"] == {"steps": 3, "optimizer": {"lr": 1e-5}}
    assert re.fullmatch(r"\d+\.\d+\.\d+", block["package_version"])


def test_adapters_of_an_export(tmp_path):
    """They are patched as they were trained, even if the export that they started from says otherwise."""
    base = tiny_qwen3()
    patch_model(base, AttnQATConfig(spec=QuantSpec(rotate=True)))
    export_checkpoint(base, tmp_path / "base")
    started = load_checkpoint(tmp_path / "base")
    unpatch_model(started)
    model = add_lora(started)
    patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    export_checkpoint(model, tmp_path / "adapters", merge_adapters=False, base_model=str(tmp_path / "base"))
    again = load_checkpoint(tmp_path / "adapters")
    assert get_handle(again).config == get_handle(model).config and torch.equal(logits(again), logits(model))


def test_windows_is_refused_by_name(exported, tmp_path, monkeypatch):
    model, folder = exported
    monkeypatch.setattr("platform.system", lambda: "Windows")
    refused = {
        "export_checkpoint": lambda: export_checkpoint(model, tmp_path / "other"),
        "load_checkpoint": lambda: load_checkpoint(folder),
        "output_dir": lambda: locked(tmp_path / "run", "output_dir").__enter__(),
    }
    for what, call in refused.items():
        with pytest.raises(ValueError, match=f"{what}: expected Linux or macOS, .* got Windows; use WSL 2"):
            call()
    assert not (tmp_path / "other").exists() and not (tmp_path / "run").exists()
