"""Patched models that are pickled, saved by torch.save or sent to a spawned process run there, and can be unpatched there."""

import copy
import pickle
import subprocess
import sys

import torch
import torch.multiprocessing

from qat_patch import calibrate, patch_model
from support.models.lively_wan import tiny_wan, velocity
from support.models.tiny_qwen3 import logits, tiny_qwen3, token_ids

LOADED = """
import pickle, sys, torch
torch.set_num_threads(1)
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
module = torch.load(folder + "/module.pt", weights_only=False)  # first of all: an attention module without its model
with torch.no_grad():
    assert torch.equal(module(**expected["module"])[0], expected["out"])
models = [pickle.load(open(folder + "/qwen3.pkl", "rb")), torch.load(folder + "/qwen3.pt", weights_only=False)]
wan = torch.load(folder + "/wan.pt", weights_only=False)
from qat_patch import get_handle, unpatch_model
from support.models.lively_wan import velocity
from support.models.tiny_qwen3 import logits, token_ids
runs = [("qwen3", model, lambda model: logits(model, token_ids())) for model in models]
for name, model, run in [*runs, ("wan", wan, velocity)]:
    assert "reached" not in str(get_handle(model))
    assert torch.equal(run(model), expected[name]) and "not yet called" not in str(get_handle(model))
    with get_handle(model).disabled():
        assert torch.equal(run(model), expected[name + " original"])
    unpatch_model(model)
    assert torch.equal(run(model), expected[name + " original"])
"""


def test_a_fresh_process_that_knows_nothing(tmp_path):
    qwen3, wan, expected = tiny_qwen3(), tiny_wan(), {}
    expected["qwen3 original"], expected["wan original"] = logits(qwen3, token_ids()), velocity(wan)
    patch_model(qwen3)
    patch_model(wan)
    calibrate(qwen3, [token_ids()])
    (tmp_path / "qwen3.pkl").write_bytes(pickle.dumps(qwen3))
    torch.save(qwen3, tmp_path / "qwen3.pt")
    torch.save(wan, tmp_path / "wan.pt")
    expected["qwen3"], expected["wan"] = logits(qwen3, token_ids()), velocity(wan)
    module = qwen3.model.layers[0].self_attn
    torch.save(module, tmp_path / "module.pt")
    assert (tmp_path / "module.pt").stat().st_size < (tmp_path / "qwen3.pt").stat().st_size / 2  # it brings no model along
    x = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": x, "position_embeddings": (torch.ones(1, 24, 32), torch.zeros(1, 24, 32)), "attention_mask": None}
    with torch.no_grad():
        expected |= {"module": inputs, "out": module(**inputs)[0]}
    torch.save(expected, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _in_a_spawned_process(rank, model, expected):
    torch.set_num_threads(1)
    assert torch.equal(logits(model, token_ids()), expected)


def test_spawn():
    model = tiny_qwen3()
    patch_model(model)
    torch.multiprocessing.spawn(_in_a_spawned_process, (copy.deepcopy(model), logits(model, token_ids())), nprocs=1)
