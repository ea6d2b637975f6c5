"""Videos from the model in training, made by its pipeline: the same prompts and noise in original and in 4-bit attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.utils import load_image
from diffusers.utils.export_utils import encode_video

from qat_patch import PatchHandle
from qat_patch.measure.videos import psnr, ssim
from qat_recipes.data.video import EncodedClips


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Videos to look at: of held-out clips with their prompts, sizes and, for image to video, first (and last) frames; or of
    your own prompts."""

    every: int
    """Sample before the first step, every N steps, and after the last."""
    clips: int | None = None
    """The number of held-out clips, from the first; null: 2, or none with prompts."""
    prompts: tuple[str, ...] = ()
    """Your own prompts, instead of held-out clips."""
    images: tuple[str, ...] = ()
    """First frames for image to video (of TI2V 5B with data.first_frame): an image file for each of `prompts`."""
    last_images: tuple[str, ...] = ()
    """The same for last frames, if the model takes them (Wan 2.1 FLF2V)."""
    height: int | None = None
    """Of the videos of `prompts`."""
    width: int | None = None
    """Of the videos of `prompts`."""
    num_frames: int | None = None
    """Frames of the videos of `prompts`; they are written at the rate of the clips."""
    inference_steps: int = 50
    """Denoising steps; the default is Diffusers' for Wan."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, if above 1; the default is Diffusers' for Wan. It needs the text encoder once, at the start."""
    negative_prompt: str = ""
    """The negative prompt of guidance."""
    seed: int = 0
    """Seed of the first video's noise; each next video has the next seed."""

    def __post_init__(self) -> None:
        sizes = ("height", "width", "num_frames")
        for name in ("every", "clips", *sizes, "inference_steps", "guidance_scale"):
            if (value := getattr(self, name)) is not None and value < 1:
                remedy = "; set samples to null for none" if name == "every" else ""
                raise ValueError(f"samples.{name}: expected at least 1, got {value}{remedy}")
        of_prompts, of_clips = ("images", "last_images", *sizes), ("clips",)
        for name in of_clips if self.prompts else of_prompts:
            if getattr(self, name):
                have = "with" if self.prompts else "without"
                raise ValueError(f"samples.{name}: has no effect {have} samples.prompts; leave it out")
        if self.prompts and (missing := next((name for name in sizes if getattr(self, name) is None), None)):
            raise ValueError(f"samples: {missing!r} is missing; prompts need a size")
        for name in ("images", "last_images"):
            paths = getattr(self, name)
            if paths and len(paths) != len(self.prompts):
                raise ValueError(f"samples.{name}: expected one for each of {len(self.prompts)} prompts, got {len(paths)}")
            if missing := next((path for path in paths if not Path(path).is_file()), None):
                raise ValueError(f"samples.{name}: there is no file {missing}")
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError("samples.negative_prompt: has no effect without guidance; leave it out or raise guidance_scale")


class Samples:
    """Writes videos of the first held-out clips, or of your own prompts.

    Args:
        settings: the settings of the videos.
        source: the pipeline, as arguments of from_pretrained.
        transformers: all transformers of the pipeline, in training, by their names in it.
        handle: their patch.
        clips: held-out clips; with your own prompts any clips of the model, which say how they were encoded.

    Raises:
        ValueError: image to video has prompts without first frames (or last ones, if it takes them), text to video has images,
            or the pipeline cannot make a size.
    """

    def __init__(
        self,
        settings: SampleSettings,
        source: dict[str, Any],
        transformers: Mapping[str, torch.nn.Module],
        handle: PatchHandle,
        clips: EncodedClips,
    ) -> None:
        # TI2V 5B is a model for both pipelines.
        given = clips.first_frame > 0 if settings.images else clips.first_frame == 1 and not settings.prompts
        self.from_images = clips.settings["pipeline"] != "WanPipeline" or given
        self.to_images = any(map(takes_last_frame, transformers.values()))
        kind = WanImageToVideoPipeline if self.from_images else WanPipeline
        # Wan's text encoder is several times as large as the rest, and is needed at most once.
        needs_text = settings.guidance_scale > 1 or settings.prompts
        unused = {} if needs_text else {"text_encoder": None, "tokenizer": None}
        types = {"default": torch.float32, "text_encoder": torch.bfloat16}
        self.pipe = kind.from_pretrained(**source, **transformers, **unused, dtype=types)
        self.pipe.set_progress_bar_config(disable=True)
        self.settings, self.handle, self.clips = settings, handle, clips
        self.transformers = list(transformers.values())
        if settings.prompts:
            self._check_prompts()
        self.negative = self._encoded(settings.negative_prompt) if settings.guidance_scale > 1 else None
        self.prompts = [self._encoded(prompt) for prompt in settings.prompts]
        if needs_text:
            self.pipe.register_modules(text_encoder=None, tokenizer=None)

    def write(self, folder: Path, accelerator: Accelerator) -> dict[str, float]:
        """Write clip-NUMBER-original.mp4 and clip-NUMBER-fp4.mp4, or prompt-NUMBER-... The model must be on its device.

        Every process must call this, because a sharded model needs all of them; the main process writes.

        Returns:
            The similarity of the videos in 4-bit and original attention, means over the videos: `sample_psnr` in dB and
            `sample_ssim` (Wang et al., 2004).
        """
        distances: dict[str, list[float]] = {"sample_psnr": [], "sample_ssim": []}
        device, modules = accelerator.device, [x for x in self.pipe.components.values() if isinstance(x, torch.nn.Module)]
        helpers = [module for module in modules if not any(module is transformer for transformer in self.transformers)]
        was_training = self.transformers[0].training
        for transformer in self.transformers:
            transformer.eval()
        for helper in helpers:
            helper.to(device)
        name_of = "prompt" if self.prompts else "clip"
        for number in range(len(self.prompts) or min(self.settings.clips or 2, len(self.clips))):
            videos = {}
            for name, attention in (("original", self.handle.disabled), ("fp4", contextlib.nullcontext)):
                with attention(), _computing_as_trained(self.transformers, accelerator):
                    videos[name] = self._sample(number, device)
                if accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    frames = (torch.from_numpy(videos[name]) * 255).round().to(torch.uint8)
                    fps = round(self.clips.clips[0 if self.prompts else number]["fps"])
                    encode_video(frames, fps, str(folder / f"{name_of}-{number}-{name}.mp4"))
            distances["sample_psnr"].append(psnr(videos["fp4"], videos["original"]))
            distances["sample_ssim"].append(ssim(videos["fp4"], videos["original"]))
        for helper in helpers:
            helper.to("cpu")
        for transformer in self.transformers:
            transformer.train(was_training)
        return {name: sum(values) / len(values) for name, values in distances.items()}

    @torch.no_grad()
    def _sample(self, number: int, device: torch.device) -> Any:
        """One video, float32 [frames, height, width, 3] in [0, 1]."""
        settings = self.settings
        if self.prompts:
            inputs: dict[str, Any] = {"prompt_embeds": self.prompts[number].to(device)}
            inputs |= {name: getattr(settings, name) for name in ("height", "width", "num_frames")}
            if settings.images:
                inputs["image"] = self._own_image(settings.images[number])
            if settings.last_images:
                inputs["last_image"] = self._own_image(settings.last_images[number])
        else:
            clip, about = self.clips[number], self.clips.clips[number]
            inputs = {"prompt_embeds": clip["prompt_embeds"][None].to(device)}
            inputs |= {"height": about["height"], "width": about["width"], "num_frames": about["frames"]}
            if self.from_images:
                # The first latent frame holds only the first frame.
                inputs["image"] = self._last_frame(clip["latents"][:, :1].to(device))
            if self.to_images:
                inputs["last_image"] = self._last_frame(clip["latents"].to(device))
        if self.negative is not None:
            inputs["negative_prompt_embeds"] = self.negative.to(device)
        return self.pipe(
            **inputs,
            num_inference_steps=settings.inference_steps,
            guidance_scale=settings.guidance_scale,
            # On the CPU: the same noise on every machine.
            generator=torch.Generator().manual_seed(settings.seed + number),
            output_type="np",
        ).frames[0]

    @torch.no_grad()
    def _encoded(self, prompt: str) -> torch.Tensor:
        """The embeddings of a prompt, [1, text length, D]."""
        embeds, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.clips.settings["text_length"]
        )
        return embeds

    def _check_prompts(self) -> None:
        settings, pipe = self.settings, self.pipe
        if self.from_images != bool(settings.images):
            expected = "first frames, because the model makes video from images" if self.from_images else "[] with text to video"
            raise ValueError(f"samples.images: expected {expected}")
        if self.to_images != bool(settings.last_images):
            expected = "last frames, which the model takes" if self.to_images else "[], because the model takes no last frame"
            raise ValueError(f"samples.last_images: expected {expected}")
        spatial, temporal = 2 * pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        for name in ("height", "width"):
            if getattr(settings, name) % spatial:
                raise ValueError(f"samples.{name}: expected a multiple of {spatial}, got {getattr(settings, name)}")
        if settings.num_frames is not None and settings.num_frames % temporal != 1:
            raise ValueError(f"samples.num_frames: expected a multiple of {temporal} plus 1, got {settings.num_frames}")

    def _own_image(self, path: str) -> Any:
        """An image file as viewers show it, resized and centre-cropped."""
        return self.pipe.video_processor.resize(load_image(path), self.settings.height, self.settings.width, resize_mode="crop")

    def _last_frame(self, latents: torch.Tensor) -> Any:
        """The last frame of latents as an image."""
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(x, device=latents.device).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        frame = vae.decode(latents[None].float() * std + mean).sample[:, :, -1:]
        return self.pipe.video_processor.postprocess_video(frame, output_type="pil")[0][0]


def takes_last_frame(transformer: torch.nn.Module) -> bool:
    """Whether it makes videos from a first and a last frame (Wan 2.1 FLF2V)."""
    config: Any = transformer.config
    return config.pos_embed_seq_len is not None


@contextlib.contextmanager
def _computing_as_trained(transformers: Sequence[torch.nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Inside, each transformer computes under the training's autocast, which Accelerate puts only around the outermost model."""
    before = [vars(transformer).get("forward") for transformer in transformers]
    for transformer in transformers:
        transformer.forward = accelerator.autocast()(transformer.forward)
    try:
        yield
    finally:
        for transformer, forward in zip(transformers, before, strict=True):
            if forward is None:
                del transformer.forward
            else:
                transformer.forward = forward
