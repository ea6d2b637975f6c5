"""Videos from the model in training, by its own pipeline: the same prompts and noise with original and with 4-bit attention."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.utils.export_utils import encode_video

from qat_patch import PatchHandle
from qat_patch.measure.videos import psnr, ssim
from qat_recipes.data.video import EncodedClips


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Videos to look at, of held-out clips: their prompts, their sizes and, for image to video, their first frames."""

    every: int
    """Sample before the first step, every so many steps and after the last."""
    clips: int = 2
    """Of the first so many held-out clips."""
    inference_steps: int = 50
    """Denoising steps; Diffusers' default for Wan."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, above 1; Diffusers' default for Wan. It needs the text encoder once, at the start."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: int = 0
    """Of the first clip's noise; the others' follow."""

    def __post_init__(self) -> None:
        for name in ("every", "clips", "inference_steps", "guidance_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"samples.{name}: expected at least 1, got {getattr(self, name)}")
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError("samples.negative_prompt: has no effect without guidance; leave it out or raise guidance_scale")


class Samples:
    """Writes videos of the first held-out clips.

    Args:
        settings: of the videos.
        source: where the pipeline is, as arguments of from_pretrained.
        model: the transformer in training, on the CPU.
        handle: its patch.
        clips: held-out clips.
    """

    def __init__(
        self,
        settings: SampleSettings,
        source: dict[str, Any],
        model: torch.nn.Module,
        handle: PatchHandle,
        clips: EncodedClips,
    ) -> None:
        kind = WanPipeline if clips.settings["pipeline"] == "WanPipeline" else WanImageToVideoPipeline
        # The text encoder of Wan is several times as large as the rest, and needed once at most.
        unused = {"text_encoder": None, "tokenizer": None} if settings.guidance_scale == 1 else {}
        types = {"default": torch.float32, "text_encoder": torch.bfloat16}
        self.pipe = kind.from_pretrained(**source, transformer=model, **unused, dtype=types)
        self.pipe.set_progress_bar_config(disable=True)
        self.negative = None
        if settings.guidance_scale > 1:
            with torch.no_grad():
                self.negative, _ = self.pipe.encode_prompt(
                    settings.negative_prompt, do_classifier_free_guidance=False, max_sequence_length=clips.settings["text_length"]
                )
            self.pipe.register_modules(text_encoder=None, tokenizer=None)
        self.settings, self.handle, self.clips = settings, handle, clips

    def write(self, folder: Path, device: torch.device, *, is_writer: bool = True) -> dict[str, float]:
        """Write clip-NUMBER-original.mp4 and clip-NUMBER-fp4.mp4. The model must be on `device`.

        Every process has to call this, for a sharded model needs all of them, and only one should be the writer.

        Returns:
            How close the videos of 4-bit attention are to those of original attention, means over clips: `sample_psnr` in
            dB and `sample_ssim` (Wang et al., 2004).
        """
        distances: dict[str, list[float]] = {"sample_psnr": [], "sample_ssim": []}
        model = self.pipe.transformer
        helpers = [x for x in self.pipe.components.values() if isinstance(x, torch.nn.Module) and x is not model]
        was_training = model.training
        model.eval()
        for helper in helpers:
            helper.to(device)
        for number in range(min(self.settings.clips, len(self.clips))):
            videos = {}
            for name, attention in (("original", self.handle.disabled), ("fp4", contextlib.nullcontext)):
                with attention():
                    videos[name] = self._sample(number, device)
                if is_writer:
                    folder.mkdir(parents=True, exist_ok=True)
                    frames = (torch.from_numpy(videos[name]) * 255).round().to(torch.uint8)
                    fps = round(self.clips.clips[number]["fps"])
                    encode_video(frames, fps, str(folder / f"clip-{number}-{name}.mp4"))
            distances["sample_psnr"].append(psnr(videos["fp4"], videos["original"]))
            distances["sample_ssim"].append(ssim(videos["fp4"], videos["original"]))
        for helper in helpers:
            helper.to("cpu")
        model.train(was_training)
        return {name: sum(values) / len(values) for name, values in distances.items()}

    @torch.no_grad()
    def _sample(self, number: int, device: torch.device) -> Any:
        """One video, float32 [frames, height, width, 3] in [0, 1]."""
        settings, clip, about = self.settings, self.clips[number], self.clips.clips[number]
        embeds = {"prompt_embeds": clip["prompt_embeds"][None].to(device)}
        if self.negative is not None:
            embeds["negative_prompt_embeds"] = self.negative.to(device)
        if "condition" in clip:
            embeds["image"] = self._first_frame(clip["latents"].to(device))
        return self.pipe(
            **embeds,
            height=about["height"],
            width=about["width"],
            num_frames=about["frames"],
            num_inference_steps=settings.inference_steps,
            guidance_scale=settings.guidance_scale,
            # On the CPU: the same noise on every machine.
            generator=torch.Generator().manual_seed(settings.seed + number),
            output_type="np",
        ).frames[0]

    def _first_frame(self, latents: torch.Tensor) -> Any:
        """The first frame as an image. The first latent frame holds it alone."""
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(x, device=latents.device).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        frame = vae.decode(latents[None, :, :1].float() * std + mean).sample
        return self.pipe.video_processor.postprocess_video(frame, output_type="pil")[0][0]
