"""Adapters alone of Wan transformers: pipelines of Diffusers read them, with its names and with those of ComfyUI."""

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
from diffusers import WanPipeline
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3AutoDenoiseStep
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat_patch import AttnQATConfig, export_checkpoint, get_handle, load_checkpoint, patch_model, verify_checkpoint
from qat_patch.checkpoint.load import component_of
from qat_patch.metadata import LOADING_ADAPTERS
from support.families.diffusers_classes import tiny
from support.models.exports import velocity
from support.models.tiny_video_pipelines import minimax_h3_transformer
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.runs import reseal

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def trained(model, **options):
    torch.manual_seed(1)
    model.add_adapter(
        peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": False} | options)
    )
    patch_model(model, AttnQATConfig(exclude=["*.attn2"]))
    return model


@pytest.mark.parametrize("lora_format", ["diffusers", "comfyui"])
@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_pipeline_reads_them(tmp_path, lora_format, component, strength):
    stored = tiny_pipeline(transformer_2=True, layers=1)
    stored.save_pretrained(tmp_path / "base")
    pipe = WanPipeline.from_pretrained(tmp_path / "base")
    before = velocity(getattr(pipe, component))
    model = trained(getattr(WanPipeline.from_pretrained(tmp_path / "base"), component))
    model.set_adapters(["default"], [strength])
    with get_handle(model).disabled():
        expected = velocity(model)
    assert (expected - before).norm() / before.norm() > 0.03
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base"), "lora_format": lora_format}
    export_checkpoint(model, tmp_path / "out", **options)
    assert component_of(tmp_path / "out") == component  # as the folder was named that it was loaded from
    pipe.load_lora_weights(tmp_path / "out", **({"load_into_transformer_2": True} if component == "transformer_2" else {}))
    torch.testing.assert_close(velocity(getattr(pipe, component)), expected, rtol=1e-4, atol=1e-4)
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[component]
    assert torch.equal(velocity(getattr(pipe, other)), velocity(getattr(WanPipeline.from_pretrained(tmp_path / "base"), other)))
    with get_handle(loaded := load_checkpoint(tmp_path / "out")).disabled():
        torch.testing.assert_close(velocity(loaded), expected, rtol=1e-4, atol=1e-4)
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "out")) == 2
    assert ("load_into_transformer_2=True" in (tmp_path / "out" / "README.md").read_text()) == (component == "transformer_2")


def test_every_transformer_of_a_pipeline_is_known_by_name():
    """Those of the installed Diffusers, as its pipelines register them, whole and modular."""
    found = {"transformer"}
    for file in Path(diffusers.__file__).parent.glob("*pipelines/**/*.py"):
        code = file.read_text(encoding="utf-8")
        for registered in re.findall(r"register_modules\(([^()]*)\)", code):
            found |= {*re.findall(r"(\w*transformer\w*)=", registered)}
        found |= {*re.findall(r"(?:ComponentSpec\(\s*|transformer_name=)\"(\w*transformer\w*)\"", code)}
    assert found == {*LOADING_ADAPTERS}


@pytest.mark.parametrize("component", ["transformer_ref", "unconditional_transformer"])
def test_transformers_that_wan_does_not_have(tmp_path, component):
    if component == "transformer_ref":
        pipe = MiniMaxH3AutoDenoiseStep().init_pipeline()
        pipe.update_components(transformer=minimax_h3_transformer(), transformer_ref=minimax_h3_transformer())
    else:
        models = [tiny("Ideogram4Transformer2DModel")[0] for _ in range(2)]
        pipe = SimpleNamespace(transformer=models[0], unconditional_transformer=models[1])
    getattr(pipe, component).save_pretrained(tmp_path / "base" / component)
    # The folder that it was loaded from says which one it is.
    model = type(pipe.transformer).from_pretrained(tmp_path / "base" / component)
    (attention, *_) = patch_model(model).patched
    layers = [name for name, x in model.get_submodule(attention).named_modules() if isinstance(x, torch.nn.Linear)]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[f"{attention}.{layers[0]}"], init_lora_weights=False))
    export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert component_of(tmp_path / "out") == component
    loaded = load_checkpoint(tmp_path / "out")
    expected = {name: x for name, x in loaded.state_dict().items() if "lora_" in name}
    # As the card says that a pipeline takes them.
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("pipe.")]
    exec(line, {"pipe": pipe, "FOLDER": str(tmp_path / "out")})
    state = getattr(pipe, component).state_dict()
    found = {re.sub(r"(lora_.)\.\w+", r"\1.default", name): x for name, x in state.items() if "lora_" in name}
    expected = {re.sub(r"(lora_.)\.\w+", r"\1.default", name): x for name, x in expected.items()}
    assert expected and found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any("lora_" in name for name in pipe.transformer.state_dict())


def test_a_component_that_no_pipeline_has_is_refused(tmp_path):
    tiny_transformer(layers=1).save_pretrained(tmp_path / "base" / "transformer")
    model = trained(tiny_transformer(layers=1))
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base"), "component": "transformer"}
    export_checkpoint(model, tmp_path / "out", **options)
    with safe_open(tmp_path / "out" / FILE, framework="pt") as stored:
        header = stored.metadata()
    save_file(load_file(tmp_path / "out" / FILE), tmp_path / "out" / FILE, header | {"qat_patch_component": "../elsewhere"})
    reseal(tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a component transformer or .*, got '../elsewhere'"):
        load_checkpoint(tmp_path / "out")


def test_names_are_those_that_the_libraries_write(tmp_path):
    tiny_transformer(i2v=True, layers=1).save_pretrained(tmp_path / "base")
    model = trained(tiny_transformer(i2v=True, layers=1), target_modules=[*TARGETS, "add_k_proj", "add_v_proj"])
    options = {"merge_adapters": False, "base_model": str(tmp_path / "base")}
    export_checkpoint(model, tmp_path / "diffusers", **options)
    state = peft.utils.get_peft_model_state_dict(model, adapter_name="default")
    config = {key: sorted(x) if isinstance(x, set) else x for key, x in model.peft_config["default"].to_dict().items()}
    WanPipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=config)
    written, theirs = load_file(tmp_path / "diffusers" / FILE), load_file(tmp_path / FILE)
    assert written.keys() == theirs.keys() and all(torch.equal(written[name], x) for name, x in theirs.items())
    export_checkpoint(model, tmp_path / "comfyui", **options, lora_format="comfyui")
    names = (
        {f"self_attn.{x}" for x in "qkvo"}
        | {f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")}
        | {"ffn.0", "ffn.2"}
    )
    expected = {f"diffusion_model.blocks.0.{name}.{x}" for name in names for x in ("lora_A.weight", "lora_B.weight", "alpha")}
    stored = load_file(tmp_path / "comfyui" / FILE)
    assert set(stored) == expected and {x.item() for name, x in stored.items() if name.endswith("alpha")} == {16.0}
    assert torch.equal(velocity_i2v(load_checkpoint(tmp_path / "comfyui")), velocity_i2v(load_checkpoint(tmp_path / "diffusers")))


@torch.no_grad()
def velocity_i2v(model):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 12, 2, 8, 8, generator=generator), torch.randn(1, 512, 32, generator=generator)
    image = torch.randn(1, 257, 16, generator=generator)
    return model(latents, torch.tensor([500]), text, encoder_hidden_states_image=image, return_dict=False)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["to_q", "proj_out"]}, "LoRA of the attention and feed-forward layers .* got proj_out"),
        ({"target_modules": ["to_q"], "use_dora": True}, "got blocks.0.attn1.to_q"),
    ],
)
def test_what_comfyui_has_no_names_for(tmp_path, options, message):
    model = trained(tiny_transformer(layers=1), **options)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model="base", lora_format="comfyui")
    with pytest.raises(ValueError, match="lora_format='comfyui' is for adapters alone"):
        export_checkpoint(model, tmp_path / "out", lora_format="comfyui")
    with pytest.raises(ValueError, match="lora_format: expected 'diffusers' or 'comfyui', got 'kohya'"):
        export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model="base", lora_format="kohya")
    assert not list(tmp_path.iterdir())


def test_names_of_older_exports_are_read(tmp_path):
    """Without a prefix, as they were written at first."""
    tiny_transformer(layers=1).save_pretrained(tmp_path / "base")
    model = trained(tiny_transformer(layers=1))
    export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    file = tmp_path / "out" / FILE
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
    header["lora_adapter_metadata"] = header["lora_adapter_metadata"].replace('"transformer.', '"')
    save_file({name.removeprefix("transformer."): x for name, x in load_file(file).items()}, file, metadata=header)
    reseal(tmp_path / "out")
    assert torch.equal(velocity(load_checkpoint(tmp_path / "out")), velocity(model))
