"""What every test gets: no network, few threads, a skip where it needs a GPU and there is none; and fixtures of several files."""

import os

# Read once, when torch and the Hugging Face libraries are imported; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Test tensors are tiny: more threads wait for each other, and their number would change sums from machine to machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import getpass
import multiprocessing
import multiprocessing.util
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

# torch's own default, in full: `temporary_files` moves what it is relative to, and this is a cache for the next time.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")


def pytest_configure():
    """Child processes import what tests import, from this tree: pytest does not pass its own `pythonpath` on."""
    root = Path(__file__).parents[1]
    paths = [*(str(root / name) for name in (".", "kernels", "recipes", "tests")), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """Tests leave nothing behind, nor do processes that they kill: temporary files go to a folder that goes with the session."""
    tmp_path_factory.getbasetemp()  # stays, for a look at what failed
    multiprocessing.util.get_temp_dir()  # goes with this process, which is after the session
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """For tests that run recipes: on the CPU, and without what Accelerate keeps for the life of a process."""
    from support.runs.runs import reset_accelerate

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call that a patched model makes of 4-bit attention."""
    from support.kernels.calls import record_calls

    return record_calls(monkeypatch)


@pytest.fixture
def default_backend_stays():
    """Diffusers keeps its default attention backend for the life of a process: no patch may change it."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()
    yield
    assert _AttentionBackendRegistry.get_active_backend() == before


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny language model and texts, for recipes; not to be changed."""
    from support.models.tiny_recipe import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def reference(inputs, tmp_path_factory):
    """The output folder of a run of recipes/finetune_qwen3.py that nothing interrupted; not to be changed."""
    from support.runs.qwen3_runs import finetune

    output_dir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        finetune(inputs, output_dir)
    return output_dir


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Exports by kind, to be copied and damaged: single, sharded, wan and adapters; base is a model as it was before."""
    from support.models.exports import write_exports

    folder = tmp_path_factory.mktemp("originals")
    write_exports(folder)
    return folder


@pytest.fixture(scope="session")
def wan_models(tmp_path_factory):
    """Folders of tiny Wan pipelines: t2v, i2v and other. Neither they nor `clips` nor `prepared` are to be changed."""
    from support.models.clips_to_prepare import save_models

    return save_models(tmp_path_factory.mktemp("wan_models"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of videos with captions: three that can be used and five that cannot."""
    from support.models.clips_to_prepare import make_clips

    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def prepared(wan_models, clips, tmp_path_factory):
    """The clips as qat-patch prepare-wan-data encodes them for t2v."""
    from support.models.clips_to_prepare import prepare

    output = tmp_path_factory.mktemp("prepared")
    prepare(wan_models / "t2v", clips, output)
    return output


@pytest.fixture(scope="module")
def compiler():
    """Processes in which Triton believes in the GPU that it is told of (aot.py); two, for compilation takes most of the time."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
