"""Malicious export folders with a valid manifest: other tensors, names that point outside, code."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat_patch import export_checkpoint, load_checkpoint, patch_model
from qat_patch.checkpoint import quantizer
from support.models.exports import outcome
from support.models.tiny_qwen3 import tiny_qwen3
from support.runs.runs import reseal


def tensors_of(folder):
    file = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("qat_patch_"))[0]
    with safe_open(file, framework="pt") as stored:
        return file, load_file(file), stored.metadata()


def lose(tensors, name):
    del tensors[name]


def add(tensors, name):
    tensors["another.weight"] = tensors[name].clone()


def rename(tensors, name):
    tensors[f"{name}_"] = tensors.pop(name)


def transpose(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def flatten(tensors, name):
    tensors[name] = tensors[name].flatten()[:-1].clone()


@pytest.mark.parametrize("original", ["single", "sharded", "wan"])
@pytest.mark.parametrize("edit", [lose, add, rename, transpose, flatten])
def test_tensors_that_are_not_the_models_are_refused(originals, tmp_path, original, edit):
    shutil.copytree(originals / original, tmp_path / "out")
    file, tensors, metadata = tensors_of(tmp_path / "out")
    edit(tensors, sorted(tensors)[-1])
    save_file(tensors, file, metadata=metadata)
    reseal(tmp_path / "out")
    assert outcome(tmp_path / "out", originals / original) == "refused"


def test_shapes_are_checked_whichever_transformers_loads_them():
    """5.17 loads any shape where there is a quantizer."""
    model = tiny_qwen3()
    shapes = {name: x.shape for name, x in model.named_parameters()}
    quantizer._check_shapes(model, shapes)
    with pytest.raises(ValueError, match=r"model.norm.weight: expected \[3\], as the config says, got \[\d+\]"):
        quantizer._check_shapes(model, shapes | {"model.norm.weight": torch.Size([3])})


def test_headers_that_are_no_safetensors_are_refused(originals, tmp_path):
    for number, data in enumerate(
        [
            b"",
            b"\x00" * 8,
            b"\xff" * 64,
            (10**12).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"{}",
            b"\x80\x04K\x01.",
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(originals / "single", folder)
        (folder / "model.safetensors").write_bytes(data)
        reseal(folder)
        assert outcome(folder, originals / "single") == "refused"


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "", "model\x00.safetensors", "~/x"]
)
def test_names_in_an_index_cannot_leave_the_folder(originals, tmp_path, name):
    folder = tmp_path / "out"
    shutil.copytree(originals / "sharded", folder)
    # There is something to be found outside, and it would even fit.
    shutil.copy(next(folder.glob("model-00001*")), tmp_path / "elsewhere.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][min(index["weight_map"])] = name
    file.write_text(json.dumps(index))
    reseal(folder)
    with pytest.raises(ValueError, match="expected names of files in the folder"):
        load_checkpoint(folder)
    # And so in the manifest.
    shutil.copy(originals / "sharded" / file.name, file)
    reseal(folder)
    recorded = json.loads((folder / "qat_patch.json").read_text())["files"]
    reseal(folder, files=recorded | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match="expected names of files in the folder"):
        load_checkpoint(folder)


class Boom:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize(
    ("original", "file", "content", "message"),
    [
        ("single", "pytorch_model.bin", Boom(), "pytorch_model.bin, which could run code"),
        ("single", "modeling_x.py", "raise SystemExit", "modeling_x.py, which could run code"),
        ("wan", "diffusion_pytorch_model.bin", Boom(), "could run code"),
        ("adapters", "adapter_model.bin", Boom(), "could run code"),
        ("single", "adapter_config.json", "{}", "adapter_config.json, which was not there when it was exported"),
        ("single", "model-00001-of-00002.safetensors", "", "which was not there when it was exported"),
        ("single", "generation_config.json", '{"custom_generate": "x"}', "sets 'custom_generate', which could run code"),
        ("single", "config.json", {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "sets 'auto_map', which could run code"),
        ("single", "config.json", {"attn_implementation": "someone/kernel"}, "sets 'attn_implementation'"),
        ("wan", "config.json", {"auto_map": {"AutoModel": "m.M"}}, "sets 'auto_map', which could run code"),
        ("adapters", "adapter_config.json", {"auto_map": {"x": "m.M"}}, "sets 'auto_map'"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_what_could_run_code_is_refused(originals, tmp_path, original, file, content, message, sealed):
    folder = tmp_path / "out"
    shutil.copytree(originals / original, folder)
    if isinstance(content, Boom):
        torch.save(content, folder / file)
    elif isinstance(content, dict):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | content))
    else:
        (folder / file).write_text(content)
    if sealed:
        reseal(folder)
        message = message.replace("adapter_config.json, which was not there when it was exported", "holds adapters too")
        message = message.replace("which was not there when it was exported", "is no safetensors file")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_json_that_is_hard_to_read_is_refused(originals, tmp_path):
    text = (originals / "single" / "config.json").read_text()
    for number, data in enumerate(
        ["[" * 100_000, "[]", "null", '{"a": 1, "a": 2}', text.replace("{", '{"model_type": "qwen3",', 1), "\ud800", "9" * 10_000]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(originals / "single", folder)
        (folder / "config.json").write_bytes(data.encode("utf-8", "surrogatepass"))
        reseal(folder)
        assert outcome(folder, originals / "single") == "refused"


def test_pipelines_hold_classes_of_known_libraries_only(tmp_path):
    from support.models.tiny_wan import tiny_pipeline

    pipe = tiny_pipeline()
    patch_model(pipe)
    export_checkpoint(pipe, tmp_path / "out")
    file = tmp_path / "out" / "model_index.json"
    index = json.loads(file.read_text())
    for change in ({"vae": ["os", "system"]}, {"vae": ["diffusers", "a.b"]}, {"_class_name": ["pipeline", "P"]}, {"x": [[], 1]}):
        file.write_text(json.dumps(index | change))
        reseal(tmp_path / "out")
        with pytest.raises(ValueError, match="expected a class of diffusers or transformers"):
            load_checkpoint(tmp_path / "out")
