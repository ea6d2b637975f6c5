"""calibrate and sensitivity: what they measure, on which inputs, and how the result is used."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from qat_kernels import attention
from qat_patch import AttnQATConfig, QuantSpec, calibrate, get_handle, patch_model, sensitivity, unpatch_model
from qat_patch.cli import main
from qat_patch.hosts.transformers import attention as transformers_attention
from support.families.families import relative
from support.models.lively_wan import sdpa, tiny_wan, tiny_wan_pipeline, velocity, wan_inputs
from support.models.tiny_qwen3 import pad, tiny_qwen3, token_ids
from support.models.tiny_wan import TEXT_DIM, tiny_tokenizer

NAMES = [f"model.layers.{i}.self_attn" for i in range(3)]


def queries_and_keys(model, monkeypatch, **inputs):
    """Those of each layer, by a way of its own: what the patched model hands to attention."""
    seen = []

    def keep(q, k, v, **kwargs):
        seen.append((q, k))
        mask = kwargs["key_mask"]
        mask = None if mask is None else mask[:, None, None] & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(transformers_attention, "attention", keep)
        model(**inputs)
    return seen


def biased(model):
    """Keys and queries with a mean that no RMSNorm takes out again."""
    for layer in model.model.layers:
        for norm in (layer.self_attn.k_norm, layer.self_attn.q_norm):
            torch.nn.init.normal_(norm.weight, mean=2.0)
    return model


def test_shifts_are_the_means_of_the_keys_that_may_be_seen_and_of_their_queries(monkeypatch):
    """Two query heads share a key head, and have one Q shift."""
    model = biased(tiny_qwen3())
    handle = patch_model(model)
    short, mask = pad(token_ids(length=30, seed=2), 11, "left")
    batches = [{"input_ids": token_ids()}, {"input_ids": short, "attention_mask": mask}]
    whole, padded = (queries_and_keys(model, monkeypatch, **batch) for batch in batches)
    assert handle.k_shift == handle.q_shift == {}
    calibrate(model, iter(batches))
    assert list(handle.k_shift) == list(handle.q_shift) == NAMES
    for name, first, second in zip(NAMES, whole, padded, strict=True):
        for shift, a, b in zip((handle.q_shift[name], handle.k_shift[name]), first, second, strict=True):
            of_heads = [x.transpose(1, 2).unflatten(2, (2, -1)).transpose(2, 3) for x in (a, b[:, :, 11:])]
            vectors = torch.cat([x.flatten(0, 2) for x in of_heads])
            assert vectors.shape == ((2 * 50 + 2 * 30) * a.shape[1] // 2, 2, 32)
            assert (shift.dtype, shift.shape) == (torch.float32, (2, 32))
            assert torch.allclose(shift, vectors.mean(0), atol=1e-5)
            assert shift.norm() > 0.1
    assert "k_shift, q_shift" in str(handle)


def test_what_is_asked_for_is_measured_and_the_rest_stays():
    model, ids = biased(tiny_qwen3()), token_ids()
    handle = patch_model(model)
    calibrate(model, [ids], shifts=("q_shift",))
    queries = handle.q_shift
    assert list(queries) == NAMES and handle.k_shift == {}
    calibrate(model, [token_ids(seed=4)], shifts=("k_shift",))
    assert list(handle.k_shift) == NAMES and all(handle.q_shift[name] is x for name, x in queries.items())
    for wrong in ((), "k_shift", ("v_shift",)):
        with pytest.raises(ValueError, match="calibrate: shifts: expected some of k_shift, q_shift, got"):
            calibrate(model, [ids], shifts=wrong)


def test_packed_samples_count_as_if_each_had_a_row():
    """Told apart by position_ids that restart: original attention, groups of V and errors know nothing of the neighbours."""
    model, ids = biased(tiny_qwen3()), token_ids()
    handle = patch_model(model)
    samples = [(row, start, stop) for row in range(2) for start, stop in ((0, 20), (20, 21), (21, 50))]
    alone = [{"input_ids": ids[row : row + 1, start:stop]} for row, start, stop in samples]
    positions = torch.cat([torch.arange(20), torch.arange(1), torch.arange(29)]).expand(2, -1)
    together = [{"input_ids": ids, "position_ids": positions, "use_cache": False}]
    with torch.no_grad(), handle.disabled():
        expected = model(**together[0]).logits
    shown = []
    with torch.no_grad(), handle.observed(lambda layer, call: shown.append(call)):
        assert torch.equal(model(**together[0]).logits, expected)
    assert [call.query.shape[2] for call in shown] == [20, 1, 29] * 2 * 3
    report, by_row = sensitivity(model, together), sensitivity(model, alone)
    for ours, theirs in zip(report.layers, by_row.layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3) and ours.error > 0.01
    calibrate(model, together)
    shifts = handle.shifts
    calibrate(model, alone)
    torch.testing.assert_close(shifts, handle.shifts, rtol=1e-4, atol=1e-5)


def test_calibration_leaves_the_model_as_it_was_but_for_the_shifts():
    model = biased(tiny_qwen3()).train()
    model.model.layers[1].eval()
    ids = token_ids()
    before = model(ids).logits
    handle = patch_model(model)
    plain = model(ids).logits
    modes = [module.training for module in model.modules()]
    calibrate(model, [ids])
    assert [module.training for module in model.modules()] == modes
    assert all(layer.observer is None for layer in handle.patched.values())
    shifted = model(ids).logits
    assert not torch.equal(shifted, plain)
    with handle.disabled():
        assert torch.equal(model(ids).logits, before)
    shifted.sum().backward()

    # through a deep copy, and through unpatch and patch again
    clone = copy.deepcopy(model)
    assert torch.equal(clone(ids).logits, shifted)
    assert get_handle(clone).k_shift[NAMES[0]] is not handle.k_shift[NAMES[0]]
    unpatch_model(model)
    assert torch.equal(model(ids).logits, before)
    again = patch_model(model, handle.config, **handle.shifts)
    assert torch.equal(model(ids).logits, shifted)
    assert list(again.k_shift) == list(again.q_shift) == NAMES


@pytest.mark.parametrize("which", ["k_shift", "q_shift"])
def test_shift_takes_the_mean_out_before_quantization(which):
    """Keys or queries with a large part in common lose their differences to its rounding; the shift brings them back."""
    model = tiny_qwen3()
    common = torch.zeros(32)
    common[[14, 15, 30, 31]] = 20.0  # the dimensions that rotate slowest
    for layer in model.model.layers:
        norm = getattr(layer.self_attn, {"k_shift": "k_norm", "q_shift": "q_norm"}[which])
        norm.register_forward_hook(lambda module, arguments, output: output + common)
    patch_model(model)
    batches = [token_ids(seed=seed) for seed in range(3)]
    before = sensitivity(model, batches)
    calibrate(model, batches, shifts=(which,))
    after = sensitivity(model, batches)
    assert [layer.name for layer in after.layers] == NAMES
    assert all(a.error < 0.7 * b.error for a, b in zip(after.layers, before.layers, strict=True))


def test_error_is_that_of_the_same_inputs():
    """The first layer sees the same inputs in the patched model; later ones too, since errors are not passed on."""
    model, ids = tiny_qwen3(), token_ids()
    outputs = {}

    def keep(module, arguments, output):
        outputs.setdefault(module.layer_idx, []).append(output[0].detach())

    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Identity()
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(keep)
        layer.self_attn.register_forward_hook(lambda module, arguments, output: (output[0][..., :64], output[1]))
    with torch.no_grad():
        model(ids)
        handle = patch_model(model)
        for name in NAMES:  # one at a time, so that its inputs are those of the original model
            for other, layer in handle.patched.items():
                layer.off = int(other != name)
            model(ids)
    for layer in handle.patched.values():
        layer.off = 0
    report = sensitivity(model, [ids])
    for index, layer in enumerate(report.layers):
        original, quantized = outputs[index][0], outputs[index][1 + index]
        assert layer.error == pytest.approx(relative(quantized, original), rel=1e-4)
        assert 0.01 < layer.error < 0.5


def test_padding_changes_neither_errors_nor_counts():
    model = tiny_qwen3(torch.float64)
    patch_model(model)
    ids = token_ids()
    padded, mask = pad(ids, 7, "right")
    plain = sensitivity(model, [{"input_ids": ids}]).to_dict()["layers"]
    with_padding = sensitivity(model, [{"input_ids": padded, "attention_mask": mask}]).to_dict()["layers"]
    for a, b in zip(plain, with_padding, strict=True):
        assert a.pop("error") == pytest.approx(b.pop("error"), rel=1e-9)
        assert a == b


def test_flushed_and_saturated_shares():
    model = tiny_qwen3(num_hidden_layers=1)
    attn = model.model.layers[0].self_attn
    torch.nn.init.constant_(attn.q_norm.weight, 1e-5)  # every query is flushed
    with torch.no_grad():
        attn.k_norm.weight[::4] = 1e6  # a quarter of the rotated dimensions, and their partners
        attn.v_proj.weight.mul_(1e-8)
    patch_model(model)
    counts = calibrate(model, [token_ids()])[NAMES[0]]
    assert counts["query"].flushed == 1.0 and counts["query"].saturated == 0.0
    assert counts["value"].flushed == 1.0
    assert 0.2 < counts["key"].saturated < 0.3 and counts["key"].flushed == 0.0
    report = sensitivity(model, [token_ids()])
    assert (report.layers[0].query, report.layers[0].value) == (counts["query"], counts["value"])
    unpatch_model(model)
    patch_model(model, AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk", rotate=True)))
    counts = calibrate(model, [token_ids()])[NAMES[0]]
    assert counts["value"].flushed == 0.0  # not quantized
    assert counts["key"].saturated > 0.9  # rotation spreads what is large


def test_keys_and_queries_are_counted_as_they_are_quantized_with_their_shifts():
    model = tiny_qwen3(num_hidden_layers=1)
    common = torch.zeros(32)
    common[[15, 31]] = 1e4  # the dimensions that hardly rotate
    attn = model.model.layers[0].self_attn
    for norm in (attn.k_norm, attn.q_norm):
        norm.register_forward_hook(lambda module, arguments, output: output + common)
    patch_model(model)
    before = calibrate(model, [token_ids()])[NAMES[0]]
    assert before["key"].saturated == before["query"].saturated == 2 / 32
    again = calibrate(model, [token_ids()])[NAMES[0]]
    assert again["key"].saturated == again["query"].saturated == 0.0
    after = sensitivity(model, [token_ids()]).layers[0]
    assert after.key.saturated == after.query.saturated == 0.0


def test_diffusers_models_and_pipelines():
    model = tiny_wan(i2v=True)
    before = velocity(model)
    handle = patch_model(model, AttnQATConfig(exclude_last_blocks=1, overrides={"*.attn2": QuantSpec(preset="nvfp4_qk")}))
    patched = velocity(model)
    batch = wan_inputs(i2v=True)
    report = sensitivity(model, [batch, batch])
    assert [layer.name for layer in report.layers] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert all(0.005 < layer.error < 0.5 for layer in report.layers)
    # text and image keys are attended by two calls of one module: one mean fits neither, but the queries are the same
    with pytest.raises(ValueError, match=r"blocks.0.attn2 attends to several sets of keys.*exclude=\['\*.attn2'\]"):
        calibrate(model, [batch], shifts=("k_shift",))
    assert not any(handle.shifts.values()) and all(layer.observer is None for layer in handle.patched.values())
    with pytest.raises(ValueError, match=r"exclude: the pattern '\*.attn3' matches no patched module"):
        calibrate(model, [batch], exclude=["*.attn3"])
    assert list(calibrate(model, [batch], exclude=["*.attn2"])) == list(handle.k_shift) == list(handle.q_shift)
    assert list(calibrate(model, [batch])) == list(handle.q_shift) == ["blocks.0.attn1", "blocks.0.attn2"]
    assert list(handle.k_shift) == ["blocks.0.attn1"]
    assert handle.k_shift["blocks.0.attn1"].shape == handle.q_shift["blocks.0.attn2"].shape == (2, 32)
    assert not torch.equal(velocity(model), patched)
    with handle.disabled():
        assert torch.equal(velocity(model), before)

    pipe = tiny_wan_pipeline(two_transformers=True)
    handle = patch_model(pipe)
    shape = (1, 20, TEXT_DIM)
    call = {name: torch.randn(shape) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call |= {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    calibrate(pipe, [call])
    assert list(handle.k_shift) == list(handle.q_shift) == list(handle.patched)
    again = get_handle(pipe.transformer).shifts
    unpatch_model(pipe.transformer)
    assert patch_model(pipe.transformer, **again).q_shift.keys() == again["q_shift"].keys() != handle.q_shift.keys()


def test_original_attention_is_what_runs():
    model = tiny_wan()
    before = velocity(model)
    handle = patch_model(model)
    seen = []
    with handle.observed(lambda layer, call: seen.append((layer.name, call))), torch.no_grad():
        assert torch.equal(velocity(model), before)
    assert [name for name, _ in seen] == list(handle.patched)
    for _, call in seen:
        out = sdpa(call.query, call.key, call.value, scale=call.scale, causal=call.causal, key_mask=call.key_mask)
        assert torch.equal(out, call.out)
        assert not torch.equal(attention(call.query, call.key, call.value), call.out)


def test_mistakes():
    model, ids = tiny_qwen3(), token_ids()
    with pytest.raises(ValueError, match="calibrate: the model is not patched"):
        calibrate(model, [ids])
    handle = patch_model(model)
    with pytest.raises(ValueError, match="sensitivity: expected at least one batch, got none"):
        sensitivity(model, [])
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match=r"never reached 1 of 3 patched modules, such as model.layers.1.self_attn"):
        calibrate(model, [ids])
    assert handle.k_shift == {}
    unpatch_model(model)
    for shifts, message in (
        ({"model.layers.0": torch.zeros(2, 32)}, "expected names of modules that are patched, such as model.layers.0.self_attn"),
        ({NAMES[0]: torch.zeros(2, 32, dtype=torch.bfloat16)}, r"expected float32 \[key heads, head_dim\], got torch.bfloat16"),
        ({NAMES[0]: [0.0]}, r"got \[0.0\]"),
    ):
        for which in ("k_shift", "q_shift"):
            with pytest.raises(ValueError, match=f"patch_model: {which}.*{message}"):
                patch_model(model, **{which: shifts})
            assert get_handle(model) is None


def test_command(tmp_path, capsys, monkeypatch):
    model = biased(tiny_qwen3())
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": token_ids()}, tmp_path / "batch.safetensors")
    config = AttnQATConfig(exclude_first_blocks=1)
    (tmp_path / "config.json").write_text(config.to_json())
    files = [
        "--inputs",
        str(tmp_path / "batch.safetensors"),
        "--json",
        str(tmp_path / "out.json"),
        "--png",
        str(tmp_path / "out.png"),
    ]
    assert (
        main(["sensitivity", str(tmp_path / "model"), "--config", str(tmp_path / "config.json"), "--device", "cpu", *files]) == 0
    )
    patch_model(model, config)
    expected = sensitivity(model, [token_ids()])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert str(expected) in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sensitivity", str(tmp_path / "model"), "--prompt", "a", "--device", "cpu"]) == 1
    assert "is a model: expected no --prompt" in capsys.readouterr().err

    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("a red square moves left " * 20)
    text = ["--text", str(tmp_path / "text"), "--tokens", "40", "--batches", "2", "--calibrate", "--device", "cpu"]
    assert main(["sensitivity", str(tmp_path / "model"), *text]) == 0
    assert "nvfp4, k_shift, q_shift" in capsys.readouterr().out
    assert main(["sensitivity", str(tmp_path / "model"), *text, "--calibration-exclude", "*.0.*", "*.1.*"]) == 0
    (shifted,) = (line for line in capsys.readouterr().out.splitlines() if "k_shift" in line)
    assert NAMES[2] in shifted
    text.remove("--calibrate")
    assert main(["sensitivity", str(tmp_path / "model"), *text, "--calibration-exclude", "*.0.*"]) == 1
    assert "--calibration-exclude: expected --calibrate with it" in capsys.readouterr().err
    assert main(["sensitivity", str(tmp_path / "model"), *text[:2], "--tokens", "5000"]) == 1


def test_command_on_a_pipeline(tmp_path, capsys):
    tiny_wan_pipeline().save_pretrained(tmp_path / "pipe")
    size = '{"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}'
    assert main(["sensitivity", str(tmp_path / "pipe"), "--prompt", "a red square", "--pipe", size, "--device", "cpu"]) == 0
    assert "transformer.blocks.1.attn2" in capsys.readouterr().out
