"""Generate the same video in original and in 4-bit attention, and compare them; needs qat-patch[wan].

python recipes/examples/patch_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red boat" --output outputs/boat
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from qat_patch import AttnQATConfig, QuantSpec, patch_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate twice, from the same noise."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)

    # `overrides`, `exclude` and `exclude_first_blocks` of AttnQATConfig choose modules; unpatch_model(pipe) removes the patch.
    handle = patch_model(pipe, AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True)))

    def frames() -> np.ndarray:
        result = pipe(
            prompt=options.prompt,
            height=options.height,
            width=options.width,
            num_frames=options.frames,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        return np.asarray(result.frames[0])

    with handle.disabled():
        original = frames()
    four_bit = frames()
    print(handle)  # after the first call it also shows what the calls did
    error = float(np.square(original.astype(np.float64) - four_bit).mean())
    print(f"PSNR of 4-bit to original attention: {-10 * math.log10(error) if error else math.inf:.1f} dB")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, video in (("original", original), ("four_bit", four_bit)):
        for number, frame in enumerate(video):
            Image.fromarray((255 * frame).round().astype(np.uint8)).save(options.output / f"{name}-{number:03}.png")
    print(f"{options.output} has the frames")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of a video pipeline on the Hub, or a folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the frames")
    parser.add_argument("--height", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=832, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=81, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
