"""What qat-patch prepare-wan-data writes, in small and with made-up latents: moving blobs, in two sizes."""

import torch
from safetensors.torch import save_file

from qat_patch.commands.clip_index import write_index
from qat_recipes.tasks.flow_matching import FlowMatching, TimestepSettings, noise_levels
from support.models.tiny_wan import CHANNELS, IMAGE_DIM, TEXT_DIM


def write_clips(folder, count, i2v=False, seed=0):
    """`count` clips of 5 frames, every third one tall, and their index."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(CHANNELS, 1, 1, 1, generator=torch.Generator().manual_seed(99))
    clips = []
    for number in range(count):
        height, width = (6, 4) if number % 3 == 2 else (4, 6)
        where = torch.arange(height)[:, None] + torch.arange(width) + torch.arange(2)[:, None, None]
        wave = torch.sin(where + 6 * torch.rand((), generator=generator))
        tensors = {"latents": pattern * wave, "prompt_embeds": torch.randn(3 + number, TEXT_DIM, generator=generator)}
        if i2v:
            tensors["condition"] = torch.randn(4 + CHANNELS, 2, height, width, generator=generator)
            tensors["image_embeds"] = torch.randn(257, IMAGE_DIM, generator=generator)
        tensors = {name: x.bfloat16().contiguous() for name, x in tensors.items()}
        file = f"clips/{number}.safetensors"
        (folder / "clips").mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)
        clip = {"file": file, "caption": "a red square", "frames": 5, "fps": 16.0}
        clip |= {"source": f"{number}.mp4", "video_sha256": f"{number:064}"}
        shapes = {name: list(x.shape) for name, x in tensors.items()}
        clips.append(clip | {"height": 8 * height, "width": 8 * width, "shapes": shapes})
    kind = "WanImageToVideoPipeline" if i2v else "WanPipeline"
    settings = {"pipeline": kind, "vae": "tiny", "text_encoder": "tiny", "text_length": 512}
    write_index(folder, settings, clips, skipped={})


def objective():
    return FlowMatching(TimestepSettings(), *noise_levels(None, 3.0))


def batch(seed=0, count=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, CHANNELS, 2, 4, 6, generator=generator)
    return {"latents": latents, "prompt_embeds": torch.randn(count, 512, TEXT_DIM, generator=generator)}
