"""The task of a Wan transformer: predict the velocities of noisy clips, encoded by `qat-patch prepare-wan-data`."""

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
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from qat_recipes.data.video import DrawnBatches, EncodedClips, VideoSettings, load_clips, places_of
from qat_recipes.memory.split_tokens import ParallelSettings, split_tokens, ulysses_mesh
from qat_recipes.training.adapters import LoraSettings

from .experts import ClipsInTurns, Experts
from .fine_tuning import FineTuning, FineTuningSettings, ModelSettings
from .flow_matching import FlowMatching, HeldOutClips, TimestepSettings, noise_levels
from .samples import Samples, SampleSettings, takes_last_frame

EXPERTS = ("transformer", "transformer_2")
"""The transformers of Wan 2.2: for high noise, from `boundary_ratio` of its pipeline up, and for low noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanSettings(ModelSettings):
    """The pipeline whose transformer is trained, or a transformer without one."""

    transformer: Literal["transformer", "transformer_2", "both"] = "transformer"
    """The transformer of the pipeline. Wan 2.2 has two, for high and for low noise; each is trained on its part. both: every
    step trains one of them, drawn in proportion to its share of the noise levels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(FineTuningSettings):
    """Fine-tune a Wan transformer for 4-bit attention."""

    model: WanSettings
    """The pipeline whose transformer is trained, or a transformer without one."""
    data: VideoSettings
    """Clips to train on and to measure on."""
    timesteps: TimestepSettings = dataclasses.field(default_factory=TimestepSettings)
    """How often and how strongly each timestep is trained."""
    eval_timesteps: int = 4
    """Measure each held-out clip at N timesteps, evenly spread over the schedule; with model.transformer=both at N timesteps of
    each transformer's part."""
    parallel: ParallelSettings | None = None
    """Share each sample between several GPUs; null: each GPU has its own samples."""
    samples: SampleSettings | None = None
    """Videos to look at during training; null: none."""

    @property
    def trains_in_turns(self) -> bool:
        return self.model.transformer == "both"

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
        if self.parallel is not None and self.data.first_frame:
            raise ValueError("data.first_frame: has not been tried with parallel; leave one of them out")
        if self.parallel is not None and self.trains_in_turns:
            raise ValueError("model.transformer: both has not been tried with parallel; train one after the other")
        if self.parallel is not None:
            # Settings that need all tokens of a sample in one process, or that were not tried.
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
    eval_batch_size = 1  # clips of different sizes follow each other
    train_data: EncodedClips | ClipsInTurns

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
        clips, self.held_out = load_clips(settings.data, settings.seed)
        self.clips = self.train_data = clips
        self.places = places_of(clips, settings.data)
        if self.pipeline is not None:
            self.components = EXPERTS if settings.trains_in_turns else (settings.model.transformer,)
        # Splitting tokens needs all processes at once. The Hub's client locks its downloads.
        with accelerator.main_process_first() if settings.parallel is None else contextlib.nullcontext():
            super().__init__(settings)
            sigmas, steps = self._noise_levels()
        self.objective = FlowMatching(settings.timesteps, sigmas, steps)
        for transformer in self.handle.models:
            for each in (clips, self.held_out):
                if each is not None:
                    check_clips(transformer, each, settings.processes_a_sample)
        if isinstance(sigmas, dict):
            shares = {name: len(levels) / sum(map(len, sigmas.values())) for name, levels in sigmas.items()}
            samples_a_step = settings.batch_size * settings.accumulation_steps * accelerator.num_processes
            self.train_data = ClipsInTurns(clips, shares, settings.seed, samples_a_step)
        names = [None] if isinstance(sigmas, torch.Tensor) else [*sigmas]
        self.eval_data = {}
        if self.held_out is not None:
            for name in names:
                self.eval_data[name or ""] = HeldOutClips(self.held_out, settings.eval_timesteps, settings.seed, name)
        self.samples: Samples | None = None
        if settings.samples is not None:
            about = clips if self.held_out is None else self.held_out
            transformers = {name: model for name, model in self.parts.items() if name is not None}
            self.samples = Samples(settings.samples, self.source, transformers, self.handle, about)

    def load(self, component: str | None) -> torch.nn.Module:
        try:
            name = self.model_config(component).get("_class_name")
        except OSError as error:
            raise ValueError(f"model.path: expected a Wan pipeline or transformer in Diffusers' format: {error}") from error
        if name != WanTransformer3DModel.__name__:
            raise ValueError(f"model.path: expected a {WanTransformer3DModel.__name__}, got a {name}")
        return WanTransformer3DModel.from_pretrained(**self._place_of(component), dtype=self.settings.load_dtype)

    def split_tokens(self, model: torch.nn.Module) -> None:
        heads: int = cast(Any, model).config.num_attention_heads
        if heads % self.settings.processes_a_sample:
            raise ValueError(f"parallel.ulysses: expected a divisor of the {heads} heads, got {self.settings.processes_a_sample}")
        split_tokens(model, self.mesh)

    def from_config(self, component: str | None) -> torch.nn.Module:
        return WanTransformer3DModel.from_config(self.model_config(component))

    def model_config(self, component: str | None) -> dict[str, Any]:
        return WanTransformer3DModel.load_config(**self._place_of(component))

    def lora_of(self, component: str | None) -> LoraSettings | None:
        lora = self.settings.lora
        if lora is None or lora.start is None or not self.settings.trains_in_turns:
            return lora
        start = lora.start
        path = start.path if component == EXPERTS[0] else start.path_2
        assert path is not None  # checked by the settings
        return dataclasses.replace(lora, start=dataclasses.replace(start, path=path, path_2=None))

    def joined(self, parts: dict[str | None, torch.nn.Module]) -> torch.nn.Module:
        if not self.settings.trains_in_turns:
            return super().joined(parts)
        return Experts({name: part for name, part in parts.items() if name is not None})

    def fingerprints(self) -> dict[str, str]:
        sigmas = self.objective.sigmas
        of_experts = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else {name: x.tolist() for name, x in sigmas.items()}
        levels = json.dumps([of_experts, self.objective.steps])
        found = super().fingerprints() | {"the noise levels of model.path": hashlib.sha256(levels.encode()).hexdigest()}
        for name, clips in (("the clips of data.train", self.clips), ("the held-out clips", self.held_out)):
            if clips is not None:
                found[name] = clips.fingerprint
        return found

    def batches(self, start: int, stop: int) -> DrawnBatches:
        of_clips = self.clips.buckets
        buckets = [of_clips[indices[0]] for indices in self.places]
        order = {"batch_size": self.settings.batch_size, "seed": self.settings.seed, "start": start, "stop": stop}
        return DrawnBatches(self.places, buckets, **order)

    def tokens(self, batch: dict[str, Any]) -> int:
        """Patches of latents, as self-attention sees them."""
        latents = batch["latents"]
        config: Any = self.handle.models[0].config
        return latents.numel() // (latents.shape[1] * math.prod(config.patch_size))

    def part(self, batch: dict[str, Any]) -> str:
        return batch["expert"][0] if "expert" in batch else ""

    def for_every_part(self, batches: list[Any]) -> list[Any]:
        if not self.settings.trains_in_turns:
            return batches
        return [batch | {"expert": [name] * len(batch["expert"])} for name in EXPERTS for batch in batches]

    def after_step(self, step: int) -> dict[str, float]:
        settings = self.settings
        if self.samples is None or not (step == 0 or settings.is_due(self.samples.settings.every, step)):
            return {}
        folder = Path(settings.output_dir) / "samples" / f"step-{step}"
        return self.samples.write(folder, self.accelerator)

    def _place_of(self, component: str | None) -> dict[str, Any]:
        return self.source if component is None else self.source | {"subfolder": component}

    @staticmethod
    def _pipeline(settings: Settings) -> dict[str, Any] | None:
        """The config of the pipeline; None for a transformer without one. Raises a ValueError if the settings do not fit it."""
        model = settings.model
        try:
            config = DiffusionPipeline.load_config(model.path, revision=model.revision)
        except OSError as error:
            # A repository without model_index.json is a transformer alone. One that cannot be reached may have anything.
            missing = error.__context__
            if not Path(model.path).is_dir() and (
                not isinstance(missing, EntryNotFoundError) or isinstance(missing, LocalEntryNotFoundError)
            ):
                raise ValueError(
                    f"model.path: {model.path} is not a local folder and cannot be read from the Hub: {missing or error}"
                ) from error
            config = None
        for name in EXPERTS if model.transformer == "both" else (model.transformer,):
            if (config or {"transformer": ...}).get(name) in (None, [None, None]):
                raise ValueError(f"model.transformer: {model.path} has no {name}")
        if config is None and settings.samples is not None:
            raise ValueError(f"samples: {model.path} has no VAE to make videos with; give a whole pipeline, or leave them out")
        # Wan 2.2 TI2V 5B. Without a first frame the timesteps of all tokens are equal, and one for each sample says the same.
        is_ti2v = config is not None and config.get("expand_timesteps")
        if is_ti2v and config["_class_name"] != "WanPipeline":
            raise ValueError(
                f"model.path: {model.path} is a {config['_class_name']} with expand_timesteps; train it as a WanPipeline, from "
                "images with data.first_frame"
            )
        if settings.data.first_frame and not is_ti2v:
            raise ValueError(
                f"data.first_frame: only models with a timestep for each token can be given a first frame this way "
                f"(expand_timesteps, as Wan 2.2 TI2V 5B), and {model.path} is none; leave it out"
            )
        boundary = None if config is None else config.get("boundary_ratio")
        if model.transformer == "both" and boundary is None:
            raise ValueError(f"model.transformer: {model.path} has no boundary_ratio, which would say what both are there for")
        if settings.samples is not None and boundary is not None and model.transformer != "both":
            raise ValueError(
                "samples: they would need the other transformer of this pipeline too; train both, or sample from the export"
            )
        return config

    def _noise_levels(self) -> tuple[torch.Tensor | dict[str, torch.Tensor], int]:
        """The noise levels of the transformer, or of each of the two."""
        scheduler = None
        if self.pipeline is not None:
            scheduler = FlowMatchEulerDiscreteScheduler.load_config(**self.source, subfolder="scheduler")
        sigmas, steps = noise_levels(scheduler, self.settings.timesteps.flow_shift)
        boundary = None if self.pipeline is None else self.pipeline.get("boundary_ratio")
        if boundary is None:
            return sigmas, steps
        # The same choice as in WanPipeline.
        is_high = sigmas >= boundary
        parts = dict(zip(EXPERTS, (sigmas[is_high], sigmas[~is_high]), strict=True))
        for name in self.components:
            if name is not None and not len(parts[name]):
                raise ValueError(
                    f"model.path: no noise level is left for {name}: boundary_ratio is {boundary}, and levels go from "
                    f"{float(sigmas[-1]):.3g} to {float(sigmas[0]):.3g}"
                )
        return (parts if self.settings.trains_in_turns else parts[self.settings.model.transformer]), steps


def check_clips(model: torch.nn.Module, clips: EncodedClips, parts: int = 1) -> None:
    """Raise a ValueError if a transformer cannot take these clips, or their tokens cannot be split into equal parts."""
    config: Any = model.config
    images = None if config.image_dim is None else 2 if takes_last_frame(model) else 1
    for clip in clips.clips:
        shapes = clip["shapes"]
        channels, *sizes = shapes["latents"]
        *given, _, size = shapes.get("image_embeds", [None, None, None])
        needed = {
            "latent channels": (config.out_channels, channels),
            "input channels": (config.in_channels, channels + shapes.get("condition", [0])[0]),
            "text embeddings of size": (config.text_dim, shapes["prompt_embeds"][-1]),
            "image embeddings of size": (config.image_dim, size),
            "images as its condition:": (images, given[0] if given else 1),
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
