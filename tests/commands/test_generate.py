"""qat-patch generate on exports of every kind."""

import functools

import av
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from qat_patch import AttnQATConfig, PatchHandle, QuantSpec, export_checkpoint, load_checkpoint, patch_model
from qat_patch.commands import generate
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from support.kernels.fake_gpu import fake_gpu
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import TEXT_DIM, tiny_pipeline, tiny_ti2v, tiny_tokenizer

SIZE = ["--height=16", "--width=32", "--num-frames=5", "--steps=3"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of a language model, a pipeline and a transformer, and the pipeline that the transformer is from."""
    folder = tmp_path_factory.mktemp("exports")
    model = tiny_qwen3()
    patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    export_checkpoint(model, folder / "text", tokenizer=tiny_tokenizer())
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    patch_model(pipe)
    export_checkpoint(pipe, folder / "pipeline")
    export_checkpoint(pipe.transformer, folder / "transformer")
    save_file({"prompt_embeds": torch.randn(7, TEXT_DIM)}, folder / "clip.safetensors")
    return folder


def shape(file):
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return len(frames), *frames[0].shape


def test_text(exports, capsys):
    generate.main([str(exports / "text"), "--prompt", "a red square", "--max-new-tokens=5", "--min-new-tokens=5"])
    first, *_, run, last = capsys.readouterr().out.splitlines()
    assert first.startswith("a red square")
    assert run.startswith("[calls of 4-bit attention: 10 eager; 5 tokens in ") and run.endswith(" GiB]") and "tokens/s" in run
    assert last == "[4-bit attention in 2 of 3 attention modules; eager implementation, cpu]"


def test_text_where_some_layers_leave_v_unquantized(tmp_path, capsys):
    model = tiny_qwen3()
    overrides = {"*.1.*": QuantSpec(preset="nvfp4_qk"), "*.2.*": QuantSpec(preset="kv_nvfp4")}
    patch_model(model, AttnQATConfig(overrides=overrides))
    export_checkpoint(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    generate.main([str(tmp_path / "out"), "--prompt", "a red square", "--max-new-tokens=5"])
    assert "4-bit attention in 3 of 3 attention modules" in capsys.readouterr().out


@pytest.mark.parametrize("export", ["pipeline", "transformer"])
def test_video(exports, tmp_path, capsys, export):
    base = ["--pipeline", str(exports / "base")] if export == "transformer" else []
    arguments = [str(exports / export), *base, *SIZE, "--prompt=a red square", "--output"]
    generate.main([*arguments, str(tmp_path / "new" / "out.mp4")])
    assert shape(tmp_path / "new" / "out.mp4") == (5, 16, 32, 3)
    out = capsys.readouterr().out
    assert (
        "5 frames of 32x16" in out
        and "5 frames in " in out
        and " frames/s" in out
        and "4-bit attention in 4 of 4 attention modules" in out
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        pixels = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(2)]


@pytest.mark.parametrize("kind", ["i2v", "flf2v", "ti2v"])
def test_video_from_images(tmp_path, pictures, monkeypatch, kind):
    """TI2V 5B is stored as a pipeline from text."""
    length = {"pos_embed_seq_len": 2 * 257} if kind == "flf2v" else {}
    pipe = tiny_ti2v() if kind == "ti2v" else tiny_pipeline(i2v=True, layers=1, **length)
    pipe.save_pretrained(tmp_path / "base")
    patch_model(pipe.transformer)
    export_checkpoint(pipe.transformer, tmp_path / "out")
    calls, call = [], WanImageToVideoPipeline.__call__
    watched = functools.wraps(call)(lambda self, **given: calls.append(given) or call(self, **given))
    monkeypatch.setattr(WanImageToVideoPipeline, "__call__", watched)
    size = ["--height=32", "--width=32", "--num-frames=5", "--steps=1", "--guidance-scale=1"]
    arguments = [str(tmp_path / "out"), f"--pipeline={tmp_path / 'base'}", *size, "--prompt=a", f"--output={tmp_path / 'o.mp4'}"]
    images = ["--image", pictures[0]]
    if kind == "flf2v":
        with pytest.raises(ValueError, match="--last-image: expected an image file"):
            generate.main([*arguments, *images])
        images += ["--last-image", pictures[1]]
    generate.main([*arguments, *images])
    assert shape(tmp_path / "o.mp4") == (5, 32, 32, 3)
    given = {name: calls[-1].get(name) for name in ("image", "last_image")}
    assert [x and x.tobytes() for x in given.values()] == [
        Image.open(path).tobytes() if path in images else None for path in pictures
    ]
    with pytest.raises(ValueError, match="--image: there is no file nothing.png"):
        generate.main([*arguments, "--image=nothing.png"])
    if kind == "ti2v":
        generate.main(arguments)
        assert len(calls) == 1
    else:
        with pytest.raises(ValueError, match="--image: expected an image file, because this WanImageToVideoPipeline makes video"):
            generate.main(arguments)


def test_prompt_embeddings_need_no_text_encoder(exports, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the text encoder ran")

    monkeypatch.setattr("diffusers.WanPipeline._get_t5_prompt_embeds", forbidden)
    arguments = [str(exports / "transformer"), "--pipeline", str(exports / "base"), *SIZE]
    generate.main([*arguments, "--prompt-embeds", str(exports / "clip.safetensors"), "--output", str(tmp_path / "out.mp4")])
    assert shape(tmp_path / "out.mp4")[0] == 5
    save_file({"latents": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no prompt_embeds"):
        generate.main([*arguments, "--prompt-embeds", str(tmp_path / "other.safetensors"), "--output=x.mp4"])


def test_first_steps_in_original_attention(exports, tmp_path, monkeypatch):
    calls, attention = [], diffusers_adapter.attention

    def count(*args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(diffusers_adapter, "attention", count)
    arguments = [str(exports / "pipeline"), *SIZE, "--prompt=a", "--guidance-scale=1", "--output", str(tmp_path / "out.mp4")]
    generate.main(arguments)
    assert len(calls) == 3 * 4
    calls.clear()
    generate.main([*arguments, "--original-first=1", "--original-last=1"])
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text"], "--prompt: needed"),
        (["text", "--prompt=a", "--steps=3"], "--steps: has no effect: .*text generates text"),
        (["pipeline", "--prompt=a", "--output=x.mp4", "--max-new-tokens=3"], "--max-new-tokens: has no effect"),
        (["pipeline", "--prompt=a"], "needs --output"),
        (["pipeline", "--output=x.mp4"], "one of --prompt and --prompt-embeds"),
        (["pipeline", "--prompt=a", "--output=x.mp4", "--pipeline=base"], "is a whole pipeline"),
        (["pipeline", "--prompt=a", "--output=x.mp4", "--image=x.png"], "--image: has no effect: a WanPipeline takes none"),
        (["transformer", "--prompt=a", "--output=x.mp4"], "is a transformer alone; name the pipeline"),
        (["base", "--prompt=a", "--output=x.mp4"], "load it with its own library and call patch_model"),
    ],
)
def test_mistakes(exports, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.main([str(exports / arguments[0]), *arguments[1:]])


def test_an_export_without_a_tokenizer_says_so(tmp_path, monkeypatch):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    export_checkpoint(model, tmp_path / "out")
    monkeypatch.setattr(generate, "load_checkpoint", None)  # which may take minutes
    with pytest.raises(ValueError, match=rf"{tmp_path}/out: expected the tokenizer .* got none; export it again with export_ch"):
        generate.main([str(tmp_path / "out"), "--prompt", "a"])


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_the_slot_of_an_expert(tmp_path, component):
    """Wan 2.2 has two transformers of one shape: nothing else would tell them apart."""
    stored = tiny_pipeline(transformer_2=True, layers=1)
    stored.save_pretrained(tmp_path / "base")
    trained = getattr(stored, component)
    with torch.no_grad():
        trained.proj_out.bias.fill_(7.0)
    patch_model(trained)
    export_checkpoint(trained, tmp_path / "said", component=component)
    export_checkpoint(trained, tmp_path / "unsaid")

    def biases(*arguments, **options):
        pipe = generate.make_pipeline(*arguments, torch.float32, **options)
        return {name: getattr(pipe, name).proj_out.bias[0].item() == 7.0 for name in ("transformer", "transformer_2")}

    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[component]
    base = str(tmp_path / "base")
    assert biases(tmp_path / "said", base) == {component: True, other: False}
    assert biases(tmp_path / "unsaid", base, component=component) == {component: True, other: False}
    with pytest.raises(ValueError, match="has transformer and transformer_2, and .*unsaid does not say which of them it is"):
        generate.make_pipeline(tmp_path / "unsaid", base, torch.float32)
    with pytest.raises(ValueError, match=f"said is an export of {component}, got {other}"):
        generate.make_pipeline(tmp_path / "said", base, torch.float32, component=other)
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "one")
    if component == "transformer_2":
        with pytest.raises(ValueError, match="said is an export of transformer_2, and .*one has only transformer"):
            generate.make_pipeline(tmp_path / "said", str(tmp_path / "one"), torch.float32)


def test_both_transformers_of_a_run(tmp_path, capsys):
    pipe = tiny_pipeline(transformer_2=True, layers=1)
    pipe.save_pretrained(tmp_path / "base")
    for name in ("transformer", "transformer_2"):
        with torch.no_grad():
            getattr(pipe, name).proj_out.bias.fill_(7.0)
        patch_model(getattr(pipe, name))
        export_checkpoint(getattr(pipe, name), tmp_path / "run" / "export" / name, component=name)
    folder = tmp_path / "run" / "export"
    made = generate.make_pipeline(folder, str(tmp_path / "base"), torch.float32)
    assert made.transformer.proj_out.bias[0] == made.transformer_2.proj_out.bias[0] == 7
    arguments = [*SIZE, "--prompt=a", "--output", str(tmp_path / "out.mp4")]
    generate.main([str(folder), f"--pipeline={tmp_path / 'base'}", *arguments])
    assert "4-bit attention in 4 of 4 attention modules" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"wrote; try {folder}/transformer or {folder}/transformer_2"):
        load_checkpoint(tmp_path / "run")


def test_adapters_of_a_transformer(exports, tmp_path, capsys):
    model = tiny_pipeline().transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    patch_model(model)
    base = str(exports / "base" / "transformer")
    export_checkpoint(model, tmp_path / "adapters", merge_adapters=False, base_model=base)
    arguments = [f"--pipeline={exports / 'base'}", *SIZE, "--prompt=a", "--output", str(tmp_path / "out.mp4")]
    generate.main([str(tmp_path / "adapters"), *arguments])
    assert shape(tmp_path / "out.mp4")[0] == 5
    assert "4-bit attention in 4 of 4 attention modules" in capsys.readouterr().out


def test_the_implementation_is_what_calls_ran(exports, capsys):
    with fake_gpu(arch=90):
        generate.main([str(exports / "text"), "--prompt", "a", "--max-new-tokens=1"])
    assert capsys.readouterr().out.rstrip().endswith("2 of 3 attention modules; triton implementation, cpu]")


def test_says_what_ran_not_what_was_asked(exports, capsys, monkeypatch):
    monkeypatch.setattr(PatchHandle, "patched", property(lambda handle: {}))
    with pytest.raises(ValueError, match="missing"):
        generate.main([str(exports / "text"), "--prompt", "a"])
