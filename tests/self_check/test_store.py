"""Verdicts on disk: whole or not at all, and nothing but ours is read; and what ranks know of them."""

import datetime
import json
import multiprocessing
import os
import warnings

import pytest
import torch
import torch.distributed as dist

from qat_patch import patch_model
from qat_patch.self_check import ranks, store
from qat_patch.self_check.check import check, known_verdicts
from support.kernels.fake_gpu import IDENTITY, SPEC, fake_gpu, passed, says
from support.models.tiny_qwen3 import tiny_qwen3

CASE = {"head_dim": 128, "causal": False, "spec": SPEC, "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    assert store.folder() == tmp_path / "cache"
    monkeypatch.delenv(store.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.folder() == tmp_path / "qat_patch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.folder().parts[-2:] == (".cache", "qat_patch")


def test_what_is_kept_is_read_again_and_replaced(cache):
    for wins_from in ((16, 16), None):
        assert store.keep({"case": CASE} | passed(wins_from))
        (record,) = store.kept()
        assert record["wins_from"] == (None if wins_from is None else [16, 16])
        assert record["key"] == store.key_of(IDENTITY) and record["case"] == CASE
    assert store.keep({"case": CASE | {"causal": True}} | passed())
    assert len(store.kept()) == len(os.listdir(cache)) == 2  # and nothing that was written aside is left


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00" + text,
        lambda text: "[" * 100_000,
        lambda text: json.dumps(json.loads(text) | {"format": 99}),
        lambda text: json.dumps(json.loads(text) | {"state": "fine"}),
        lambda text: json.dumps(json.loads(text) | {"wins_from": [True, 1]}),
        lambda text: json.dumps(json.loads(text) | {"wins_from": [1]}),
        lambda text: json.dumps(json.loads(text) | {"wins_from": "16"}),
        lambda text: json.dumps(json.loads(text) | {"state": "failed"}),  # and yet it wins
        lambda text: json.dumps(json.loads(text) | {"case": {}}),
        lambda text: json.dumps(json.loads(text) | {"case": CASE | {"head_dim": "128"}}),
        lambda text: json.dumps(json.loads(text) | {"words": 3}),
        lambda text: json.dumps(json.loads(text) | {"key": {"gpu": "Fake 5090"}}),
        lambda text: json.dumps(json.loads(text) | {"case": CASE | {"dtype": "nn"}}),
    ],
)
def test_damaged_and_foreign_files_are_ignored(cache, damage):
    with fake_gpu():
        assert store.keep({"case": CASE} | passed())
        (file,) = cache.iterdir()
        assert known_verdicts() is not None
        file.write_text(damage(file.read_text()))
        assert known_verdicts() is None
        file.unlink()
        file.mkdir()
        assert known_verdicts() is None
        assert store.kept() == []


@pytest.mark.parametrize("field", sorted(IDENTITY))
def test_a_verdict_holds_for_what_it_was_found_on(field):
    assert store.keep({"case": CASE} | passed())
    with fake_gpu():
        assert known_verdicts() is not None
    with fake_gpu(identities=[IDENTITY | {field: "another"}]):
        assert known_verdicts() is None


def test_a_verdict_that_cannot_be_written_does_not_count(monkeypatch, cache):
    cache.write_text("a file where the folder should be")
    says(monkeypatch, passed())
    with fake_gpu():
        handle = patch_model(tiny_qwen3())
        with pytest.warns(UserWarning, match="cannot be written to .*: it is lost, and `auto` takes triton; set QAT_PATCH"):
            report = handle.check()
        assert not report.checked[0].is_kept and report.checked[0].taken == "triton"
        assert all(layer.impl == "auto" for layer in handle.patched.values())


def test_a_full_disk_leaves_nothing_behind(monkeypatch, cache):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert not store.keep({"case": CASE} | passed())
    assert os.listdir(cache) == []


def forked(function, *args):
    """What two processes print to the end of a pipe, with torch imported already."""
    context, ends = multiprocessing.get_context("fork"), []
    for number in (0, 1):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=function, args=(sender, number, *args))
        process.start()
        ends.append((process, receiver))
    said = [receiver.recv() if receiver.poll(60) else None for _, receiver in ends]
    for process, _ in ends:
        process.join(10)
    return said


def write_many(sender, number):
    for n in range(50):
        assert store.keep({"case": CASE | {"head_dim": 16 * (n % 5 + 2 * number)}} | passed())
        assert all(record["state"] == "passed" for record in store.kept())
    sender.send("whole")


def test_two_processes_write_at_the_same_time(cache):
    """Each writes its own cases, and some that both have. Files are whole in any order."""
    assert forked(write_many) == ["whole"] * 2
    assert len(store.kept()) == len(os.listdir(cache)) == 7


def read_as_rank(sender, rank, cache, meeting):
    os.environ[store.FOLDER] = f"{cache}{rank}"
    ranks._PATIENCE = datetime.timedelta(seconds=0.5)
    torch.cuda.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    if rank:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ranks.read_by_rank_0(store.kept) == [] and "rank 0 has patched no model" in str(caught[0].message)
        dist.barrier()
        dist.barrier()
        found = ranks.read_by_rank_0(store.kept)
        dist.barrier()
    else:
        dist.barrier()
        found = ranks.read_by_rank_0(store.kept)  # alone: it waits for nobody
        dist.barrier()
        assert store.keep({"case": CASE | {"head_dim": 64}} | passed())  # by another process, meanwhile
        dist.barrier()
    again = ranks.read_by_rank_0(store.kept)  # whoever is first
    with pytest.raises(ValueError, match="self-check: expected a process alone, got one of a distributed run"):
        check([torch.device("cuda:0")], [])
    dist.destroy_process_group()
    after = ranks.read_by_rank_0(store.kept)
    sender.send([sorted(record["case"]["head_dim"] for record in each) for each in (found, again, after)])


def test_ranks_go_by_what_rank_0_has_read(monkeypatch, tmp_path, cache):
    for rank in (0, 1):
        monkeypatch.setenv(store.FOLDER, f"{cache}{rank}")
        assert store.keep({"case": CASE | {"head_dim": 16 * (rank + 1)}} | passed())
    assert forked(read_as_rank, cache, tmp_path / "meet") == [[[16], [16], [16, 64]], [[16], [16], [32]]]
