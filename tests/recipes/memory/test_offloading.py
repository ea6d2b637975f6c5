"""Frozen weights that wait in the memory of the CPU: when they come and go, what is left of them, and runs with them.

There is no GPU here. Instead weights that wait are NaN, and what is brought is a copy, so that each can be seen.
"""

import gc
import itertools
import shutil
import weakref

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup

import finetune_qwen3
import finetune_wan
from qat_patch import patch_model
from qat_recipes.memory import offloading
from qat_recipes.tasks.video_diffusion import EXPERTS
from qat_recipes.training.adapters import LoraSettings, add_adapters
from support.models.tiny_clips import batch, objective, write_clips
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.qwen3_runs import BARE
from support.runs.qwen3_runs import settings as qwen3_settings
from support.runs.runs import assert_same_run, log, run, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RUN = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "seed": 4, "lora.rank": 2, "lora.alpha": 4, "checkpoint_every": 2}
LAYERS = {"lora.offload": "layers", "model.gradient_checkpointing": "true"}
EXPERT = {"lora.offload": "expert", "model.transformer": "both"}


class Waiting:
    """What ModuleGroup of Diffusers does between two devices, to be seen on one."""

    def __init__(self):
        self.values, self.brought, self.calls, self.most = {}, [], [], 0

    def offload(self, group):
        (layer,) = group.modules
        for parameter in layer.parameters():
            assert not parameter.requires_grad  # the optimizer has its place in memory
            if layer not in self.values or not parameter.isnan().any():
                self.values.setdefault(layer, {})[parameter] = parameter.data.clone()
            parameter.data = torch.full_like(parameter.data, float("nan"))
        self.calls.append(("leaves", layer))

    def onload(self, group):
        (layer,) = group.modules
        for parameter, x in self.values[layer].items():
            parameter.data = x.clone()
        # What is kept of it, by whomever, keeps its memory.
        self.brought.append(weakref.ref(layer.weight.data.untyped_storage()))
        self.most = max(self.most, self.alive())
        self.calls.append(("comes", layer))

    def alive(self):
        return sum(storage() is not None for storage in self.brought)


@pytest.fixture
def waiting(monkeypatch):
    waiting = Waiting()
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", lambda group: waiting.offload(group))
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", lambda group: waiting.onload(group))
    return waiting


def gradients(is_offloaded, base_dtype=None, checkpointing=True):
    model = tiny_transformer(layers=3)
    if checkpointing:
        model.enable_gradient_checkpointing()
    add_adapters(model, LoraSettings(rank=2, alpha=4, base_dtype=base_dtype), ("to_q", "ffn.net.2"), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    patch_model(model)
    if is_offloaded:
        offloading.offload("layers", [model], torch.device("cpu"))
    model.train()
    task = objective()
    torch.manual_seed(1)
    inputs = task.inputs(batch())
    task.loss(task.outputs(model, inputs), inputs).backward()
    return model, {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.parametrize("base_dtype", [None, "float8"])
def test_each_layer_comes_for_each_computation_and_leaves_after_it(waiting, base_dtype):
    expected = gradients(False, base_dtype)[1]
    assert not waiting.calls
    model, found = gradients(True, base_dtype)
    assert all(x is not None and torch.equal(x, expected[name]) for name, x in found.items())
    layers = [layer for block in model.blocks for layer in block.modules() if type(layer) is torch.nn.Linear]
    layers = [layer for layer in layers if not layer.weight.requires_grad]
    assert len(layers) == 3 * 10 and {*waiting.values} == {*layers}
    # First of all it leaves. Then it comes and leaves at once, in the forward pass and when that is computed again.
    for layer in layers:
        assert [what for what, which in waiting.calls if which is layer] == ["leaves", *["comes", "leaves"] * 2]
    order = waiting.calls[len(layers) :]
    assert all(a[1] is b[1] and (a[0], b[0]) == ("comes", "leaves") for a, b in zip(order[::2], order[1::2], strict=True))
    blocks = [next(i for i, block in enumerate(model.blocks) if layer in {*block.modules()}) for what, layer in order[::2]]
    assert list(dict.fromkeys(blocks[:30])) == [0, 1, 2] and list(dict.fromkeys(blocks[30:])) == [2, 1, 0]


def test_the_backward_pass_holds_one_block(waiting):
    gradients(True)
    assert 1 < waiting.most <= 11
    gc.collect()
    assert waiting.alive() == 0
    waiting.most = 0
    gradients(True, checkpointing=False)
    assert waiting.most > 20  # so it is refused; layers that read text only are not needed again


@pytest.fixture(scope="module")
def inputs_wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs_wan")
    tiny_pipeline(layers=1).save_pretrained(folder / "wan2.1")
    tiny_pipeline(transformer_2=True, layers=1).save_pretrained(folder / "wan2.2")
    write_clips(folder / "clips", 4)
    return folder


def finetune(inputs_wan, output_dir, **changes):
    kind = "wan2.2" if "model.transformer" in changes else "wan2.1"
    places = {"model.path": inputs_wan / kind, "data.train": inputs_wan / "clips", "output_dir": output_dir}
    run(finetune_wan, places | RUN | changes)
    return log(output_dir)


def test_a_run_with_offloaded_layers(inputs_wan, tmp_path, waiting):
    """Samples and exports work too, and the run resumes bit for bit."""
    own = {"samples.every": 3, "samples.inference_steps": 1, "samples.guidance_scale": 1, "samples.prompts": "[a red square]"}
    own |= {"samples.height": 32, "samples.width": 48, "samples.num_frames": 5, "distillation": 0.5}
    finetune(inputs_wan, tmp_path / "plain", **own)
    finetune(inputs_wan, tmp_path / "waiting", **LAYERS | own)
    assert waiting.calls
    assert_same_run(tmp_path / "waiting", tmp_path / "plain")
    shutil.copytree(tmp_path / "waiting", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-3"))
    finetune(inputs_wan, tmp_path / "run", resume="latest", **LAYERS | own)
    assert_same_run(tmp_path / "run", tmp_path / "plain")


def test_a_language_model_with_offloaded_layers(inputs, tmp_path, waiting):
    changes = BARE | {"lora.rank": 2, "lora.alpha": 4, "steps": 2, "model.gradient_checkpointing": "true"}
    run(finetune_qwen3, qwen3_settings(inputs, tmp_path / "plain", **changes))
    run(finetune_qwen3, qwen3_settings(inputs, tmp_path / "waiting", **changes | {"lora.offload": "layers"}))
    assert waiting.calls
    assert_same_run(tmp_path / "waiting", tmp_path / "plain")


def test_one_expert_at_a_time(inputs_wan, tmp_path, monkeypatch):
    """The frozen layers of the other one are where they cannot be computed with, in steps and in samples. Also in float8."""
    switches = []

    class Seen(offloading._Inactive):
        def __init__(self, layers):
            super().__init__(layers)
            self.values = [(parameter, parameter.data.clone()) for parameter, _ in self.waiting]
            self.waiting = [(parameter, torch.full_like(x, float("nan"))) for parameter, x in self.waiting]
            for parameter, waiting in self.waiting:
                parameter.data = waiting

        def bring(self, device):
            if not self.is_here:
                switches.append(self)
                for parameter, x in self.values:
                    parameter.data = x.clone()
            self.is_here = True

    own = {"samples.every": 3, "samples.inference_steps": 4, "samples.guidance_scale": 1, "samples.prompts": "[a red square]"}
    own |= {"samples.height": 32, "samples.width": 48, "samples.num_frames": 5, "calibration_batches": 1}
    own |= {"lora.base_dtype": "float8", "model.gradient_checkpointing": "true"}
    both = {"model.transformer": "both"}
    finetune(inputs_wan, tmp_path / "plain", **own | both)
    monkeypatch.setattr(offloading, "_Inactive", Seen)
    finetune(inputs_wan, tmp_path / "waiting", **own | EXPERT)
    assert log(tmp_path / "waiting") == log(tmp_path / "plain")
    for name in EXPERTS:
        a, b = (weights(tmp_path / kind / "export" / name) for kind in ("waiting", "plain"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # Calibration, samples in two kinds of attention, three steps with the one that is there first, and samples.
    assert len({*switches}) == 2 and all(a is not b for a, b in itertools.pairwise(switches))
    assert len(switches) == 2 + 4 + 2 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.offload": "layers"}, "lora.offload: layers needs model.gradient_checkpointing=true"),
        ({"lora.offload": "expert"}, r"lora.offload: expert is for a run of two transformers \(model.transformer=both\)"),
        (LAYERS | {"compile": "inductor"}, "settings.compile: expected null with lora.offload=layers, got inductor"),
        (LAYERS | {"lora.base_dtype": "nf4"}, "lora.offload: layers has not been tried with base_dtype=nf4"),
        ({"lora.offload": "blocks"}, "lora.offload: expected layers or expert"),
    ],
)
def test_what_cannot_be_done_is_refused(inputs_wan, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(inputs_wan, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
