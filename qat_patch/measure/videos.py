"""Measures of how similar videos are, and how much moves in them."""

from __future__ import annotations

import math
from typing import Any

import torch

BLOCK = 8
"""In pixels; `motion` does not see smaller changes."""


def psnr(video: Any, reference: Any) -> float:
    """Peak signal-to-noise ratio in dB of a video [frames, height, width, 3] in [0, 1], at most 100."""
    error = ((video - reference) ** 2).mean()
    return 100.0 if error < 1e-10 else float(-10 * math.log10(error))


def ssim(video: Any, reference: Any) -> float:
    """Structural similarity by scikit-image, mean over the frames [frames, height, width, 3] in [0, 1]; 1 if equal."""
    structural_similarity = _structural_similarity()
    pairs = zip(video, reference, strict=True)
    values = [structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]
    return float(sum(values) / len(values))


def check_installed() -> None:
    """Raise a ValueError unless the package for `ssim` is installed."""
    _structural_similarity()


def _structural_similarity() -> Any:
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise ValueError(f"SSIM is scikit-image's, which cannot be imported ({error}); pip install scikit-image") from error
    return structural_similarity


def motion(videos: torch.Tensor) -> list[float]:
    """How much moves in each of [batch, frames, height, width, 3] in [0, 1]: the mean absolute difference between a frame and the
    next, both averaged over squares of BLOCK pixels, so that grain and flicker of pixels count little."""
    height, width = (size // BLOCK * BLOCK for size in videos.shape[2:4])
    blocks = videos[:, :, :height, :width].unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).mean((3, 5))
    return blocks.diff(dim=1).abs().mean((1, 2, 3, 4)).tolist()
