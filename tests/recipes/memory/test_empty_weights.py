"""Sharded training: processes that are given their part of the weights do not read any."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from qat_patch import get_handle
from qat_recipes.command_line import read_settings
from qat_recipes.memory import empty_weights
from qat_recipes.memory.empty_weights import find_by_name, receives_weights, reserve_memory, without_weights
from qat_recipes.tasks.language_modeling import LanguageModeling, Settings
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import tiny_transformer
from support.runs.qwen3_runs import BARE, settings
from support.runs.runs import command_line

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize(
    ("plugin", "is_main_process", "expected"),
    [
        (None, False, False),
        (SimpleNamespace(cpu_ram_efficient_loading=False), False, False),
        (SimpleNamespace(cpu_ram_efficient_loading=True), True, False),
        (SimpleNamespace(cpu_ram_efficient_loading=True), False, True),
    ],
)
def test_which_layers_receive_weights(monkeypatch, plugin, is_main_process, expected):
    class State:
        pass

    State._shared_state, State.fsdp_plugin, State.is_main_process = {"started": True}, plugin, is_main_process
    monkeypatch.setattr(empty_weights, "AcceleratorState", State)
    assert receives_weights() == expected
    State._shared_state = {}
    assert not receives_weights()


@pytest.mark.parametrize("lora", [False, True])
def test_only_what_is_trained_whole_is_left_unread(inputs, tmp_path, monkeypatch, lora):
    monkeypatch.setattr("qat_recipes.tasks.fine_tuning.receives_weights", lambda: True)
    read = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: read.append(1) or load(*args, **kw))
    changes = {"lora.rank": 4, "lora.alpha": 8} if lora else {}
    task = LanguageModeling(
        read_settings(Settings, command_line(settings(inputs, tmp_path / "run", **BARE | changes))), Accelerator()
    )
    assert len(read) == lora and len(get_handle(task.model).patched) == 2
    assert {x.device.type for x in task.model.parameters()} == ({"cpu"} if lora else {"meta"})
    if not lora:
        stock = load(inputs / "model")
        assert {name: (x.shape, x.dtype) for name, x in task.model.named_parameters()} == {
            name: (x.shape, torch.float32) for name, x in stock.named_parameters()
        }
        for name, buffer in stock.named_buffers():
            assert torch.equal(task.model.get_buffer(name), buffer)


def test_parameters_have_addresses_of_their_own_and_shared_ones_one():
    model = without_weights(lambda: tiny_qwen3(tie_word_embeddings=True))
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    reserve_memory(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in model.named_parameters()] == names
    assert len({x.data_ptr() for x in model.parameters()}) == len(names)
    # What has weights keeps them.
    model = tiny_transformer()
    before = list(model.parameters())
    reserve_memory(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_weights_are_found_by_name():
    model = tiny_transformer()
    find_by_name(model)
    state = model.state_dict(keep_vars=True)
    assert "scale_shift_table" in state and all(model.get_parameter_or_buffer(name) is x for name, x in state.items())
