"""qat-patch evaluate, servers and sensitivity --preset: what they measure, and what they refuse."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from torch.nn import functional

from qat_kernels.spec import Preset
from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, get_handle, patch_model, sensitivity, unpatch_model
from qat_patch.cli import main
from qat_patch.commands import evaluate as command
from qat_patch.measure import harness, servers
from qat_patch.measure.quality import Attentions, sample_quality, text_quality
from qat_patch.measure.videos import psnr, ssim
from support.models.exports import logits
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import WORDS, tiny_pipeline, tiny_tokenizer

SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}


def test_loss_and_kl_are_those_of_the_outputs():
    model, rows = tiny_qwen3(num_hidden_layers=2), [token_ids(1, 50, seed=seed) for seed in (1, 2, 3)]
    with Attentions(model, ["original", "kv_nvfp4", "nvfp4"]) as attentions:
        report = text_quality(model, rows, attentions)
    assert list(report.attentions) == ["original", "kv_nvfp4", "nvfp4"] and get_handle(model) is None
    for preset in ("kv_nvfp4", "nvfp4"):
        changes, distances, same = [], [], 0
        for row in rows:
            with torch.no_grad():
                theirs = model(row).logits[0].double().log_softmax(-1)
                with patch_model(model, AttnQATConfig(spec=QuantSpec(preset=preset))):
                    ours = model(row).logits[0].double().log_softmax(-1)
            loss = [functional.nll_loss(x[:-1], row[0, 1:]).item() for x in (ours, theirs)]
            changes.append(loss[0] - loss[1])
            distances.append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        found = report.attentions[preset]
        assert found["loss_change"] == pytest.approx(sum(changes) / 3, abs=1e-6)
        assert found["kl"] == pytest.approx(sum(distances) / 3, rel=1e-4) and found["kl"] > 0
        assert found["kl_se"] == pytest.approx(torch.tensor(distances).double().std().item() / math.sqrt(3), rel=1e-3)
        assert found["same_token"] == pytest.approx(same / 150)
    assert report.attentions["nvfp4"] != report.attentions["kv_nvfp4"]
    header, *lines = str(report).splitlines()[1:]
    assert header.split() == ["attention", "loss", "loss_change", "kl", "same_token"] and len(lines) == 3 and "±" in lines[1]


def test_long_rows_are_compared_piece_by_piece(monkeypatch):
    model, rows = tiny_qwen3(num_hidden_layers=1), [token_ids(1, 50)]
    whole = text_quality(model, rows, Attentions(model, ["nvfp4"])).attentions["nvfp4"]
    monkeypatch.setattr("qat_patch.measure.quality._TOKENS_AT_ONCE", 16)
    parts = text_quality(model, rows, Attentions(model, ["nvfp4"])).attentions["nvfp4"]
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6) and "kl_se" not in parts


def test_an_export_is_measured_as_it_was_exported_and_left_so():
    model, rows = tiny_qwen3(), [token_ids(1, 40)]
    shifts = {which: {"model.layers.1.self_attn": torch.ones(2, 32)} for which in ("k_shift", "q_shift")}
    config = AttnQATConfig(spec=QuantSpec(rotate=True), exclude=["*.0.*"])
    handle = patch_model(model, config, **shifts)
    before = logits(model)
    with Attentions(model, ["exported", "kv_nvfp4"]) as attentions:
        with attentions.in_force("exported"):
            assert torch.equal(logits(model), before)
        with attentions.in_force("kv_nvfp4"):
            # In the modules that the export patches.
            other = get_handle(model)
            assert other.specs == dict.fromkeys(handle.specs, QuantSpec(preset="kv_nvfp4"))
            assert not any(other.shifts.values())
        report = text_quality(model, rows, attentions)
    assert report.attentions["exported"]["kl"] != report.attentions["kv_nvfp4"]["kl"]
    assert get_handle(model).config == config and torch.equal(logits(model), before)
    # Also after a refusal.
    with pytest.raises(ValueError, match="--attention sage3: .*causal"):
        Attentions(model, ["kv_nvfp4", "sage3"])
    assert get_handle(model).config == config and torch.equal(logits(model), before)


def test_samples_of_a_pipeline():
    pipe = tiny_pipeline(layers=1, head_dim=64)
    with Attentions(pipe, ["original", "sage3"]) as attentions:
        report = sample_quality(pipe, ["a red square", "a blue square"], attentions, seeds=2, arguments=SIZE)
    assert report.measured_on == "2 prompts x 2 samples"
    videos = {}
    for preset in (None, "sage3"):
        if preset:
            patch_model(pipe, AttnQATConfig(spec=QuantSpec(preset=preset)))
        samples = [(prompt, seed) for prompt in ("a red square", "a blue square") for seed in range(2)]
        videos[preset] = [
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **SIZE).frames[0]
            for prompt, seed in samples
        ]
    pairs = list(zip(videos["sage3"], videos[None], strict=True))
    found = report.attentions["sage3"]
    assert found["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 4) and 10 < found["psnr"] < 100
    assert found["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 4) and found["psnr_se"] > 0
    assert report.attentions["original"] == {"motion": 1.0} and found["motion"] != 1


@pytest.fixture
def saved(tmp_path):
    """A language model, an export of it for a server, and a text."""
    model = tiny_qwen3(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    patch_model(model, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4")))
    export_checkpoint(model, tmp_path / "export", server="vllm", tokenizer=tiny_tokenizer())
    unpatch_model(model)
    (tmp_path / "text").write_text(" ".join(WORDS) * 20)
    return tmp_path


def run(saved, model, *arguments):
    text = ["--text", str(saved / "text"), "--tokens", "40", "--batches", "2", "--device", "cpu"]
    return main(["evaluate", str(saved / model), *(text if "--prompt" not in arguments else ["--device", "cpu"]), *arguments])


def test_command_on_text(saved, capsys):
    assert run(saved, "model", "--attention", "original,nvfp4,kv_nvfp4", "--json", str(saved / "out.json")) == 0
    printed = capsys.readouterr().out
    assert "on 2 x 40 tokens:" in printed and "kv_nvfp4" in printed
    plain = json.loads((saved / "out.json").read_text())
    assert plain["model"] == str(saved / "model") and set(plain["attentions"]) == {"original", "nvfp4", "kv_nvfp4"}
    assert run(saved, "export", "--json", str(saved / "export.json")) == 0
    exported = json.loads((saved / "export.json").read_text())["attentions"]
    assert exported == {"original": plain["attentions"]["original"], "exported": plain["attentions"]["kv_nvfp4"]}


def test_command_on_a_pipeline(tmp_path, capsys):
    tiny_pipeline(layers=1, head_dim=64).save_pretrained(tmp_path / "pipe")
    assert run(tmp_path, "pipe", "--prompt", "a red square", "--pipe", json.dumps(SIZE), "--attention", "sage3,nvfp4") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-3:]] == ["original", "sage3", "nvfp4"] and "ssim" in printed[-4]


@pytest.mark.parametrize("command", [["evaluate", "--attention=nvfp4"], ["sensitivity"]], ids=lambda parts: parts[0])
def test_pipelines_that_start_from_an_image(tmp_path, capsys, command):
    tiny_pipeline(i2v=True, layers=1).save_pretrained(tmp_path / "pipe")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    size = json.dumps({"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1})
    arguments = [*command, str(tmp_path / "pipe"), "--device=cpu", "--prompt", "a", "--pipe", size]
    assert main(arguments) == 1
    assert "--image: expected an image file, because this WanImageToVideoPipeline" in capsys.readouterr().err
    assert main([*arguments, "--image", str(tmp_path / "red.png")]) == 0
    assert "nvfp4" in capsys.readouterr().out


def test_command_on_a_transformer_alone(tmp_path, capsys):
    """What the Wan recipe exports, within the pipeline that it belongs to."""
    pipe = tiny_pipeline(layers=1, head_dim=64)
    pipe.save_pretrained(tmp_path / "pipe")
    patch_model(pipe.transformer, AttnQATConfig(spec=QuantSpec(preset="sage3")))
    export_checkpoint(pipe.transformer, tmp_path / "export", server="diffusers-sage3", component="transformer")
    arguments = ["--prompt", "a red square", "--pipe", json.dumps(SIZE), "--json"]
    around = ["--pipeline", str(tmp_path / "pipe")]
    assert run(tmp_path, "export", *around, *arguments, str(tmp_path / "export.json")) == 0
    assert run(tmp_path, "pipe", "--attention", "sage3", *arguments, str(tmp_path / "pipe.json")) == 0
    found = [json.loads((tmp_path / name).read_text())["attentions"] for name in ("export.json", "pipe.json")]
    # Matrix products on a CPU round by the addresses of the weights.
    assert found[0]["exported"] == pytest.approx(found[1]["sage3"], rel=1e-3)
    capsys.readouterr()
    assert run(tmp_path, "pipe", *around, "--prompt", "a") == 1
    assert "--pipeline and --component: only for an export" in capsys.readouterr().err


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage.metrics", None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        sample_quality(None, ["a"], Attentions(tiny_qwen3(num_hidden_layers=1), []), seeds=1, arguments={})


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("model", ["--attention", "original,fp3"], "expected original, exported or a preset, got 'fp3'"),
        ("model", ["--attention", "sage3"], "--attention sage3: .*causal"),
        ("model", ["--attention", "exported"], "expected an export"),
        ("model", ["--limit", "3"], "--limit: has no effect without --tasks"),
        ("model", ["--seeds", "3"], "--seeds: has no effect without --prompt"),
        ("model", ["--tokens", "5000"], "expected at least 5000 tokens"),
        ("model", ["--text", "none"], "--text: there is no file none"),
        ("model", ["--json", "text"], "--json: .* exists"),
        ("model", ["--exclude", "*.7.*"], "matches no attention module"),
        ("model", ["--prompt", "a"], "expected a pipeline, got a Qwen3ForCausalLM"),
        ("export", ["--exclude", "*.0.*"], "the model is patched, which says which modules"),
        ("nothing/at/all", [], "expected the folder of a model"),
    ],
)
def test_mistakes(saved, capsys, monkeypatch, model, arguments, message):
    monkeypatch.chdir(saved)
    assert run(saved, model, *arguments) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["evaluate", "sensitivity"])
def test_a_model_without_a_tokenizer_says_so(saved, capsys, command):
    for file in (saved / "model").glob("*token*"):
        file.unlink()
    arguments = ["--text", str(saved / "text"), "--tokens", "40", "--device", "cpu"]
    assert main([command, str(saved / "model"), *arguments]) == 1
    assert "model: expected the tokenizer of the language model in this folder, got none; put it" in capsys.readouterr().err


def test_tasks_of_the_harness_get_every_attention(saved, capsys, monkeypatch):
    """The harness itself is run by tests/commands/test_evaluate_tasks.py, where it is installed."""
    seen = {}

    def run_tasks(load, tasks, **given):
        model, tokenizer, attentions = load()
        for name, attention in attentions.items():
            with attention():
                seen[name] = logits(model)
        assert tasks == ["arc_easy", "piqa"] and given == {"limit": 5} and len(tokenizer) == len(tiny_tokenizer())
        return {name: {"arc_easy": {"acc,none": x.abs().mean().item()}} for name, x in seen.items()}

    monkeypatch.setattr(command, "run_tasks", run_tasks)
    arguments = ["--tasks", "arc_easy,piqa", "--limit", "5", "--attention", "kv_nvfp4", "--device", "cpu"]
    assert main(["evaluate", str(saved / "model"), *arguments]) == 0
    assert not torch.equal(seen["original"], seen["kv_nvfp4"]) and "acc,none" in capsys.readouterr().out
    assert main(["evaluate", str(saved / "model"), *arguments[:3], "0"]) == 1 and "--limit" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install 'qat-patch.harness.'"):
        harness.run_tasks(lambda: None, ["x"])


def test_sensitivity_takes_a_preset(saved, capsys):
    text = ["--text", str(saved / "text"), "--tokens", "40", "--batches", "1", "--device", "cpu"]
    assert main(["sensitivity", str(saved / "model"), *text, "--preset", "kv_nvfp4", "--json", str(saved / "out.json")]) == 0
    assert "kv_nvfp4" in capsys.readouterr().out
    (layer,) = json.loads((saved / "out.json").read_text())["layers"]
    assert 0 < layer["error"] < 0.5
    assert main(["sensitivity", str(saved / "export"), *text, "--preset", "kv_nvfp4"]) == 1
    assert "expected no --preset" in capsys.readouterr().err
    assert main(["sensitivity", str(saved / "model"), *text, "--preset", "sage3"]) == 1
    assert main(["sensitivity", str(saved / "export"), *text]) == 0
    patched = tiny_qwen3(num_hidden_layers=1)
    patch_model(patched, AttnQATConfig(spec=QuantSpec(preset="fa4_fp4")))
    patched.save_pretrained(saved / "model")
    assert main(["sensitivity", str(saved / "model"), *text]) == 0
    assert "fa4_fp4" in capsys.readouterr().out


def test_limits_are_those_of_the_preset():
    """Servers flush groups below half of the smallest scale times 6; V counts along the head dim; Q is not quantized there."""
    model = tiny_qwen3(num_hidden_layers=1)
    with torch.no_grad():
        # Values of 2^-10 at most: our grid holds them, the server's has a scale of zero for them.
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e-3)
    largest = []
    with patch_model(model) as handle, handle.observed(lambda layer, call: largest.append(call.value.abs().amax().item())):
        logits(model)
    assert 2**-11 < largest[0] < 6 * 2**-10
    flushed = {}
    for preset in ("nvfp4", "kv_nvfp4"):
        with patch_model(model, AttnQATConfig(spec=QuantSpec(preset=preset))):
            (layer,) = sensitivity(model, [token_ids()]).layers
        flushed[preset] = layer.query.flushed, layer.value.flushed
    assert flushed["nvfp4"][1] < 0.5 and flushed["kv_nvfp4"] == (0, 1.0)


def test_servers(monkeypatch, capsys):
    versions = dict.fromkeys(servers.PACKAGES) | {"vllm": "0.33.0", "flashinfer-python": "0.7.4"}
    monkeypatch.setattr(servers, "installed", versions.get)
    assert main(["servers"]) == 0
    printed = capsys.readouterr().out
    for preset in Preset.__args__:
        assert f"\n  {preset} " in printed
    assert "vllm                 0.33.0" in printed and "sglang               not installed" in printed
    assert servers.served_by("kv_nvfp4", 9, versions) == "this package (generate), vLLM 0.33.0"
    assert servers.served_by("kv_nvfp4", 12, versions).endswith("vLLM 0.33.0, SGLang (install sglang)")
    assert servers.served_by("kv_nvfp4_fp8", 9, versions) == "-"
    assert servers.served_by("fa4_fp4", 10, versions) == "FastVideo or xDiT"
    assert servers.served_by("sage3", 12, versions) == "Diffusers with SageAttention3 (install diffusers and kernels)"
    assert servers.implementation("kv_nvfp4", torch.device("cpu")) == "sdpa"


def test_servers_on_a_gpu(monkeypatch):
    """What runs there is asked of qat_kernels, which needs one: here only who serves what."""
    for name, value in (("device_count", 1), ("get_device_capability", (10, 3)), ("get_device_name", "NVIDIA B300")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(servers, "implementation", lambda preset, device: f"on {device.type}")
    monkeypatch.setattr(servers, "installed", lambda name: "9.9")
    (line,) = [line for line in servers.report().splitlines() if line.startswith("  kv_nvfp4_fp8") and "on cuda" in line]
    assert line.endswith("vLLM 9.9, SGLang 9.9")
    assert "cuda:0: NVIDIA B300, sm_103" in servers.report()
