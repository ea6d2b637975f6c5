"""Clips from `qat-patch prepare-wan-data`: latents and text embeddings by index, and batches of one shape."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.utils.data import Dataset, Sampler

from qat_patch.commands.clip_index import EMPTY_CAPTION, FORMAT_VERSION, INDEX


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """Clips to train on, and held-out clips."""

    train: str
    """Folder that `qat-patch prepare-wan-data` wrote."""
    eval: str | None = None
    """Another such folder with held-out clips. Set this, `eval_fraction`, or neither."""
    eval_fraction: float | None = None
    """Hold out this fraction of the clips: the last ones by name."""
    windows: Literal["all", "random"] = "all"
    """For videos with several encoded windows: use every window in every epoch, or one at random."""
    repeats: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often clips occur in an epoch, by patterns of their names, such as {"images/*": 4}; the first match counts, others come
    once."""
    caption_dropout: float = 0.0
    """The fraction of samples that are trained without their caption, which guidance needs."""
    first_frame: float = 0.0
    """Wan 2.2 TI2V 5B only: the fraction of samples that are given their first frame, as in video from an image; the others are
    from text alone. Held-out clips are given theirs if this is 1."""

    def __post_init__(self) -> None:
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("data: eval and eval_fraction are both set; leave one out")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction: expected a number between 0 and 1, got {self.eval_fraction}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"data.caption_dropout: expected a number in [0, 1), got {self.caption_dropout}")
        if not 0 <= self.first_frame <= 1:
            raise ValueError(f"data.first_frame: expected a number in [0, 1], got {self.first_frame}")
        for pattern, times in self.repeats.items():
            if times < 1:
                raise ValueError(f"data.repeats[{pattern!r}]: expected at least 1, got {times}")
        if self.eval is not None and Path(self.eval).resolve() == Path(self.train).resolve():
            raise ValueError(f"data.eval: {self.train} holds the clips to train on too; hold out others")

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out clips."""
        return self.eval is not None or self.eval_fraction is not None


class EncodedClips(Dataset):
    """Encoded clips by index, each a dict of tensors of the stored dtype.

    latents [C, F, h, w], normalized as in the pipeline; prompt_embeds [text length, D], padded with zeros; for image to video
    condition [4 + C, F, h, w], to concatenate to noisy latents, and image_embeds [257, D], or [2, 257, D] with the last
    frame, if the model takes them; with `first_frame` a bool of this name, True if the first frame is given.

    An index may be a pair: the clip, and a number that seeds the choice of its caption, if there are several or some are dropped.

    Args:
        folder: the folder that `qat-patch prepare-wan-data` wrote.
        part: which of its clips, ordered by name.
        caption_dropout: the fraction of samples with a number that have no caption.
        first_frame: the fraction of samples with a number whose first frame is given; of others none, or all if it is 1.
        seed: seed of these choices.

    Attributes:
        clips: the index entry of each clip: caption, source, frames, height, width, fps and the shapes in its file.
        settings: the settings that all share: the encoders' fingerprints, the text length, dtype.
        fingerprint: a digest of all this. The index has the hash of every file; it is checked when the file is read.
        buckets: for each clip the sizes that all clips of a batch must share.

    Raises:
        ValueError: the folder has no index, the index cannot be read, or files that it lists are missing.
    """

    def __init__(
        self,
        folder: str | Path,
        part: slice = slice(None),
        *,
        caption_dropout: float = 0.0,
        first_frame: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.folder, self.caption_dropout, self.first_frame, self.seed = Path(folder), caption_dropout, first_frame, seed
        file = self.folder / INDEX
        if not file.is_file():
            raise ValueError(f"data: there is no {file}; expected a folder that qat-patch prepare-wan-data has finished")
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            version, self.settings, self.clips = index["format_version"], index["settings"], index["clips"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"data: {file} is damaged ({error}); run qat-patch prepare-wan-data again") from error
        if version != FORMAT_VERSION:
            advice = "run qat-patch prepare-wan-data of this version again"
            raise ValueError(f"data: {file} has format_version {version}, and this program reads {FORMAT_VERSION}; {advice}")
        self.digests = index.get("sha256", {})
        digest = index.pop("empty_caption_sha256", None)
        if caption_dropout:
            if digest is None:
                raise ValueError(
                    f"data.caption_dropout: {self.folder} has no {EMPTY_CAPTION}; run qat-patch prepare-wan-data again"
                )
            self.digests[EMPTY_CAPTION] = index["empty_caption_sha256"] = digest
        # A digest of all clips: the others decide which clips are held out.
        self.fingerprint = hashlib.sha256(json.dumps([index, str(part)], sort_keys=True).encode()).hexdigest()
        self.clips = self.clips[part]
        missing = [clip["file"] for clip in self.clips if not (self.folder / clip["file"]).is_file()]
        if missing:
            what = f"{len(missing)} files that {file} lists are missing, {missing[0]} for one"
            raise ValueError(f"data: {what}; run qat-patch prepare-wan-data again")

    @property
    def buckets(self) -> list[tuple[int, ...]]:
        return [tuple(clip["shapes"]["latents"]) for clip in self.clips]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = index.number if isinstance(index, Draw) else None
        tensors = self._read(self.clips[index]["file"])
        captions = [tensors.pop(name) for name in sorted(tensors) if name.startswith("prompt_embeds")]
        tensors["prompt_embeds"] = self._filled_up(captions[0] if number is None else self._drawn(captions, number))
        if self.first_frame:
            # Of an image nothing would be left to learn.
            tensors["first_frame"] = torch.tensor(tensors["latents"].shape[1] > 1 and self._is_given(number))
        return tensors

    def _drawn(self, captions: list[torch.Tensor], number: int) -> torch.Tensor:
        """One of the captions, or the empty one. It depends only on the seed and the number."""
        draw = random.Random(f"captions {self.seed} {number}")
        if draw.random() < self.caption_dropout:
            return self._read(EMPTY_CAPTION)["prompt_embeds"]
        return draw.choice(captions)

    def _is_given(self, number: int | None) -> bool:
        """Whether the first frame is given. It depends only on the seed and the number."""
        if number is None:
            return self.first_frame == 1
        return random.Random(f"first frame {self.seed} {number}").random() < self.first_frame

    def _filled_up(self, embeds: torch.Tensor) -> torch.Tensor:
        """The embeddings, padded with zeros as in the pipeline."""
        return torch.nn.functional.pad(embeds, (0, 0, 0, self.settings["text_length"] - len(embeds)))

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file, after checking its hash."""
        file = self.folder / name
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.digests[name]:
                raise ValueError("its content is not what was prepared")
            return load(content)
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            raise ValueError(f"data: {file} is damaged ({error}); run qat-patch prepare-wan-data again") from error


class Draw(int):
    """The index of a clip, with the number of the sample in the run, which seeds all that is drawn for it."""

    number: int

    def __new__(cls, index: int, number: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.number = number
        return draw


class BucketBatches(Sampler[list[int]]):
    """Batches of indices from one bucket each, shuffled again in every epoch, from batch number `start` of the run to `stop`.

    The order depends only on the seed, so that a resumed run continues exactly where the other one stopped. Every clip comes in
    every epoch, and all batches are full: the last one of a bucket is filled with clips from its start.

    `stop - start` should be a multiple of the number of processes, which take batches in turn: Accelerate drops the rest.
    """

    drop_last = True

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int, start: int, stop: int) -> None:
        self.buckets, self.batch_size, self.seed, self.start, self.stop = buckets, batch_size, seed, start, stop
        self.batches_an_epoch = sum(math.ceil(clips / batch_size) for clips in Counter(buckets).values())

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        batches: list[list[int]] = []
        for number in range(self.start, self.stop):
            epoch, position = divmod(number, self.batches_an_epoch)
            if position == 0 or not batches:
                batches = self._epoch(epoch)
            yield batches[position]

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        clips_of: dict[Hashable, list[int]] = {}
        for index in torch.randperm(len(self.buckets), generator=generator).tolist():
            clips_of.setdefault(self.buckets[index], []).append(index)
        batches = []
        for clips in clips_of.values():
            for first in range(0, len(clips), self.batch_size):
                batches.append([clips[(first + offset) % len(clips)] for offset in range(self.batch_size)])
        # Without this shuffle small buckets would always come last.
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


class DrawnBatches(Sampler[list[Draw]]):
    """The same for clips that come several times, or in one of several windows; each sample has its number in the run.

    Args:
        places: for each place in an epoch the indices that may take it, all of one bucket.
        buckets: the buckets of the places.
        batch_size, seed, start, stop: as for `BucketBatches`, which gives the order.
    """

    drop_last = True

    def __init__(
        self,
        places: Sequence[Sequence[int]],
        buckets: Sequence[Hashable],
        *,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
    ) -> None:
        self.places, self.batch_size, self.seed = places, batch_size, seed
        self.batches = BucketBatches(buckets, batch_size, seed, start, stop)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch, places in enumerate(self.batches, self.batches.start):
            numbers = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [Draw(self._index(place, number), number) for place, number in zip(places, numbers, strict=True)]

    def _index(self, place: int, number: int) -> int:
        indices = self.places[place]
        return indices[0] if len(indices) == 1 else random.Random(f"windows {self.seed} {number}").choice(indices)


def places_of(clips: EncodedClips, settings: VideoSettings) -> list[list[int]]:
    """The places of an epoch, for `DrawnBatches`.

    Raises:
        ValueError: a pattern of repeats matches no clip, or windows=random has no effect.
    """
    sources: dict[str, list[int]] = {}
    for index, clip in enumerate(clips.clips):
        sources.setdefault(clip["source"], []).append(index)
    if settings.windows == "random" and len(sources) == len(clips.clips):
        raise ValueError(f"data.windows: random has no effect: {clips.folder} has one window of each video; leave it out")
    repeats = [next((p for p in settings.repeats if fnmatchcase(source, p)), None) for source in sources]
    if unused := settings.repeats.keys() - {*repeats}:
        raise ValueError(f"data.repeats: no clip in {clips.folder} is called {sorted(unused)[0]}, or an earlier pattern has it")
    places = []
    for pattern, indices in zip(repeats, sources.values(), strict=True):
        once = [indices] if settings.windows == "random" else [[index] for index in indices]
        places += once * (1 if pattern is None else settings.repeats[pattern])
    return places


def load_clips(settings: VideoSettings, seed: int = 0) -> tuple[EncodedClips, EncodedClips | None]:
    """Clips to train on and held-out clips (None if nothing is held out). `seed`: seed of what is drawn for a sample.

    Raises:
        ValueError: a folder cannot be read, folders were made by different encoders, or there are too few clips to hold some out.
    """
    first_frame = settings.first_frame
    drawn: dict[str, Any] = {"caption_dropout": settings.caption_dropout, "first_frame": first_frame, "seed": seed}
    train = EncodedClips(settings.train, **drawn)
    if settings.eval is not None:
        evaluation = EncodedClips(settings.eval, first_frame=first_frame)
        shared = ("pipeline", "vae", "text_encoder", "image_encoder", "text_length")
        differing = [name for name in shared if train.settings.get(name) != evaluation.settings.get(name)]
        if differing:
            what = f"{settings.eval} and {settings.train} were made with different {', '.join(differing)}"
            raise ValueError(f"data.eval: {what}; prepare both with the same model")
        return train, evaluation
    if settings.eval_fraction is None:
        return train, None
    # Hold out whole videos, because the windows of one video look alike.
    sources = list(dict.fromkeys(clip["source"] for clip in train.clips))
    held_out = max(1, round(len(sources) * settings.eval_fraction))
    if held_out >= len(sources):
        raise ValueError(f"data.eval_fraction: {settings.eval_fraction} of {len(sources)} clips leaves none; give more clips")
    first = next(index for index, clip in enumerate(train.clips) if clip["source"] == sources[-held_out])
    start = first - len(train.clips)
    held = EncodedClips(settings.train, slice(start, None), first_frame=first_frame)
    return EncodedClips(settings.train, slice(start), **drawn), held
