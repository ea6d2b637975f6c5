"""Damaged and hostile export folders: each ends in a ValueError that names the trouble, or loads exactly what was exported."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat_patch import AttnQATConfig, export, export_checkpoint, files, get_handle, load_checkpoint, patch_model
from runs import reseal
from test_export_wan import add_lora
from tiny_qwen3 import tiny_qwen3, token_ids
from tiny_wan import tiny_transformer

# Small: a case is a copy of the folder and an attempt to load it.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32, "vocab_size": 64}
CONFIG = AttnQATConfig(exclude=["*.0.*"])


class Boom:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One file, shards with an index, a Wan transformer, adapters alone."""
    folder = tmp_path_factory.mktemp("originals")
    model = tiny_qwen3(**TINY)
    model.save_pretrained(folder / "base")
    patch_model(model, CONFIG)
    export_checkpoint(model, folder / "single", training={"steps": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_SHARD_SIZE", "20KB")
        export_checkpoint(model, folder / "sharded")
    wan = tiny_transformer(layers=2)
    patch_model(wan, CONFIG)
    export_checkpoint(wan, folder / "wan")
    adapters = add_lora(tiny_qwen3(**TINY))
    patch_model(adapters, CONFIG)
    export_checkpoint(adapters, folder / "adapters", merge_adapters=False, base_model=str(folder / "base"))
    return folder


def outcome(folder, original):
    """`refused`, or `loaded` if what comes out is what was exported; anything else is a failure."""
    try:
        model = load_checkpoint(folder)
    except ValueError as error:
        assert len(str(error)) > 20 and str(error).startswith(
            ("load_checkpoint", "attention block", "AttnQATConfig", "QuantSpec", str(folder))
        )
        return "refused"
    expected = load_checkpoint(original)
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in model.state_dict().items())
    assert {name: x.spec for name, x in get_handle(model).patched.items()} == {
        name: x.spec for name, x in get_handle(expected).patched.items()
    }
    if hasattr(model, "lm_head"):
        with torch.no_grad():
            ids = token_ids(1, 20) % TINY["vocab_size"]
            assert torch.equal(model(ids).logits, expected(ids).logits)
    return "loaded"


# --- damage: bits flip, files are cut, emptied, exchanged or lost, and the manifest knows nothing of it.


def flip(data, generator):
    position = generator.randrange(len(data))
    return data[:position] + bytes([data[position] ^ (1 << generator.randrange(8))]) + data[position + 1 :]


def damage(folder, kind, generator):
    names = sorted(file.name for file in folder.iterdir())
    file = folder / generator.choice(names)
    data = file.read_bytes()
    if kind == "flip":
        file.write_bytes(flip(data, generator))
    elif kind == "cut":
        file.write_bytes(data[: generator.randrange(len(data))])
    elif kind == "grow":
        file.write_bytes(data + generator.randbytes(7))
    elif kind == "lose":
        file.unlink()
    elif kind == "exchange":
        other = folder / generator.choice([name for name in names if name != file.name])
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "noise":
        file.write_bytes(generator.randbytes(len(data)))
    return file.name


@pytest.mark.parametrize("original", ["single", "sharded", "wan", "adapters"])
def test_damage_is_found(originals, tmp_path, original):
    kinds = ["flip"] * 16 + ["cut", "grow", "lose", "exchange", "noise"] * 4
    for number, kind in enumerate(kinds):
        folder = tmp_path / str(number)
        shutil.copytree(originals / original, folder)
        name = damage(folder, kind, random.Random(number))
        # The model card is for people: it may change.
        harmless = name == "README.md" and kind != "exchange"
        found = outcome(folder, originals / original)
        assert found == "loaded" if harmless else found == "refused", (kind, name)
        shutil.rmtree(folder)


# --- hostile: the same, and the manifest lies, as someone who means harm would have it.

WEIRD = [None, True, -1, 0, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "a\x00b", [], [[]], {}, {"a": {}}]
CHANGES = ["replace", "delete", "add"]


def places(value, path=()):
    """Every key and index of nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(content, generator):
    path = generator.choice(list(places(content)))
    target = content
    for key in path[:-1]:
        target = target[key]
    change = generator.choice(CHANGES)
    if change == "replace":
        target[path[-1]] = generator.choice(WEIRD)
    elif change == "delete":
        del target[path[-1]]
    elif isinstance(target, dict):
        target[f"new_{path[-1]}"] = generator.choice(WEIRD)
    else:
        target.append(generator.choice(WEIRD))
    return path


def block_of(config):
    return config[next(key for key in ("quantization_config", "attention_quantization") if key in config)]


@pytest.mark.parametrize("original", ["single", "wan", "adapters"])
def test_hostile_blocks_are_refused(originals, tmp_path, original):
    """Config and headers agree with each other, and the block itself is wrong."""
    for number in range(25):
        folder, generator = tmp_path / str(number), random.Random(number)
        shutil.copytree(originals / original, folder)
        file = folder / ("qat_patch.json" if original == "adapters" else "config.json")
        content = json.loads(file.read_text())
        block = content["attention"] if original == "adapters" else block_of(content)
        before = json.dumps(block, sort_keys=True)
        path = mutate(block, generator)
        file.write_text(json.dumps(content))
        for weights in folder.glob("*.safetensors"):
            if not weights.name.startswith("qat_patch_"):
                header = {"format": "pt", "qat_patch": json.dumps(block, sort_keys=True)}
                save_file(load_file(weights), weights, metadata=header)
        reseal(folder)
        # What the package version is, and how it was trained, is for people, and what the config leaves out is its default; the
        # rest is exact.
        free = path[0] in ("training", "package_version") or (path[0] == "attention" and len(path) > 1)
        free |= json.dumps(block, sort_keys=True) == before
        found = outcome(folder, originals / original)
        assert found == "refused" or free, (path, before)
        shutil.rmtree(folder)


@pytest.mark.parametrize("original", ["single", "sharded", "adapters"])
def test_hostile_manifests_and_indices_are_refused(originals, tmp_path, original):
    file_name, found = "model.safetensors.index.json" if original == "sharded" else "qat_patch.json", []
    for number in range(20):
        folder, generator = tmp_path / str(number), random.Random(number)
        shutil.copytree(originals / original, folder)
        content = json.loads((folder / file_name).read_text())
        mutate(content, generator)
        if file_name == "qat_patch.json":
            content = files.sealed({key: value for key, value in content.items() if key != "sha256"})
        (folder / file_name).write_text(json.dumps(content))
        if file_name != "qat_patch.json":
            reseal(folder)
        # Some change nothing, such as the total size in an index: then what was exported must come out.
        found.append(outcome(folder, originals / original))
        shutil.rmtree(folder)
    assert found.count("refused") >= 12


@pytest.mark.parametrize("original", ["single", "wan"])
def test_hostile_configs_load_as_exported_or_are_refused(originals, tmp_path, original):
    for number in range(20):
        folder, generator = tmp_path / str(number), random.Random(number)
        shutil.copytree(originals / original, folder)
        content = json.loads((folder / "config.json").read_text())
        key = generator.choice(["hidden_size", "num_hidden_layers", "head_dim", "vocab_size", "model_type", "architectures"])
        if original == "wan":
            key = generator.choice(
                ["num_layers", "num_attention_heads", "attention_head_dim", "_class_name", "ffn_dim", "text_dim"]
            )
        content[key] = generator.choice([None, 3, 7, "x", [], {}, "../x", -1])
        (folder / "config.json").write_text(json.dumps(content))
        reseal(folder)
        outcome(folder, originals / original)
        shutil.rmtree(folder)


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
    from tiny_wan import tiny_pipeline

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
