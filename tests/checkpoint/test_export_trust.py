"""Exports of strangers: which files a folder may hold, what is read while others write to it, and what reaches a terminal."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma4TextConfig

from qat_patch import calibrate, export_checkpoint, load_checkpoint, patch_model, verify_checkpoint
from qat_patch.checkpoint import integrity, load
from qat_patch.checkpoint.trust import allowed_keys, private_copy
from qat_patch.checkpoint.trust.adapter_keys import is_soon_matched
from support.models.exports import TINY, outcome
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import reseal


@pytest.fixture
def copy_of(originals, tmp_path):
    def copied(name, to="out"):
        return shutil.copytree(originals / name, tmp_path / to)

    return copied


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file, change, **header):
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() | header
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


# --- what may lie in a folder


def test_what_belongs_to_an_export_loads(copy_of, originals):
    folder = copy_of("single")
    (folder / "LICENSE").write_text("for people")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30, "eos_token": "</s>", "my_number": 3}))
    edit(folder / "config.json", a_number=3, rope_interleaved=False)
    reseal(folder)
    # Added later, and not sealed: for people, and what downloads leave.
    for name in ("NOTICE.txt", "losses.png", "a clip.mp4", ".gitattributes"):
        (folder / name).write_text("for people")
    for name in (".git", ".cache"):
        (folder / name).mkdir()
        (folder / name / "hook.py").write_text("raise SystemExit")
    assert outcome(folder, originals / "single") == "loaded"


@pytest.mark.parametrize(
    "name",
    ["a.pyc", "b.so", ".env", "core/__init__.pyc", "x/config.json", "run.sh", "setup.cfg", "model.SAFETENSORS", "dir/README.md"],
)
def test_other_files_are_refused(copy_of, name):
    folder = copy_of("single")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    for sealed in (False, True):
        if sealed:
            reseal(folder)
        with pytest.raises(ValueError, match="could run code or is unknown|expected names of files"):
            load_checkpoint(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "inside", "pipe"])
def test_links_and_pipes_are_refused(copy_of, tmp_path, kind):
    folder = copy_of("single")
    if kind == "file":
        shutil.move(folder / "config.json", tmp_path / "elsewhere.json")
        (folder / "config.json").symlink_to("../elsewhere.json")
    elif kind == "folder":
        (tmp_path / "elsewhere").mkdir()
        (folder / "additional_chat_templates").symlink_to("../elsewhere")
    elif kind == "dangling":
        (folder / "notes.txt").symlink_to("../nowhere")
    elif kind == "inside":
        (folder / "tokenizer.json").symlink_to("config.json")
    else:
        os.mkfifo(folder / "merges.txt")
    for check in (load_checkpoint, verify_checkpoint):
        with pytest.raises(ValueError, match="is a link, or no regular file"):
            check(folder)


def test_texts_under_unknown_keys_are_refused_and_left_out_of_exports(copy_of, tmp_path, caplog):
    folder = copy_of("single")
    edit(folder / "config.json", something="someone/repository")
    reseal(folder)
    with pytest.raises(ValueError, match="sets 'something', which could run code from elsewhere or is unknown"):
        load_checkpoint(folder)
    model = tiny_qwen3(**TINY)
    model.config.something = "someone/repository"
    patch_model(model)
    load_checkpoint(export_checkpoint(model, tmp_path / "exported"))
    assert "left out what the installed library does not know: 'something'" in caplog.text
    model.config.backbone = "resnet18"
    with pytest.raises(ValueError, match="'backbone', which could run code from elsewhere; expected a model without it"):
        export_checkpoint(model, tmp_path / "live")
    assert not (tmp_path / "live").exists()


@pytest.mark.parametrize("key", ["transformers_weights", "to_dict", "_private", "experts_implementation", "quantization_config"])
def test_keys_that_a_host_library_would_obey_are_refused(copy_of, key):
    folder = copy_of("wan" if key == "quantization_config" else "single")
    edit(folder / "config.json", **{key: 1})
    reseal(folder)
    with pytest.raises(ValueError, match=f"sets '{key}'"):
        load_checkpoint(folder)


def test_what_some_layers_have_in_place_of_the_rest():
    config = json.loads(Gemma4TextConfig(num_hidden_layers=6).to_json_string())
    assert config["per_layer_config"] == {"5": {"head_dim": 512}}

    def refused(layers):
        return list(allowed_keys.refused("it", "config.json", config | {"per_layer_config": layers}))

    assert refused(config["per_layer_config"]) == refused({}) == []
    for key in ("auto_map", "_attn_implementation", "quantization_config"):
        assert refused({"5": {"head_dim": 512, key: {"x": "e.T"}}}) == [f"per_layer_config.5.{key}"]
    assert refused({"5": 3, "x": {}}) == ["per_layer_config.5", "per_layer_config.x"]


def test_sizes_are_no_counts():
    """Of models as they are published: what is as large as a vocabulary, in spite of a layer or an expert in its name."""
    for model_type in ("gemma3n_text", "gemma4_text", "qwen2_moe", "nemotron_h", "moshi"):
        config = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        allowed_keys.check_sizes("it", "config.json", config, tensors=300, numbers=10**9)
    for key in ("num_hidden_layers", "block_sizes", "num_experts"):
        with pytest.raises(ValueError, match=f"{key}: expected at most 4096"):
            allowed_keys.check_sizes("it", "config.json", {key: 262144}, tensors=300, numbers=10**9)


def test_pipelines(tmp_path):
    pipe = tiny_pipeline(i2v=True, layers=1)
    patch_model(pipe)
    folder = export_checkpoint(pipe, tmp_path / "out")
    config = folder / "scheduler" / "scheduler_config.json"
    # Of another scheduler, as from_config leaves them; and what no component is.
    edit(config, solver_type="bh2", flow_shift=3.0)
    reseal(folder)
    assert load_checkpoint(folder).scheduler.config.shift == 3.0
    shutil.copytree(folder, tmp_path / "copy")

    def refused(change, message):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        change()
        reseal(folder)
        for check in (load_checkpoint, verify_checkpoint):
            with pytest.raises(ValueError, match=message):
                check(folder)

    refused(lambda: edit(config, num_train_timesteps=10**10), "num_train_timesteps: expected at most")
    refused(lambda: edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["e.T", None]}), "'auto_map'")
    refused(lambda: edit(folder / "tokenizer" / "tokenizer_config.json", vocab_file="/etc/passwd"), "'vocab_file'")
    refused(lambda: edit(folder / "image_processor" / "preprocessor_config.json", auto_map={"x": "e.T"}), "'auto_map'")
    refused(
        lambda: edit(folder / "text_encoder" / "config.json", quantization_config={"quant_method": "torchao"}), "'quantization"
    )
    # Both libraries would make up what is missing.
    encoder, vae = folder / "text_encoder" / "model.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"
    for file in (encoder, vae):
        refused(lambda file=file: edit_weights(file, lambda tensors: tensors.pop(max(tensors))), "are not those of its config")


# --- what is read while others write


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_nothing_can_be_swapped_after_the_check(copy_of, originals, monkeypatch, by_descriptor):
    folder = copy_of("single")
    expected = load_checkpoint(originals / "single").state_dict()
    monkeypatch.setattr(private_copy, "_BY_DESCRIPTOR", by_descriptor)
    host = load.load_part

    def swapped(*arguments):
        for name in ("config.json", "model.safetensors"):
            other = folder / f"{name}.new"
            other.write_bytes(b"{}" if name == "config.json" else os.urandom(64))
            other.rename(folder / name)
        return host(*arguments)

    monkeypatch.setattr(load, "load_part", swapped)
    # Another file under the name changes nothing; that the old one lost its name is seen, and no harm.
    try:
        state = load_checkpoint(folder).state_dict()
    except ValueError as error:
        assert by_descriptor and "model.safetensors changed while it was loaded" in str(error)
    else:
        assert all(torch.equal(state[name], x) for name, x in expected.items())


def test_what_is_written_into_weights_while_they_load_is_noticed(copy_of, monkeypatch):
    folder, host = copy_of("single"), load.load_part

    def written(*arguments):
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\x80\x3f")
        return host(*arguments)

    monkeypatch.setattr(load, "load_part", written)
    with pytest.raises(ValueError, match="model.safetensors changed while it was loaded"):
        load_checkpoint(folder)


def test_a_loaded_model_does_not_change_with_its_files(copy_of):
    folder = copy_of("single")
    model = load_checkpoint(folder)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(bytes(2000))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._name_or_path == str(folder)


def test_threads(originals):
    def loads(number):
        state = load_checkpoint(originals / ("single", "wan", "adapters")[number % 3]).state_dict()
        return any(x.is_meta for x in state.values())

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(loads, range(12)))


# --- sizes, patterns, terminals


@pytest.mark.parametrize(
    ("original", "key", "count"),
    [
        *(("single", "num_hidden_layers", count) for count in (4000, 10**6, 10**12)),
        *(("single", key, 1 << 20) for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")),
        *(("wan", key, count) for key in ("num_layers", "ffn_dim", "text_dim") for count in (4000, 1 << 28)),
        ("wan", "rope_max_seq_len", 1 << 28),
    ],
)
def test_a_config_of_huge_sizes_does_not_keep_the_loader_busy(copy_of, original, key, count):
    folder = copy_of(original)
    edit(folder / "config.json", **{key: count}, **({"layer_types": None} if original == "single" else {}))
    reseal(folder)
    start = time.monotonic()
    with pytest.raises(ValueError, match="many more or larger|expected at most|do not belong|not those of"):
        load_checkpoint(folder)
    assert time.monotonic() - start < 20


def test_patterns_have_limits(copy_of):
    for pattern in ("q_proj", r".*\.(q_proj|k_proj)", r"model\.layers\.\d+\.self_attn\.(q|v)_proj"):
        assert is_soon_matched(pattern)
    for pattern in ("(a+)+$", "(a|a)*b", "(?=a)", r"(a)\1", "a?" * 30 + "a" * 30, "(a|a)" * 30, "a" * 300, "a*?b*?c*?d"):
        assert not is_soon_matched(pattern)
    folder = copy_of("adapters")
    for change in (
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(a|a)*b": 2}},
        {"megatron_core": "os"},
        {"runtime_config": {"x": 1}},
    ):
        shutil.copy(copy_of("adapters", next(iter(change))) / "adapter_config.json", folder)
        edit(folder / "adapter_config.json", **change)
        reseal(folder)
        with pytest.raises(ValueError, match=f"sets '{next(iter(change))}'"):
            load_checkpoint(folder)
    folder = copy_of("single", "patterns")
    for change in ({"exclude": ["*a" * 400]}, {"include": ["*"] * 5000}):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["attention"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        reseal(folder)
        for read in (load_checkpoint, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match="expected at most 4096 patterns of 512 characters"):
                read(folder)


def test_names_of_tensors_are_plain(copy_of):
    """They become patterns, and parts of messages."""
    folder = copy_of("adapters")
    file = folder / "adapter_model.safetensors"
    edit_weights(file, lambda tensors: tensors.update({"x.(a+)+$.lora_A.weight": torch.zeros(1)}))
    reseal(folder)
    with pytest.raises(ValueError, match="expected tensors with the names of parameters"):
        load_checkpoint(folder)


ESCAPE = "\x1b]0;title\x07\x1b[2J"


@pytest.mark.parametrize("place", ["file", "key", "class", "reference", "tensor", "dtype"])
def test_messages_hold_no_terminal_control_characters(copy_of, place):
    folder = copy_of("single")
    if place == "file":
        (folder / f"{ESCAPE}.py").write_text("")
    elif place == "tensor":
        edit_weights(folder / "model.safetensors", lambda tensors: tensors.update({ESCAPE: torch.zeros(1)}))
    elif place != "reference":
        edit(folder / "config.json", **{{"key": ESCAPE, "class": "model_type", "dtype": "dtype"}[place]: ESCAPE})
    changes = {"references": {"": {"device": ESCAPE, "dtype": "float32", "torch": "2"}}} if place == "reference" else {}
    reseal(folder, **changes)
    for check in (load_checkpoint, verify_checkpoint):
        with pytest.raises(ValueError, match="load_checkpoint") as failure:
            check(folder)
        error = failure.value
        while error is not None:
            assert "\x1b" not in str(error) and "\x07" not in str(error)
            error = error.__cause__


# --- base models, shifts, killed exports


def test_base_models_pass_the_same_checks(copy_of, originals, tmp_path, caplog):
    folder, base = copy_of("adapters"), shutil.copytree(originals / "base", tmp_path / "base")
    reseal(folder, base_model=str(base))
    (base / "modeling_evil.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    edit(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.M"}, trained_by="somebody")
    load_checkpoint(folder)
    assert "left out what the installed library does not know: 'auto_map', 'trained_by'" in caplog.text
    edit(base / "config.json", quantization_config={"quant_method": "torchao"})
    with pytest.raises(ValueError, match=r"base/config.json sets 'quantization_config', which could run code"):
        load_checkpoint(folder)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected a base model with a config and safetensors weights"):
        load_checkpoint(folder)


@pytest.mark.parametrize("which", ["k_shift", "q_shift"])
def test_shifts_have_the_shape_of_their_modules(tmp_path, which):
    model = tiny_qwen3(**TINY)
    patch_model(model)
    calibrate(model, [token_ids(1, 40) % 64])
    export_checkpoint(model, tmp_path / "out")
    file = tmp_path / "out" / f"qat_patch_{which}.safetensors"

    def changed(shifts):
        folder = shutil.copytree(tmp_path / "out", tmp_path / "changed", dirs_exist_ok=True)
        save_file(shifts, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"][which] = integrity.sha256(folder / file.name)
        (folder / "config.json").write_text(json.dumps(config))
        edit_weights(folder / "model.safetensors", lambda tensors: None, qat_patch=json.dumps(config["quantization_config"]))
        reseal(folder)
        return folder

    shifts = load_file(file)
    name = min(shifts)
    for change in (lambda x: x[:1], lambda x: torch.cat([x, x], 1), lambda x: x[:, :8]):
        wrong = {name: change(shifts[name]).contiguous()}
        unpatched = tiny_qwen3(**TINY)
        with pytest.raises(ValueError, match=rf"{which}\['model.layers.0.self_attn'\]: expected \[key heads, head_dim\]"):
            patch_model(unpatched, **{which: wrong})
        folder = changed(shifts | wrong)
        for read in (load_checkpoint, verify_checkpoint, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=r"expected \[key heads, head_dim\] of this module"):
                read(folder)

    # An export may have shifts for some modules only. Where one was taken out, the recorded output tells.
    with pytest.raises(ValueError, match="the output for the reference input differs from the recorded one"):
        verify_checkpoint(changed({other: x for other, x in shifts.items() if other != name}))


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    dead, other = tmp_path / f".out-{'0' * 16}", tmp_path / ".out-notes"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    inside, go_on = threading.Event(), threading.Event()

    def slow():
        with integrity.written_aside(tmp_path / "out") as partial:
            inside.set()
            assert go_on.wait(30)
            (partial / "file").write_text("slow")

    thread = threading.Thread(target=slow)
    thread.start()
    assert inside.wait(30)
    assert not dead.exists() and other.exists()
    with pytest.raises(KeyError), integrity.written_aside(tmp_path / "out"):
        raise KeyError
    go_on.set()
    thread.join()
    assert (tmp_path / "out" / "file").read_text() == "slow"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-notes", "out"]


def test_the_mode_of_an_export_is_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with integrity.written_aside(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_the_name_that_a_gguf_file_gives_a_model_is_read_as_a_text(originals, tmp_path):
    """Exports of models from GGUF files have it; nothing loads from it."""
    folder = shutil.copytree(originals / "single", tmp_path / "named")
    edit(folder / "config.json", _model_name_or_path="Smollm2 135M")
    reseal(folder)
    assert load_checkpoint(folder).config._model_name_or_path == "Smollm2 135M"
