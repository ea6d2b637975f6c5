"""What a checkpoint restores is read without running anything; what is missing or does not fit stops the run."""

import io
import json
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as sharded
from accelerate import Accelerator
from accelerate.utils import load
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

import finetune_qwen3
from qat_patch.checkpoint import integrity
from qat_recipes.training import restore
from qat_recipes.training.calibration import Calibration
from qat_recipes.training.optimization import WeightAverage
from support.runs.qwen3_runs import BARE, settings
from support.runs.runs import RECIPES, assert_same_run, run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OPTIONS = BARE | {"checkpoint_every": 1, "ema_decay": 0.5, "calibration_batches": 1}
SCHEDULE, AVERAGE, SHIFTS = (f"custom_checkpoint_{number}.pkl" for number in range(3))
STATES = "random_states_0.pkl"


class Boom:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run of two steps with two checkpoints that hold all that there can be in one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run(finetune_qwen3, settings(inputs, folder, **OPTIONS))
    return folder


@pytest.fixture
def killed(whole, tmp_path):
    """The same, with only its first checkpoint; and how to seal that again."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("export", "checkpoint-2"))
    return folder


def seal(checkpoint, **state):
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    del manifest["sha256"]
    manifest["state"] |= state
    manifest["files"] = {name: x for name, x in integrity.fingerprints(checkpoint).items() if name != "checkpoint.json"}
    (checkpoint / "checkpoint.json").write_text(json.dumps(integrity.sealed(manifest)))


def resume(inputs, folder):
    return run(finetune_qwen3, settings(inputs, folder, **OPTIONS, resume="latest"))


def test_it_resumes_bit_for_bit(whole, killed, inputs):
    resume(inputs, killed)
    assert_same_run(killed, whole)
    one, other = (load(folder / "checkpoint-2" / AVERAGE)["shadow_params"] for folder in (whole, killed))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["optimizer.bin", SCHEDULE, AVERAGE, SHIFTS, STATES])
def test_no_file_runs_code(killed, inputs, tmp_path, name):
    file = killed / "checkpoint-1" / name
    for content in (Boom(tmp_path / "ran"), load(file) | {"more": Boom(tmp_path / "ran")}):
        torch.save(content, file)
        seal(killed / "checkpoint-1")
        with pytest.raises(ValueError, match=f"resume: {name}.* cannot be loaded: it holds something else than tensors") as error:
            resume(inputs, killed)
        # torch's own message tells how to let it run.
        assert "weights_only=False" not in str(error.value)
        file.write_bytes(pickle.dumps(content))
        seal(killed / "checkpoint-1")
        with pytest.raises(ValueError, match=f"resume: {name}.* cannot be loaded"):
            resume(inputs, killed)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The same of a model of one layer, in tmp_path/checkpoint; and how to load it."""
    accelerator = Accelerator()
    model = torch.nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shifts = {"k_shift": {"attention": torch.ones(2, 3)}, "q_shift": {"attention": torch.zeros(2, 3)}}
    handle = SimpleNamespace(patched={"attention": SimpleNamespace()}, shifts=shifts)
    registered = [get_scheduler("linear", optimizer, 1, 4), EMAModel(model.parameters()), Calibration(handle, accelerator)]
    accelerator.register_for_checkpointing(*registered)
    accelerator.save_state(tmp_path / "checkpoint")
    handle.shifts = {"k_shift": {}, "q_shift": {}}

    def load_it(left_out=frozenset()):
        found = restore.load(accelerator, tmp_path / "checkpoint", model, optimizer, registered, left_out=left_out)
        for which, found in shifts.items():
            assert torch.equal(getattr(handle.patched["attention"], which), found["attention"])
        return found

    return load_it


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def moments(state):
    state["state"][0]["exp_avg"] = torch.zeros(3)
    return state


def shapes(state):
    state["shadow_params"][0] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *((STATES, without(key), "expected numpy_random_seed, random_state, step") for key in ("step", "random_state")),
        *((STATES, without(key), "expected numpy_random_seed") for key in ("numpy_random_seed", "torch_manual_seed")),
        (STATES, lambda x: x | {"torch_cuda_manual_seed": []}, "got numpy_random_seed, random_state, step, torch_cuda"),
        (STATES, lambda x: x | {"torch_manual_seed": torch.zeros(3, dtype=torch.uint8)}, "cannot be loaded"),
        (STATES, lambda x: x | {"random_state": (3, (1, 2), None)}, "cannot be loaded"),
        (STATES, lambda x: x | {"numpy_random_seed": ("MT19937", numpy.zeros(3, numpy.uint32), 0, 0, 0.0)}, "cannot be loaded"),
        (STATES, lambda x: x | {"step": "2"}, "expected a number of batches as step"),
        (STATES, lambda x: [], "cannot be loaded"),
        ("optimizer.bin", without("state"), "optimizer.bin .* cannot be loaded"),
        ("optimizer.bin", moments, "expected a step and two moments of shape"),
        ("optimizer.bin", lambda x: x | {"param_groups": []}, "cannot be loaded"),
        (SCHEDULE, without("last_epoch"), r"\(LambdaLR\) .* expected .*last_epoch"),
        (SCHEDULE, lambda x: x | {"step": 3}, "expected .*last_epoch"),
        (SCHEDULE, lambda x: x | {"last_epoch": "1"}, "of the types"),
        (AVERAGE, without("shadow_params"), r"\(EMAModel\) .* expected .*shadow_params"),
        (AVERAGE, shapes, "of the types and shapes"),
        (SHIFTS, lambda x: {}, r"\(Calibration\) .* expected q_shift of every patched module"),
        (
            SHIFTS,
            lambda x: x | {"k_shift": x["k_shift"] | {"other": torch.ones(2, 3)}},
            "expected k_shift of every patched module",
        ),
        (SHIFTS, lambda x: x | {"q_shift": {name: value[0] for name, value in x["q_shift"].items()}}, "expected q_shift"),
        (SHIFTS, lambda x: x | {"k_shift": {name: value.double() for name, value in x["k_shift"].items()}}, "expected k_shift"),
    ],
)
def test_what_is_missing_or_does_not_fit_stops_the_run(small, tmp_path, name, change, message):
    small()
    file = tmp_path / "checkpoint" / name
    torch.save(change(load(file)), file)
    with pytest.raises(ValueError, match=message):
        small()


def test_weights_have_to_be_all_there(small, tmp_path):
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    for changed in (
        {"weight": weights["weight"]},
        weights | {"other": torch.zeros(2)},
        weights | {"weight": torch.zeros(2, 2)},
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"resume: model.safetensors .* cannot be loaded"):
            small()
    save_file({"bias": weights["bias"]}, file, metadata={"format": "pt"})
    small(left_out={"weight"})


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors", SHIFTS, STATES])
def test_files_that_were_never_there(small, tmp_path, name):
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(ValueError, match="resume: "):
        small()


def test_a_run_whose_log_was_never_there(killed, inputs):
    (killed / "checkpoint-1" / "metrics.jsonl").unlink()
    seal(killed / "checkpoint-1")
    with pytest.raises(ValueError, match="does not hold the state of a run"):
        resume(inputs, killed)


@pytest.mark.parametrize("state", [{"step": "1"}, {"settings": None}, {"inputs": 3}, {"processes": [1]}])
def test_a_state_of_other_types(killed, inputs, state):
    seal(killed / "checkpoint-1", **state)
    with pytest.raises(ValueError, match="does not hold the state of a run"):
        resume(inputs, killed)


def test_checkpoints_of_an_older_version_are_named(killed, inputs):
    file = killed / "checkpoint-1" / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="checkpoint-1 has format_version 2, and this program reads 4"):
        resume(inputs, killed)


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder of shards, and how to read it."""
    state = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "lr": 0.5,
        "betas": (0.9, 0.99),
    }
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    sharded.save(state, storage_writer=sharded.FileSystemWriter(tmp_path / "shards"))

    def read():
        found = {"weight": torch.zeros(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16), "lr": 0.0, "betas": (0.0, 0.0)}
        reader, planner = restore._PlainReader(tmp_path / "shards"), restore._PlainPlanner()
        sharded.load(found, storage_reader=reader, planner=planner)
        return found, state

    yield read
    dist.destroy_process_group()


def test_shards_are_read_as_plain_values(shards, tmp_path):
    found, state = shards()
    assert torch.equal(found["weight"], state["weight"]) and torch.equal(found["half"], state["half"])
    assert (found["lr"], found["betas"]) == (0.5, (0.9, 0.99))
    metadata = tmp_path / "shards" / ".metadata"
    good = pickle.loads(metadata.read_bytes())

    good.planner_data = Boom(tmp_path / "ran")
    metadata.write_bytes(pickle.dumps(good))
    with pytest.raises(sharded.api.CheckpointException, match="it names _?io.open, which describes no shards"):
        shards()
    good.planner_data = None
    for where in good.storage_data.values():
        where.relative_path = f"../shards/{where.relative_path}"
    metadata.write_bytes(pickle.dumps(good))
    with pytest.raises(sharded.api.CheckpointException, match="expected shards as plain files"):
        shards()
    assert not (tmp_path / "ran").exists()


def test_a_format_of_memory_by_its_name():
    """As Python 3.11.0 to 3.11.3 write it, whatever version runs here; nothing else is read by its name."""
    formats = sharded.metadata._MEM_FORMAT_ENCODING

    class Named:
        def __init__(self, *of: object) -> None:
            self.of = of

        def __reduce__(self):
            return getattr, self.of

    member = formats.TORCH_CHANNELS_LAST
    assert restore._PlainUnpickler(io.BytesIO(pickle.dumps(Named(formats, member.name)))).load() is member
    with pytest.raises(pickle.UnpicklingError, match="which describes no shards"):
        restore._PlainUnpickler(io.BytesIO(pickle.dumps(Named(torch.Size, "numel")))).load()


def test_a_value_among_shards_runs_nothing(tmp_path):
    planner, value = restore._PlainPlanner(), io.BytesIO()
    torch.save(Boom(tmp_path / "ran"), value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(None, value)
    assert not (tmp_path / "ran").exists()


def test_nothing_else_unpickles():
    unsafe = re.compile(r"weights_only\s*=\s*False|\bpickle\.loads?\(|\bload_state\(|\.load_custom_state\(")
    sources = [*RECIPES.rglob("*.py"), *RECIPES.parent.glob("scripts/**/*.py"), *RECIPES.parent.glob("qat_patch/**/*.py")]
    assert len(sources) > 50
    assert [source for source in sources if unsafe.search(source.read_text(encoding="utf-8"))] == []


def test_an_average_goes_back_to_the_device_of_the_run():
    """Checkpoints are read into the CPU's memory. The meta device stands for a GPU."""
    model = torch.nn.Linear(2, 2)
    there = SimpleNamespace(device=torch.device("meta"), is_main_process=True)
    state = WeightAverage(model, 0.5, SimpleNamespace(device=torch.device("cpu"), is_main_process=True)).state_dict()
    average = WeightAverage(model, 0.5, there)
    average.load_state_dict(state)
    assert {x.device.type for x in average.average.shadow_params} == {"meta"}
