"""patch_model on Wan pipelines: their transformers are patched, and nothing else."""

import copy

import pytest
import torch

from qat_patch import AttnQATConfig, calibrate, get_handle, patch_model, unpatch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from support.families.families import relative
from support.models.lively_wan import LAYERS, processors, same_objects, sample, tiny_wan_pipeline, wan_inputs

pytestmark = pytest.mark.usefixtures("default_backend_stays")


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_pipeline(i2v, calls):
    pipe = tiny_wan_pipeline(i2v)
    before = sample(pipe, whole=True)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    states = {name: copy.deepcopy(part.state_dict()) for name, part in models.items()}
    stock = processors(pipe.transformer)

    handle = patch_model(pipe)
    assert handle.models == [pipe.transformer]
    assert list(handle.patched) == [f"transformer.{name}" for name in stock]
    assert [name for name, part in models.items() if any("_qat_handle" in vars(m) for m in part.modules())] == ["transformer"]
    assert 1e-5 < relative(sample(pipe, whole=True), before) < 0.5
    assert len(calls) == 2 * 2 * LAYERS * (3 if i2v else 2)  # steps, guidance
    with get_handle(pipe).disabled():
        assert torch.equal(sample(pipe, whole=True), before)

    unpatch_model(pipe)
    assert get_handle(pipe) is get_handle(pipe.transformer) is None
    assert same_objects(processors(pipe.transformer), stock)
    assert torch.equal(sample(pipe, whole=True), before)
    for name, part in models.items():
        assert list(part.state_dict()) == list(states[name])
        assert all(torch.equal(x, states[name][key]) for key, x in part.state_dict().items())


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_wan_2_2_has_two_transformers(i2v, calls):
    pipe = tiny_wan_pipeline(i2v, two_transformers=True)
    before = sample(pipe)
    stock = {"transformer": processors(pipe.transformer), "transformer_2": processors(pipe.transformer_2)}
    handle = patch_model(pipe, AttnQATConfig(include=["blocks.*.attn1"]))
    assert list(handle.patched) == [f"{part}.blocks.{i}.attn1" for part in stock for i in range(LAYERS)]
    patched = sample(pipe)
    assert len(calls) == 2 * 2 * LAYERS
    assert not torch.equal(patched, before)
    with handle.disabled():
        assert torch.equal(sample(pipe), before)

    # Each has a handle of its own: a copy of one does not copy the other, and one can go back alone.
    clone = copy.deepcopy(pipe.transformer)
    assert get_handle(clone).models == [clone]
    unpatch_model(pipe.transformer)
    assert get_handle(pipe).models == [pipe.transformer_2]
    with pytest.raises(ValueError, match="transformer_2 is patched already"):
        patch_model(pipe)
    assert get_handle(pipe.transformer) is None
    with handle.disabled():  # the older handle does not patch it again
        pass
    assert same_objects(processors(pipe.transformer), stock["transformer"])
    unpatch_model(pipe)
    assert same_objects(processors(pipe.transformer_2), stock["transformer_2"])
    assert torch.equal(sample(pipe), before)
    pipe.transformer, pipe.transformer_2 = None, pipe.transformer
    assert patch_model(pipe).models == [pipe.transformer_2]


@pytest.mark.parametrize("two_transformers", [False, True])
def test_a_failure_half_way_undoes_everything(two_transformers, monkeypatch):
    pipe = tiny_wan_pipeline(two_transformers=two_transformers)
    models = [pipe.transformer, *([pipe.transformer_2] if two_transformers else [])]
    stock = [processors(model) for model in models]
    fine = [diffusers_adapter._patched] * (LAYERS * 2 * len(models) - 1)

    def fail(processor, layer):
        if not fine:
            assert not any(same_objects(processors(model), before) for model, before in zip(models, stock, strict=True))
            raise RuntimeError("half-way")
        return fine.pop()(processor, layer)

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_adapter, "_patched", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            patch_model(pipe)
    assert get_handle(pipe) is None
    assert all(same_objects(processors(model), before) for model, before in zip(models, stock, strict=True))
    patch_model(pipe)


@pytest.mark.gpu
def test_model_cpu_offload():
    pipe = tiny_wan_pipeline()
    handle = patch_model(pipe)
    calibrate(pipe.transformer, [wan_inputs(i2v=False)])
    expected = sample(pipe)
    pipe.enable_model_cpu_offload()
    assert relative(sample(pipe).cpu(), expected) < 0.05
    assert {shift.device.type for shift in handle.k_shift.values()} == {"cuda"}
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert torch.equal(sample(pipe), expected)
