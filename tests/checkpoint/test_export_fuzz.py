"""Export folders changed at random: each ends in a ValueError that names the trouble, or loads exactly what was exported."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qat_patch.checkpoint import integrity
from support.models.exports import outcome
from support.models.hostile_configs import mutate
from support.runs.runs import reseal

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


@pytest.mark.parametrize("original", ["single", "sharded", "wan", "adapters", "server"])
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


def block_of(config):
    return config[next(key for key in ("quantization_config", "_attention_quantization") if key in config)]


@pytest.mark.parametrize("original", ["single", "wan", "adapters", "server"])
def test_hostile_blocks_are_refused(originals, tmp_path, original):
    """Config and headers agree with each other, and the block itself is wrong."""
    for number in range(25):
        folder, generator = tmp_path / str(number), random.Random(number)
        shutil.copytree(originals / original, folder)
        file = folder / ("qat_patch.json" if original in ("adapters", "server") else "config.json")
        content = json.loads(file.read_text())
        block = content["attention"] if original in ("adapters", "server") else block_of(content)
        block = block[""] if original == "server" else block
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


@pytest.mark.parametrize("original", ["single", "sharded", "adapters", "server"])
def test_hostile_manifests_and_indices_are_refused(originals, tmp_path, original):
    file_name, found = "model.safetensors.index.json" if original == "sharded" else "qat_patch.json", []
    for number in range(20):
        folder, generator = tmp_path / str(number), random.Random(number)
        shutil.copytree(originals / original, folder)
        content = json.loads((folder / file_name).read_text())
        mutate(content, generator)
        if file_name == "qat_patch.json":
            content = integrity.sealed({key: value for key, value in content.items() if key != "sha256"})
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
