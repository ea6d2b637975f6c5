"""Flow matching as in the training examples of Diffusers: noisy latents, the velocity to predict, weighted timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.utils.data import Dataset

from qat_recipes.data.video import EncodedClips


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepSettings:
    """How often and how strongly each timestep is trained, in the terms of Diffusers' training examples."""

    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """How timesteps are drawn (logit_normal, mode) or losses are weighted (sigma_sqrt, cosmap); none: uniformly."""
    logit_mean: float = 0.0
    """Mean of the logit of the drawn positions, for logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of the logit of the drawn positions, for logit_normal."""
    mode_scale: float = 1.29
    """How strongly the middle is preferred, for mode."""
    flow_shift: float | None = None
    """The shift of the noise levels; null: that of the pipeline's scheduler."""

    def __post_init__(self) -> None:
        schemes = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
        for field in dataclasses.fields(self):
            scheme = schemes.get(field.name, self.weighting_scheme)
            if scheme != self.weighting_scheme and getattr(self, field.name) != field.default:
                raise ValueError(f"timesteps.{field.name}: has no effect unless weighting_scheme is {scheme}; leave it out")
        if self.logit_std <= 0:
            raise ValueError(f"timesteps.logit_std: expected a positive number, got {self.logit_std}")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"timesteps.flow_shift: expected a positive number or null, got {self.flow_shift}")


def noise_levels(scheduler: dict[str, Any] | None, flow_shift: float | None) -> tuple[torch.Tensor, int]:
    """The noise levels to train on, falling from 1, and the timestep of level 1.

    Args:
        scheduler: the config of the pipeline's scheduler; None if there is none.
        flow_shift: replaces the scheduler's shift.

    Raises:
        ValueError: the scheduler is not for flow matching with a fixed shift, or no shift is given at all.
    """
    if scheduler is None:
        if flow_shift is None:
            raise ValueError("timesteps.flow_shift: model.path has no scheduler that would say; set it, or give a pipeline")
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    name = scheduler["_class_name"]
    is_flow = name == "FlowMatchEulerDiscreteScheduler" or scheduler.get("use_flow_sigmas", False)
    schedules = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    others = [kind for kind in schedules if scheduler.get(kind)]
    others += [kind for kind in ("invert_sigmas", "shift_terminal") if scheduler.get(kind)]
    if not is_flow or others:
        got = f"{name} with {', '.join(others)}" if is_flow else f"{name} without use_flow_sigmas"
        raise ValueError(f"model.path: expected a scheduler of flow matching with a fixed shift, as Wan's are, got {got}")
    if flow_shift is None:
        # UniPC and similar schedulers call it flow_shift.
        flow_shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    steps = scheduler.get("num_train_timesteps", 1000)
    levels: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=flow_shift)
    return levels.sigmas, steps


@dataclasses.dataclass
class FlowInputs:
    """One batch of noisy latents."""

    arguments: dict[str, Any]
    """The arguments of the transformer."""
    sigmas: torch.Tensor
    """Noise levels, float32 [batch, 1, 1, 1, 1]."""
    velocity: torch.Tensor
    """The target: noise - latents, float32 [batch, C, F, h, w]."""
    made: torch.Tensor | None = None
    """bool [batch, 1, F, 1, 1], False where a latent frame is given: there is no noise and nothing to predict, so velocity and
    outputs are 0. None: all frames are made."""


class FlowMatching:
    """Predict the velocity from clips to noise. Batches are of `EncodedClips`, outputs float32 [batch, C, F, h, w].

    Args:
        settings: which timesteps.
        sigmas: the noise levels to train on, falling; of several experts by their names, and batches say for which one they are
            (`expert`).
        steps: the timestep is the noise level times this.
    """

    distance_name = "velocity_error"

    def __init__(self, settings: TimestepSettings, sigmas: torch.Tensor | dict[str, torch.Tensor], steps: int) -> None:
        self.settings, self.sigmas, self.steps = settings, sigmas, steps

    def inputs(self, batch: dict[str, Any]) -> FlowInputs:
        """Noise clips; noise and positions in the schedule are drawn here, unless the batch has its own."""
        settings, latents = self.settings, batch["latents"].float()
        noise = batch["noise"] if "noise" in batch else torch.randn_like(latents)
        positions = batch.get("position")
        if positions is None:
            positions = compute_density_for_timestep_sampling(
                settings.weighting_scheme, len(latents), settings.logit_mean, settings.logit_std, settings.mode_scale
            )
        levels_of = self.sigmas if isinstance(self.sigmas, torch.Tensor) else self.sigmas[batch["expert"][0]]
        # Some schemes can draw exactly 1.
        indices = (positions.cpu() * len(levels_of)).long().clamp(max=len(levels_of) - 1)
        sigmas = levels_of[indices].to(latents.device)
        levels = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - levels) * latents + levels * noise
        timesteps, velocity, made = sigmas * self.steps, noise - latents, None
        if "first_frame" in batch:
            # As in WanImageToVideoPipeline with expand_timesteps: a given frame is at timestep 0. Patches are 2 x 2 latents.
            frames = torch.arange(latents.shape[2], device=latents.device)
            made = ~batch["first_frame"].view(-1, 1, 1, 1, 1) | (frames > 0).view(-1, 1, 1)
            noisy, velocity = torch.where(made, noisy, latents), torch.where(made, velocity, 0.0)
            patches = (latents.shape[3] // 2) * (latents.shape[4] // 2)
            timesteps = (timesteps[:, None] * made.flatten(1)).repeat_interleave(patches, dim=1)
        if "condition" in batch:
            noisy = torch.cat([noisy, batch["condition"].float()], dim=1)
        arguments: dict[str, Any] = {"hidden_states": noisy, "timestep": timesteps}
        if "expert" in batch:
            arguments["expert"] = batch["expert"][0]
        arguments["encoder_hidden_states"] = batch["prompt_embeds"].float()
        if "image_embeds" in batch:
            # The first and the last frame of a clip follow each other: [2 * B, 257, D].
            arguments["encoder_hidden_states_image"] = batch["image_embeds"].float().flatten(0, -3)
        return FlowInputs(arguments, levels, velocity, made)

    def outputs(self, model: torch.nn.Module, inputs: FlowInputs) -> torch.Tensor:
        outputs = model(**inputs.arguments, return_dict=False)[0].float()
        return outputs if inputs.made is None else torch.where(inputs.made, outputs, 0.0)

    def loss(self, outputs: torch.Tensor, inputs: FlowInputs) -> torch.Tensor:
        """Mean squared error of the velocity, weighted."""
        weights = compute_loss_weighting_for_sd3(self.settings.weighting_scheme, inputs.sigmas)
        return (weights * (outputs - inputs.velocity).square()).mean()

    def distance(self, outputs: torch.Tensor, teacher_outputs: torch.Tensor) -> torch.Tensor:
        """Mean squared error against the teacher's velocity."""
        return (outputs - teacher_outputs.float()).square().mean()


class HeldOutClips(Dataset):
    """Each clip at several timesteps, evenly spread over the schedule, with noise that is the same in every measurement.

    With several experts, each is measured separately, on its own part of the schedule.

    Args:
        clips: dicts of tensors by index, with `latents`.
        timesteps: the number of timesteps for each clip.
        seed: the seed of the noise.
        expert: the expert to measure, if there are several.
    """

    def __init__(
        self,
        clips: EncodedClips | Sequence[dict[str, torch.Tensor]],
        timesteps: int,
        seed: int,
        expert: str | None = None,
    ) -> None:
        self.clips, self.timesteps, self.seed = clips, timesteps, seed
        self.about = {} if expert is None else {"expert": expert}

    def __len__(self) -> int:
        return len(self.clips) * self.timesteps

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index // self.timesteps]
        noise = torch.randn(clip["latents"].shape, generator=torch.Generator().manual_seed(self.seed + index))
        position = torch.tensor((index % self.timesteps + 0.5) / self.timesteps)
        return {**clip, "noise": noise, "position": position, **self.about}
