"""Fine-tuning a model of Transformers or Diffusers: settings, loading, adapters, patch and export, for the tasks here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from accelerate import PartialState

from qat_patch import (
    LinearQATConfig,
    export_checkpoint,
    get_handle,
    get_linear_handle,
    patch_model,
    quantize_linears,
    unpatch_model,
)
from qat_patch.checkpoint.adapters import adapter_owner, check_comfy
from qat_patch.checkpoint.exportable import check_linears
from qat_patch.checkpoint.integrity import written_aside
from qat_patch.layer import Shifts
from qat_patch.linear.handle import GlobalScales
from qat_patch.patch import require_handle
from qat_patch.servers import check_servable, check_spec
from qat_recipes.memory.checkpointing import enable_checkpointing
from qat_recipes.memory.empty_weights import receives_weights, without_weights
from qat_recipes.memory.offloading import offload
from qat_recipes.training.adapters import OWN, LoraSettings, add_adapters
from qat_recipes.training.fingerprint import digest_of_weights
from qat_recipes.training.settings import TrainingSettings
from qat_recipes.training.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to start from."""

    path: str
    """Name on the Hub, or a folder."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers, and compute the rest again in the backward pass: less memory, a third slower."""
    keep_attention: bool = False
    """With gradient_checkpointing: also keep the results of 4-bit attention, so that it is not computed again. Faster for long
    sequences; takes about 6 more bytes for each value of the queries of each layer."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the exported weights. Held-out losses are measured before this rounding."""
    export_server: Literal["vllm", "sglang", "diffusers-sage3"] | None = None
    """The server to export for; `qat.spec.preset` must be one that it computes (docs/SERVERS.md). null: this package."""

    def __post_init__(self) -> None:
        if self.path.startswith((".", "/", "~")) and not self.is_local:
            raise ValueError(f"model.path: there is no folder {self.path}")
        if self.keep_attention and not self.gradient_checkpointing:
            raise ValueError(
                "model.keep_attention: expected model.gradient_checkpointing=true with it; set that, or leave it out"
            )
        if self.revision is not None and self.is_local:
            raise ValueError(f"model.revision: only models on the Hub have one, and {self.path} is local; set it to null")

    @property
    def is_local(self) -> bool:
        """Whether `path` is a folder."""
        return Path(self.path).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningSettings(TrainingSettings):
    """The settings of fine-tuning a model of Transformers or Diffusers. A recipe adds its data."""

    model: ModelSettings
    """The model to start from."""
    lora: LoraSettings | None = None
    """Train adapters; null: train all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora and self.lora.export == "adapters" and self.model.export_dtype != "float32":
            raise ValueError(
                f"model.export_dtype: adapters alone are exported in float32, got {self.model.export_dtype}; set it to "
                "float32, or lora.export to merged"
            )
        if self.lora and self.lora.export == "merged" and self.lora.dropout and self.linear is not None:
            raise ValueError(
                f"lora.dropout: expected 0 with linear and merged weights, whose sum with the adapters is rounded, got "
                f"{self.lora.dropout}; or set lora.export to adapters"
            )
        if self.model.keep_attention and self.offload_activations:
            raise ValueError("model.keep_attention: keeps results on the GPU, and offload_activations moves them; leave one out")
        if self.model.keep_attention and self.compile:
            raise ValueError(f"settings.compile: expected null with model.keep_attention=true, got {self.compile}")
        if self.model.export_server is not None:
            try:
                check_spec(self.model.export_server, self.qat.spec, "qat.spec.preset")
            except ValueError as error:
                raise ValueError(f"model.export_server: {error}") from None
        start = self.lora and self.lora.start
        if start and (start.path_2 is not None) != self.trains_in_turns:
            expected = "the LoRA of transformer_2" if self.trains_in_turns else "null, for one model is trained"
            raise ValueError(f"lora.start.path_2: expected {expected}, got {start.path_2}")
        if start and start.use == "trained" and self.distillation:
            raise ValueError(
                "lora.start.use: with distillation the teacher is what the run starts from, and a LoRA that is trained does not "
                "stay so; expected frozen or merged, got trained"
            )
        if self.linear is not None and self.is_quantized:
            assert self.lora is not None
            raise ValueError(
                "settings.linear: its layers round weights as they are; expected lora.base_dtype=null, got "
                f"{self.lora.base_dtype}"
            )
        if self.linear is not None and start and start.use == "frozen":
            raise ValueError(
                "settings.linear: a LoRA that stays beside the weights is no part of what is rounded; expected lora.start.use "
                "merged or trained, got frozen"
            )
        if self.lora and self.is_quantized and self.compile:
            raise ValueError(f"settings.compile: expected null with lora.base_dtype={self.lora.base_dtype}, got {self.compile}")
        if self.lora and self.lora.base_dtype == "float8" and not self.model.gradient_checkpointing:
            raise ValueError(
                "lora.base_dtype: float8 needs model.gradient_checkpointing=true, for else the backward pass keeps all weights "
                "in the type that they compute in"
            )
        if self.lora and self.lora.offload:
            self._check_offload(self.lora)
        if self.lora and self.lora.base_dtype == "bfloat16" and self.mixed_precision is None:
            raise ValueError("lora.base_dtype: expected float32 or null without mixed_precision=bf16, got bfloat16")

    def _check_offload(self, lora: LoraSettings) -> None:
        if self.compile:
            raise ValueError(f"settings.compile: expected null with lora.offload={lora.offload}, got {self.compile}")
        if lora.base_dtype == "nf4":
            raise ValueError(f"lora.offload: {lora.offload} has not been tried with base_dtype=nf4; leave one of them out")
        if self.linear is not None:
            raise ValueError(f"lora.offload: {lora.offload} has not been tried with linear; leave one of them out")
        if lora.offload == "layers" and not self.model.gradient_checkpointing:
            raise ValueError(
                "lora.offload: layers needs model.gradient_checkpointing=true, for else the backward pass keeps all weights on "
                "the GPU"
            )
        if lora.offload == "expert" and not self.trains_in_turns:
            raise ValueError("lora.offload: expert is for a run of two transformers (model.transformer=both); leave it out")

    @property
    def is_quantized(self) -> bool:
        """Whether frozen weights are stored in fewer bits than they were loaded in."""
        return self.lora is not None and self.lora.base_dtype in ("float8", "nf4")

    @property
    def load_dtype(self) -> torch.dtype:
        """The dtype to load the model in: float32 if its weights are trained."""
        if self.lora is None:
            return torch.float32
        own = None if self.is_quantized else self.lora.base_dtype
        return getattr(torch, own or ("float32" if self.mixed_precision is None else "bfloat16"))


def move_out_of_files(model: torch.nn.Module) -> None:
    """Copy weights on the CPU: in a mapped file they lie at any address, and CPU matrix products round by address."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _below(component: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{component}."): x for name, x in weights.items() if name.startswith(f"{component}.")}


Settings = TypeVar("Settings", bound=FineTuningSettings)


class FineTuning(Task, Generic[Settings]):
    """Full fine-tuning, or adapters, of one model. A recipe adds how to load it, the data and the objective."""

    lora_targets: ClassVar[tuple[str, ...]]
    """The projections of attention."""
    tokenizer: Any = None
    """It is exported with the model."""
    components: tuple[str | None, ...] = (None,)
    """The components of a pipeline that are trained; None is a model without a pipeline."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        processes = PartialState().num_processes
        if settings.lora and settings.is_quantized and processes > 1:
            raise ValueError(f"lora.base_dtype: {settings.lora.base_dtype} runs in one process, and there are {processes}")
        if settings.lora and settings.lora.offload and processes > 1:
            raise ValueError(f"lora.offload: {settings.lora.offload} runs in one process, and there are {processes}")
        is_split = settings.processes_a_sample > 1
        self.parts = {name: self._build(name, self.lora_of(name), is_split=is_split) for name in self.components}
        self.model = self.joined(self.parts)
        self.handle = require_handle(self.model)
        if settings.lora and settings.lora.offload:
            offload(settings.lora.offload, list(self.parts.values()), PartialState().device)
            self.places_itself = True

    def load(self, component: str | None) -> torch.nn.Module:
        """The model to start from, in `settings.load_dtype`. With mixed precision autocast makes the low-precision copies."""
        raise NotImplementedError

    def from_config(self, component: str | None) -> torch.nn.Module:
        """The same model in float32, with any weights."""
        raise NotImplementedError

    def teacher(self) -> torch.nn.Module | None:
        if self.settings.processes_a_sample == 1:
            return None
        # Diffusers has tied the model to its processes; a copy would not be.
        (component,) = self.components
        frozen = self._loaded(component, None)
        move_out_of_files(frozen)
        if get_handle(frozen) is not None:
            unpatch_model(frozen)
        self.split_tokens(frozen)
        return frozen

    def split_tokens(self, model: torch.nn.Module) -> None:
        """Split the tokens of each sample over `settings.processes_a_sample` processes, which all call this."""
        raise NotImplementedError

    def model_config(self, component: str | None) -> dict[str, Any]:
        """The config of the model to start from, as in its file."""
        raise NotImplementedError

    def lora_of(self, component: str | None) -> LoraSettings | None:
        """The settings of a component's adapters, or None."""
        return self.settings.lora

    def joined(self, parts: dict[str | None, torch.nn.Module]) -> torch.nn.Module:
        """All components as one model for the loop."""
        (part,) = parts.values()
        return part

    def fingerprints(self) -> dict[str, str]:
        configs = [self.model_config(component) for component in self.components]
        config = json.dumps(configs if len(configs) > 1 else configs[0], sort_keys=True, default=str)
        return {
            "the weights of model.path": digest_of_weights(self.model),
            "the config of model.path": hashlib.sha256(config.encode()).hexdigest(),
        }

    def after_step(self, step: int) -> dict[str, float]:
        """Nothing, unless a recipe overrides it."""
        return {}

    def export(
        self, folder: Path, training: dict[str, Any], metrics: dict[str, float], weights: dict[str, torch.Tensor] | None
    ) -> None:
        if len(self.components) == 1:
            self._export(self.components[0], folder, training, metrics, weights)
            return
        # All components or none: this folder marks the run as finished.
        with written_aside(folder) as partial:
            # Each export is also written aside, and for this locks its parent folder.
            new = partial / "new"
            for component in self.components:
                assert component is not None  # there are several components
                own = None if weights is None else _below(component, weights)
                self._export(component, new / component, training, metrics, own)
                (new / component).rename(partial / component)
            new.rmdir()

    def _export(
        self,
        component: str | None,
        folder: Path,
        training: dict[str, Any],
        metrics: dict[str, float],
        weights: dict[str, torch.Tensor] | None,
    ) -> None:
        model, source, lora = self.parts[component], self.settings.model, self.settings.lora
        alone = lora is not None and lora.export == "adapters"
        is_held = self.settings.is_quantized or self.places_itself
        if weights is not None or is_held or (alone and self._has_start_beside):
            model = self._rebuilt(component, model.state_dict() if weights is None else weights, alone=alone)
        base_model = str(Path(source.path).resolve()) if source.is_local else source.path
        export_checkpoint(
            model,
            folder,
            tokenizer=self.tokenizer,
            training=training,
            metrics=metrics,
            # Adapters alone need it; otherwise a path of this machine is useless to others.
            base_model=base_model if alone or not source.is_local else None,
            dtype=None if alone else getattr(torch, source.export_dtype),
            merge_adapters=not alone,
            lora_format="diffusers" if lora is None else lora.export_format,
            component=component,
            server=source.export_server,
        )

    def _loaded(self, component: str | None, lora: LoraSettings | None) -> torch.nn.Module:
        """The model to start from, without weights if the first process sends them to this one.

        With adapters or quantized linear layers all processes read them: frozen weights are half as large, and the scales of
        linear layers are measured on weights.
        """
        is_empty = lora is None and self.settings.linear is None and receives_weights()
        return without_weights(lambda: self.from_config(component)) if is_empty else self.load(component)

    @property
    def _has_start_beside(self) -> bool:
        """Whether the model holds an existing LoRA that is not trained."""
        lora = self.settings.lora
        return lora is not None and lora.start is not None and lora.start.use != "trained"

    def _rebuilt(self, component: str | None, weights: dict[str, torch.Tensor], *, alone: bool) -> torch.nn.Module:
        """A component as it was loaded, with these weights, in one piece; adapters alone without what they were trained
        beside."""
        lora, trained = self.lora_of(component), self.parts[component]
        if lora is not None:
            start = None if alone and self._has_start_beside else lora.start
            own = None if self.settings.is_quantized else lora.base_dtype
            lora = dataclasses.replace(lora, start=start, base_dtype=own, offload=None)
            # The other weights did not change, or were stored in fewer bits.
            weights = {name: x for name, x in weights.items() if f".{OWN}." in name}
        # With the measured scales, which are not in the weights.
        scales = None if (linears := get_linear_handle(trained)) is None else linears.scales
        model = self._build(component, lora, require_handle(trained).shifts, scales)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if lost := [*unexpected, *(name for name in missing if lora is None or f".{OWN}." in name)]:
            raise RuntimeError(f"export: {lost[0]} is in one of the trained and the exported model only")
        return model

    def _build(
        self,
        component: str | None,
        lora: LoraSettings | None,
        shifts: Shifts | None = None,
        scales: dict[str, GlobalScales] | None = None,
        *,
        is_split: bool = False,
    ) -> torch.nn.Module:
        """Load, add adapters, patch, quantize linear layers. `scales`: their global scales; None: those of the model's
        weights. `is_split`: tokens are split over processes."""
        settings = self.settings
        model = self._loaded(component, lora)
        if settings.model.gradient_checkpointing:
            enable_checkpointing(model, keep_attention=settings.model.keep_attention)
        move_out_of_files(model)
        if get_handle(model) is not None:
            # One of our exports comes patched; here the settings decide.
            unpatch_model(model)
        if is_split:
            self.split_tokens(model)
        if lora is not None:
            model = add_adapters(model, lora, self.lora_targets, settings.seed)
        handle, linears = patch_model(model, settings.qat, **shifts or {}), None
        alone = lora is not None and lora.export == "adapters"
        if settings.linear is not None:
            linears = quantize_linears(
                model, LinearQATConfig.from_dict(settings.linear.to_dict()), scales=scales, merge_adapters=not alone
            )
            try:
                check_linears(handle, "adapters" if alone else "model", is_measured=False)
            except ValueError as error:
                raise ValueError(f"settings.linear: the result could not be exported: {error}") from None
        # Refuse now what the export would refuse at the end of the run.
        if lora is not None and lora.export_format == "comfyui":
            if handle.host != "diffusers":
                raise ValueError("lora.export_format: expected diffusers, since only transformers of Wan have names in ComfyUI")
            check_comfy(model, OWN)
        if settings.model.export_server is not None:
            adapters = adapter_owner(model).peft_config[OWN] if alone else None
            check_servable(settings.model.export_server, handle, adapters=adapters, linears=linears)
        return model
