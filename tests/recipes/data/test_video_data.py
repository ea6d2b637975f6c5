"""Prepared clips as training data (qat_recipes.data.video): the dataset, and batches of one shape."""

import copy
import json
import math
from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from qat_recipes.data.video import BucketBatches, EncodedClips, VideoSettings, load_clips
from support.models.clips_to_prepare import prepare
from support.models.tiny_clips import write_clips


def test_folders_that_hold_no_data(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*index.json; expected a folder that qat-patch prepare-wan-data"):
        EncodedClips(tmp_path)
    index = json.loads((prepared / "index.json").read_text(encoding="utf-8"))
    for text, message in (
        ("{", "is damaged"),
        (json.dumps({"format_version": 1}), "is damaged"),
        (json.dumps(index | {"format_version": 1}), "has format_version 1, and this program reads 2"),
        (json.dumps(index), "3 files that .* lists are missing, clips/sub/long.mkv.safetensors for one"),
    ):
        (tmp_path / "index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            EncodedClips(tmp_path)


def test_held_out_clips(wan_models, clips, prepared, tmp_path):
    everything = [clip["source"] for clip in EncodedClips(prepared).clips]
    train, evaluation = load_clips(VideoSettings(train=str(prepared), eval_fraction=0.4))
    assert [[clip["source"] for clip in part.clips] for part in (train, evaluation)] == [everything[:2], everything[2:]]
    assert (len(train), len(evaluation), len(train.buckets), len(evaluation.buckets)) == (2, 1, 2, 1)
    assert load_clips(VideoSettings(train=str(prepared)))[1] is None
    with pytest.raises(ValueError, match="0.9 of 3 clips leaves none; give more clips"):
        load_clips(VideoSettings(train=str(prepared), eval_fraction=0.9))
    prepare(wan_models / "t2v", clips, tmp_path / "same", "--num-frames", "5")
    assert len(load_clips(VideoSettings(train=str(prepared), eval=str(tmp_path / "same")))[1]) == 3
    prepare(wan_models / "other", clips, tmp_path / "other")
    with pytest.raises(ValueError, match="were made with different vae, text_encoder; prepare both with the same model"):
        load_clips(VideoSettings(train=str(prepared), eval=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval": "b", "eval_fraction": 0.1}, "eval and eval_fraction are both set"),
        ({"eval_fraction": 1.0}, "data.eval_fraction: expected a number between 0 and 1, got 1.0"),
        ({"eval": "./a"}, "data.eval: a holds the clips to train on too"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings(train="a", **settings)
    assert not VideoSettings(train="a").has_eval
    assert VideoSettings(train="a", eval="b").has_eval


# Batches --------------------------------------------------------------------------------------------------------------

BUCKETS = ["wide"] * 11 + ["tall"] * 5 + ["long"] * 2 + ["wide"] * 2


def batches(start, stop, seed=3, size=4):
    return list(BucketBatches(BUCKETS, size, seed, start, stop))


def test_an_epoch_has_every_clip_in_full_batches_of_one_bucket():
    an_epoch = BucketBatches(BUCKETS, 4, 3, 0, 1).batches_an_epoch
    assert an_epoch == math.ceil(13 / 4) + math.ceil(5 / 4) + 1
    for epoch in range(3):
        of_epoch = batches(epoch * an_epoch, (epoch + 1) * an_epoch)
        assert all(len(batch) == 4 and len({BUCKETS[index] for index in batch}) == 1 for batch in of_epoch)
        seen = Counter(chain(*of_epoch))
        assert seen.keys() == set(range(len(BUCKETS)))
        # Filling up: 3 of the 13 wide clips, 3 of the 5 tall ones, both long ones.
        repeated = Counter(BUCKETS[index] for index, times in seen.items() if times == 2)
        assert repeated == {"wide": 3, "tall": 3, "long": 2}
        assert max(seen.values()) == 2


def test_order_follows_from_the_seed_and_changes_with_the_epoch():
    an_epoch = BucketBatches(BUCKETS, 4, 3, 0, 1).batches_an_epoch
    run = batches(0, 3 * an_epoch)
    state = torch.get_rng_state()
    assert batches(0, 3 * an_epoch) == run
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(0, 3 * an_epoch, seed=4) != run
    assert run[:an_epoch] != run[an_epoch : 2 * an_epoch]
    # The buckets are mixed, not one after the other.
    changes = [sum(BUCKETS[one[0]] != BUCKETS[two[0]] for one, two in pairwise(run[e * an_epoch :][:an_epoch])) for e in range(3)]
    assert max(changes) > len(set(BUCKETS)) - 1


@pytest.mark.parametrize("start", [1, 6, 7, 8, 20])
def test_a_resumed_run_continues_in_the_same_order(start):
    assert batches(start, 24) == batches(0, 24)[start:]
    assert len(BucketBatches(BUCKETS, 4, 3, start, 24)) == 24 - start


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return len(BUCKETS)

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 12])
def test_processes_take_batches_in_turn(processes, start):
    """As Accelerate shards a loader, with each of its settings."""
    expected = batches(start, 24)
    for even_batches in (True, False):
        for use_seedable_sampler in (True, False):
            shards = []
            for process in range(processes):
                loader = DataLoader(Numbers(), batch_sampler=BucketBatches(BUCKETS, 4, 3, start, 24), generator=torch.Generator())
                loader = prepare_data_loader(
                    loader,
                    num_processes=processes,
                    process_index=process,
                    even_batches=even_batches,
                    use_seedable_sampler=use_seedable_sampler,
                )
                assert len(loader) == (24 - start) // processes
                shards.append([batch.tolist() for batch in loader])
            assert [list(batch) for batch in chain(*zip(*shards, strict=True))] == expected


def test_a_rest_that_does_not_reach_all_processes_is_dropped():
    shards = []
    for process in range(3):
        loader = DataLoader(Numbers(), batch_sampler=BucketBatches(BUCKETS, 4, 3, 0, 8))
        shards.append([b.tolist() for b in prepare_data_loader(loader, num_processes=3, process_index=process)])
    assert list(chain(*zip(*shards, strict=True))) == batches(0, 6)


def test_clips_collate_to_batches(prepared):
    dataset = EncodedClips(prepared)
    loader = DataLoader(dataset, batch_sampler=BucketBatches(dataset.buckets, 2, 0, 0, 3))
    shapes = sorted((tuple(batch["latents"].shape), tuple(batch["prompt_embeds"].shape)) for batch in loader)
    assert shapes == [((2, *bucket), (2, 512, 32)) for bucket in sorted(dataset.buckets)]


# Data that changes ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_knows_clips_captions_and_videos(tmp_path):
    write_clips(tmp_path / "a", 4)
    write_clips(tmp_path / "same", 4)
    index = json.loads((tmp_path / "a/index.json").read_text())
    whole = EncodedClips(tmp_path / "a").fingerprint
    assert whole == EncodedClips(tmp_path / "same").fingerprint
    found = {
        whole,
        EncodedClips(tmp_path / "a", slice(-2)).fingerprint,
        EncodedClips(tmp_path / "a", slice(-2, None)).fingerprint,
    }

    def changed(change):
        other = copy.deepcopy(index)
        change(other)
        (tmp_path / "same/index.json").write_text(json.dumps(other))
        found.add(EncodedClips(tmp_path / "same").fingerprint)

    changed(lambda x: x["clips"].append(x["clips"][0]))
    changed(lambda x: x["clips"].reverse())
    changed(lambda x: x["clips"][1].update(caption="a red"))
    changed(lambda x: x["clips"][1].update(video_sha256="0"))
    changed(lambda x: x["sha256"].update({"clips/2.safetensors": "0"}))
    assert len(found) == 3 + 5


def test_a_file_that_is_not_what_was_prepared_is_not_read(tmp_path):
    write_clips(tmp_path / "a", 2)
    write_clips(tmp_path / "b", 2, seed=1)
    data, file = EncodedClips(tmp_path / "a"), tmp_path / "a/clips/1.safetensors"
    assert data[1].keys() == {"latents", "prompt_embeds"}
    good, other = file.read_bytes(), (tmp_path / "b/clips/1.safetensors").read_bytes()
    assert len(good) == len(other)
    for content in (other, good[:-1], good + b"x"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"1.safetensors is damaged \(its content is not what was prepared\)"):
            data[1]
