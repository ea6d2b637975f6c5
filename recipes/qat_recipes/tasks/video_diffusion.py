"""The task of a Wan transformer: predict velocities of noisy clips, which `qat-patch prepare-wan-data` encoded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from qat_recipes.data.video import DrawnBatches, EncodedClips, VideoSettings, load_clips, places_of
from qat_recipes.memory.split_tokens import ParallelSettings, split_tokens, ulysses_mesh
from qat_recipes.training.task import FineTuning, FineTuningSettings, ModelSettings

from .flow_matching import FlowMatching, HeldOutClips, TimestepSettings, noise_levels
from .samples import Samples, SampleSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanSettings(ModelSettings):
    """The pipeline whose transformer is trained, or a transformer without one."""

    transformer: Literal["transformer", "transformer_2"] = "transformer"
    """Which transformer of the pipeline; Wan 2.2 has two, for high and for low noise, and each is trained on its part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(FineTuningSettings):
    """Fine-tune a Wan transformer for 4-bit attention."""

    model: WanSettings
    """The pipeline whose transformer is trained, or a transformer without one."""
    data: VideoSettings
    """Clips to train on and to measure on."""
    timesteps: TimestepSettings = dataclasses.field(default_factory=TimestepSettings)
    """Which timesteps are trained how often and how much."""
    eval_timesteps: int = 4
    """Measure each held-out clip at so many timesteps, evenly spread over the schedule."""
    parallel: ParallelSettings | None = None
    """Share each sample between several GPUs; null: each GPU has samples of its own."""
    samples: SampleSettings | None = None
    """Videos to look at while the model learns; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_eval(self.data.has_eval)
        if self.eval_timesteps < 1:
            raise ValueError(f"settings.eval_timesteps: expected at least 1, got {self.eval_timesteps}")
        if self.samples is not None and not self.data.has_eval and not self.samples.prompts:
            raise ValueError(
                "samples: they are of held-out clips, and there are none; set data.eval or data.eval_fraction, or samples.prompts"
            )
        if self.samples is not None and self.samples.every > self.steps:
            raise ValueError(f"samples.every: expected at most steps ({self.steps}), got {self.samples.every}")
        if self.parallel is not None:
            # What needs the tokens of a whole sample in one process, and what has not been tried.
            refused = {
                "calibration_batches": 0,
                "layers_every": 0,
                "lora": None,
                "linear": None,
                "compile": None,
                "samples": None,
            }
            for name, expected in refused.items():
                if getattr(self, name) != expected:
                    raise ValueError(
                        f"settings.{name}: expected {'null' if expected is None else expected} with parallel, whose processes "
                        "have parts of samples only; leave it out"
                    )

    @property
    def processes_a_sample(self) -> int:
        return 1 if self.parallel is None else self.parallel.ulysses


class VideoDiffusion(FineTuning[Settings]):
    """A Wan transformer learns to predict velocities: the task of the loop."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    eval_batch_size = 1  # clips of any sizes follow each other
    train_data: EncodedClips

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.source = {"pretrained_model_name_or_path": settings.model.path, "revision": settings.model.revision}
        self.accelerator = accelerator
        if settings.parallel is not None:
            if not accelerator.is_fsdp2:
                raise ValueError(
                    "settings.parallel: needs FSDP2; start with accelerate launch "
                    "--config_file recipes/accelerate_configs/fsdp2.yaml"
                )
            self.mesh = ulysses_mesh(accelerator.num_processes, settings.parallel.ulysses, accelerator.device.type)
        self.pipeline = self._pipeline(settings)
        self.train_data, self.held_out = load_clips(settings.data, settings.seed)
        self.places = places_of(self.train_data, settings.data)
        clips = self.held_out
        self.component = None if self.pipeline is None else settings.model.transformer
        # To split tokens all have to be there at once. What the Hub's client downloads it locks.
        with accelerator.main_process_first() if settings.parallel is None else contextlib.nullcontext():
            super().__init__(settings)
            self.objective = FlowMatching(settings.timesteps, *self._noise_levels())
        for each in (self.train_data, clips):
            if each is not None:
                check_clips(self.model, each, settings.processes_a_sample)
        self.eval_data = None if clips is None else HeldOutClips(clips, settings.eval_timesteps, settings.seed)
        self.samples: Samples | None = None
        if settings.samples is not None:
            about = self.train_data if clips is None else clips
            self.samples = Samples(settings.samples, self.source, self.model, self.handle, about)

    def load(self) -> torch.nn.Module:
        try:
            name = self.model_config().get("_class_name")
        except OSError as error:
            raise ValueError(f"model.path: expected a Wan pipeline or transformer in Diffusers' format: {error}") from error
        if name != WanTransformer3DModel.__name__:
            raise ValueError(f"model.path: expected a {WanTransformer3DModel.__name__}, got a {name}")
        return WanTransformer3DModel.from_pretrained(**self._transformer(), dtype=self.settings.load_dtype)

    def split_tokens(self, model: torch.nn.Module) -> None:
        heads: int = cast(Any, model).config.num_attention_heads
        if heads % self.settings.processes_a_sample:
            raise ValueError(f"parallel.ulysses: expected a divisor of the {heads} heads, got {self.settings.processes_a_sample}")
        split_tokens(model, self.mesh)

    def from_config(self) -> torch.nn.Module:
        return WanTransformer3DModel.from_config(self.model_config())

    def model_config(self) -> dict[str, Any]:
        return WanTransformer3DModel.load_config(**self._transformer())

    def fingerprints(self) -> dict[str, str]:
        levels = json.dumps([self.objective.sigmas.tolist(), self.objective.steps])
        found = super().fingerprints() | {"the noise levels of model.path": hashlib.sha256(levels.encode()).hexdigest()}
        for name, clips in (("the clips of data.train", self.train_data), ("the held-out clips", self.held_out)):
            if clips is not None:
                found[name] = clips.fingerprint
        return found

    def batches(self, start: int, stop: int) -> DrawnBatches:
        of_clips = self.train_data.buckets
        buckets = [of_clips[indices[0]] for indices in self.places]
        order = {"batch_size": self.settings.batch_size, "seed": self.settings.seed, "start": start, "stop": stop}
        return DrawnBatches(self.places, buckets, **order)

    def tokens(self, batch: dict[str, torch.Tensor]) -> int:
        """Patches of latents, as self-attention sees them."""
        latents = batch["latents"]
        config: Any = self.handle.models[0].config
        return latents.numel() // (latents.shape[1] * math.prod(config.patch_size))

    def after_step(self, step: int) -> dict[str, float]:
        settings = self.settings
        if self.samples is None or not (step == 0 or settings.is_due(self.samples.settings.every, step)):
            return {}
        folder = Path(settings.output_dir) / "samples" / f"step-{step}"
        return self.samples.write(folder, self.accelerator.device, is_writer=self.accelerator.is_main_process)

    def _transformer(self) -> dict[str, Any]:
        """Where it is."""
        return self.source if self.pipeline is None else self.source | {"subfolder": self.settings.model.transformer}

    @staticmethod
    def _pipeline(settings: Settings) -> dict[str, Any] | None:
        """The config of the pipeline, or None of a transformer without one. Refuses what does not fit it."""
        model = settings.model
        try:
            config = DiffusionPipeline.load_config(model.path, revision=model.revision)
        except OSError:
            config = None
        if (config or {"transformer": ...}).get(model.transformer) in (None, [None, None]):
            raise ValueError(f"model.transformer: {model.path} has no {model.transformer}")
        if config is None and settings.samples is not None:
            raise ValueError(f"samples: {model.path} has no VAE to make videos with; give a whole pipeline, or leave them out")
        if config is not None and config.get("expand_timesteps"):
            raise ValueError(f"model.path: {model.path} has a timestep for each token (expand_timesteps); that is not supported")
        if settings.samples is not None and config.get("boundary_ratio") is not None:
            raise ValueError("samples: they would need the other transformer of this pipeline too; sample from the export")
        return config

    def _noise_levels(self) -> tuple[torch.Tensor, int]:
        """The noise levels that this transformer is there for."""
        scheduler = None
        if self.pipeline is not None:
            scheduler = FlowMatchEulerDiscreteScheduler.load_config(**self.source, subfolder="scheduler")
        sigmas, steps = noise_levels(scheduler, self.settings.timesteps.flow_shift)
        boundary = None if self.pipeline is None else self.pipeline.get("boundary_ratio")
        if boundary is not None:
            # As WanPipeline chooses between them.
            is_high = sigmas >= boundary
            sigmas = sigmas[is_high if self.settings.model.transformer == "transformer" else ~is_high]
        return sigmas, steps


def check_clips(model: torch.nn.Module, clips: EncodedClips, parts: int = 1) -> None:
    """Raise a ValueError if a transformer cannot take these clips, or their tokens cannot be split into equal parts."""
    config: Any = model.config
    for clip in clips.clips:
        shapes = clip["shapes"]
        channels, *sizes = shapes["latents"]
        needed = {
            "latent channels": (config.out_channels, channels),
            "input channels": (config.in_channels, channels + shapes.get("condition", [0])[0]),
            "text embeddings of size": (config.text_dim, shapes["prompt_embeds"][-1]),
            "image embeddings of size": (config.image_dim, shapes.get("image_embeds", [None])[-1]),
            "latents beyond whole patches": ([0, 0, 0], [n % m for n, m in zip(sizes, config.patch_size, strict=True)]),
        }
        for what, (expected, got) in needed.items():
            if expected != got:
                raise ValueError(
                    f"data: {clip['file']} in {clips.folder} does not fit the model: expected {what} {expected}, got {got}; "
                    "prepare the clips with the pipeline of this model"
                )
        tokens = math.prod(size // patch for size, patch in zip(sizes, config.patch_size, strict=True))
        if tokens % parts:
            raise ValueError(
                f"parallel.ulysses: expected a divisor of the {tokens} tokens of {clip['file']} in {clips.folder}, got {parts}"
            )
