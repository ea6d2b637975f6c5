"""The moving average of weights that are sharded over processes: as Diffusers weighs it, exported, and part of a checkpoint."""

import shutil

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from support.models.tiny_clips import write_clips
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import SHARDED, assert_same_run, command_line, run_in_two_processes, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RUN = {"steps": 3, "batch_size": 1, "learning_rate": 1e-2, "seed": 3, "ema_decay": 0.6, "checkpoint_every": 2}


def sharded(folder, name, **changes):
    """A run of two processes that share the weights."""
    arguments = command_line(RUN | {"model.path": folder / "model", "data.train": folder / "clips"} | changes)
    run_in_two_processes([str(folder / "sharded.py"), "finetune_wan", f"output_dir={folder / name}", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on clips of two sizes, so that the processes do not always see the same."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_pipeline(layers=1).save_pretrained(folder / "model")
    write_clips(folder / "clips", 4)
    (folder / "sharded.py").write_text(SHARDED)
    sharded(folder, "whole")
    return folder


def test_two_processes_average_together(folder):
    names = [name for name, _ in tiny_pipeline(layers=1).transformer.named_parameters()]

    def averages(step):
        file = folder / f"whole/checkpoint-{step}/custom_checkpoint_1.pkl"
        return dict(zip(names, torch.load(file, weights_only=True)["shadow_params"], strict=True))

    before, after, exported = averages(2), averages(3), weights(folder / "whole/export")
    dcp_to_torch_save(folder / "whole/checkpoint-3/pytorch_model_fsdp_0", folder / "weights.pt")
    trained = torch.load(folder / "weights.pt")["model"]
    assert exported.keys() == set(names) == trained.keys()
    for name in names:
        # EMAModel starts with a shorter memory: (1 + 2) / (10 + 2) in the third step.
        expected = before[name] - (1 - 3 / 12) * (before[name] - trained[name])
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(exported[name], after[name])
    assert sum(not torch.equal(after[name], trained[name]) for name in names) > len(names) / 2


@pytest.mark.slow
def test_a_run_resumes_with_its_average(folder):
    shutil.copytree(folder / "whole", folder / "run", ignore=shutil.ignore_patterns("export", "checkpoint-3"))
    sharded(folder, "run", resume="latest")
    assert_same_run(folder / "run", folder / "whole")
