"""The training steps whose memory scripts.bench.sizing measures: models with random weights, methods and lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, Qwen3Config

from qat_recipes.memory.empty_weights import without_weights
from qat_recipes.tasks.experts import Experts
from qat_recipes.tasks.fine_tuning import FineTuning, FineTuningSettings
from qat_recipes.tasks.flow_matching import FlowMatching, TimestepSettings, noise_levels
from qat_recipes.tasks.language_modeling import LanguageModeling, NextToken
from qat_recipes.tasks.video_diffusion import EXPERTS, VideoDiffusion
from qat_recipes.training.adapters import LoraSettings
from scripts.bench.model_configs import CONFIGS, TINY_CONFIGS

LORA = LoraSettings(rank=16, alpha=32.0)
ACTIVATIONS = {"offload_activations": True}
KEPT = {"keep_attention": True}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "distillation": {"distillation": 1.0},
    "full, 8-bit AdamW": {"optimizer": "adamw_8bit"},
    "full, 8-bit AdamW, activations": {"optimizer": "adamw_8bit", **ACTIVATIONS},
    "full, paged AdamW": {"optimizer": "paged_adamw"},
    "LoRA": {"lora": LORA},
    "LoRA distillation": {"lora": LORA, "distillation": 1.0},
    "LoRA, activations": {"lora": LORA, **ACTIVATIONS},
    "LoRA, float8": {"lora": replace(LORA, base_dtype="float8")},
    "LoRA, float8, activations": {"lora": replace(LORA, base_dtype="float8"), **ACTIVATIONS},
    "LoRA, NF4": {"lora": replace(LORA, base_dtype="nf4")},
    "LoRA, NF4, activations": {"lora": replace(LORA, base_dtype="nf4"), **ACTIVATIONS},
    "LoRA, layers": {"lora": replace(LORA, offload="layers")},
    "LoRA, layers, activations": {"lora": replace(LORA, offload="layers"), **ACTIVATIONS},
    "LoRA, float8, expert": {"lora": replace(LORA, base_dtype="float8", offload="expert")},
    "LoRA, float8, expert, activations": {"lora": replace(LORA, base_dtype="float8", offload="expert"), **ACTIVATIONS},
    "full, kept attention": KEPT,
    "LoRA, kept attention": {"lora": LORA, **KEPT},
}
"""Settings of a run, by what docs/SIZING.md calls them."""
NEEDS_A_GPU = {"optimizer": "paged_adamw", "offload_activations": True}
"""What is refused on a CPU."""


class Measured(FineTuning[FineTuningSettings]):
    """A model with random weights, and one sample a step, of the given lengths in this order."""

    config: dict[str, int]
    """Of the model, by name in MODELS."""
    eval_batch_size = 1
    settings_type: ClassVar[type[FineTuningSettings]] = FineTuningSettings

    def __init__(self, settings: FineTuningSettings, config: dict[str, int], tokens: Sequence[int], device: torch.device) -> None:
        self.config, self.device, self.eval_data = config, device, {}
        self.train_data = [self.sample(number) for number in tokens]
        super().__init__(settings)

    def load(self, component: str | None) -> torch.nn.Module:
        return filled(without_weights(lambda: self.random(self.config, self.settings.load_dtype)), self.device)

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        """A model on the default device."""
        raise NotImplementedError

    def sample(self, tokens: int) -> dict[str, Any]:
        """A sample of so many tokens."""
        raise NotImplementedError

    def batches(self, start: int, stop: int) -> BatchSampler:
        return BatchSampler(range(start, stop), 1, drop_last=True)

    def after_step(self, step: int) -> dict[str, float]:
        """What the allocator had reserved at most; nothing before the first step, which has no record then."""
        return {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30} if step and self.device.type == "cuda" else {}

    def export(self, *_: Any) -> None:
        """Nobody needs random weights."""


def filled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A model on the CPU instead of one whose parameters are on the meta device: norms are 1, biases 0, and matrices random.

    All blocks have the values of the first, drawn on the device: 14 billion numbers take seconds then.
    """
    values: dict[str, torch.Tensor] = {}
    parameters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = re.sub(r"\.\d+\.", ".*.", f"{prefix}.{name}", count=1)
            if key not in values:
                x = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                is_matrix = parameter.dim() > 1
                (x.normal_(std=0.02) if is_matrix else x.fill_(float(name == "weight")))
                values[key] = x.cpu()
            if parameter not in parameters:
                parameters[parameter] = torch.nn.Parameter(values[key])
            module._parameters[name] = parameters[parameter]
    return model


class MeasuredText(Measured):
    """Qwen3 learns from one document."""

    lora_targets, tokens = LanguageModeling.lora_targets, staticmethod(LanguageModeling.tokens)
    objective = NextToken()

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=dtype)

    def sample(self, tokens: int) -> dict[str, Any]:
        return {"input_ids": torch.randint(self.config["vocab_size"], (tokens,)), "position_ids": torch.arange(tokens)}


class MeasuredVideo(Measured):
    """Wan learns from one clip of 480x832, 1,560 tokens a latent frame."""

    lora_targets, tokens = VideoDiffusion.lora_targets, VideoDiffusion.tokens
    objective = FlowMatching(TimestepSettings(), *noise_levels(None, 3.0))

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = WanTransformer3DModel(**config)
        finally:
            torch.set_default_dtype(default)
        # As from_pretrained does.
        kept = set(model._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model

    def sample(self, tokens: int) -> dict[str, Any]:
        return {"latents": torch.randn(16, tokens // 1560, 60, 104), "prompt_embeds": torch.randn(512, self.config["text_dim"])}


class BothSettings(FineTuningSettings):
    """Two transformers, as with model.transformer=both."""

    @property
    def trains_in_turns(self) -> bool:
        return True


class MeasuredExperts(MeasuredVideo):
    """Wan 2.2 A14B: both transformers, which take turns."""

    settings_type = BothSettings
    components = EXPERTS
    objective = FlowMatching(TimestepSettings(), dict.fromkeys(EXPERTS, noise_levels(None, 3.0)[0]), 1000)

    def __init__(self, settings: FineTuningSettings, config: dict[str, int], tokens: Sequence[int], device: torch.device) -> None:
        super().__init__(settings, config, tokens, device)
        for number, sample in enumerate(self.train_data):
            sample["expert"] = EXPERTS[number % 2]

    def joined(self, parts: dict[str | None, torch.nn.Module]) -> torch.nn.Module:
        return Experts({str(name): part for name, part in parts.items()})


class Model(NamedTuple):
    """What is measured."""

    kind: type[Measured]
    config: dict[str, int]


def _models(configs: dict[str, dict[str, int]]) -> dict[str, Model]:
    kinds = {"Wan 2.1": MeasuredVideo, "Wan 2.2": MeasuredExperts}
    return {name: Model(kinds.get(name[:7], MeasuredText), config) for name, config in configs.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    model: str
    method: str
    tokens: tuple[int, ...]
    """Lengths, ascending."""
    cap_gib: int | None = None
    """What PyTorch's allocator gets; None: the whole GPU."""
    is_timed: bool = False
    """Whether the longest comes twice, to see how long a step takes: the first time its operations are counted, too."""

    def __str__(self) -> str:
        return f"{self.model}, {self.method}" + (f", in {self.cap_gib} GiB" if self.cap_gib else "")


MODELS, TINY = _models(CONFIGS), _models(TINY_CONFIGS)
_VIDEO, _TEXT = (7800, 17_160, 32_760), (4096, 8192, 16_384)
_WHOLE = (7800, 32_760)
CASES = [
    Case(model="Wan 2.1 14B", method="LoRA, NF4, activations", tokens=_WHOLE, cap_gib=24, is_timed=True),
    Case(model="Wan 2.1 1.3B", method="LoRA, activations", tokens=_WHOLE, cap_gib=8, is_timed=True),
    Case(model="Wan 2.1 1.3B", method="full, kept attention", tokens=_WHOLE, is_timed=True),
    Case(model="Wan 2.1 1.3B", method="full, 8-bit AdamW, activations", tokens=_WHOLE, cap_gib=24, is_timed=True),
    Case(model="Qwen3 8B", method="LoRA, NF4", tokens=(4096, 8192), cap_gib=24, is_timed=True),
    Case(model="Qwen3 8B", method="LoRA, kept attention", tokens=(4096, 16_384), is_timed=True),
    Case(model="Wan 2.1 14B", method="LoRA, layers, activations", tokens=_WHOLE, cap_gib=24),
    Case(model="Wan 2.1 14B", method="LoRA, float8, activations", tokens=_WHOLE, cap_gib=32),
    Case(model="Wan 2.1 1.3B", method="LoRA, NF4", tokens=_WHOLE, cap_gib=8),
    Case(model="Qwen3 14B", method="LoRA, NF4, activations", tokens=(4096, 8192), cap_gib=24),
    Case(model="Qwen3 1.7B", method="full, 8-bit AdamW", tokens=(4096, 8192), cap_gib=24),
    Case(model="Wan 2.1 14B", method="LoRA, kept attention", tokens=(4680, 20_280), is_timed=True),
    Case(model="Wan 2.2 A14B", method="LoRA, float8, expert, activations", tokens=_WHOLE, cap_gib=32),
    Case(model="Qwen3 8B", method="LoRA, float8, activations", tokens=(4096, 8192), cap_gib=24),
    Case(model="Wan 2.1 1.3B", method="full, paged AdamW", tokens=_WHOLE),
    Case(model="Wan 2.1 14B", method="LoRA, NF4", tokens=_WHOLE, cap_gib=32),
    Case(model="Wan 2.1 14B", method="LoRA, layers", tokens=_WHOLE, cap_gib=32),
    *(
        Case(model=model, method=method, tokens=tokens)
        for model, method, tokens in (
            ("Wan 2.1 1.3B", "full", _VIDEO),
            ("Qwen3 14B", "LoRA", _TEXT),
            ("Qwen3 0.6B", "full", _TEXT),
            ("Wan 2.1 14B", "LoRA", (4680, 10_920, 20_280)),
            ("Qwen3 4B", "full", _TEXT),
            ("Qwen3 1.7B", "full", _TEXT),
            ("Wan 2.1 1.3B", "LoRA", _VIDEO),
            ("Qwen3 8B", "LoRA", _TEXT),
            ("Wan 2.1 1.3B", "distillation", _VIDEO),
            ("Qwen3 0.6B", "distillation", _TEXT),
            ("Qwen3 1.7B", "distillation", _TEXT),
            ("Qwen3 4B", "LoRA", _TEXT),
            ("Qwen3 4B", "distillation", _TEXT),
            ("Qwen3 1.7B", "LoRA", _TEXT),
            ("Qwen3 0.6B", "LoRA", _TEXT),
            ("Qwen3 14B", "LoRA distillation", _TEXT),
            ("Qwen3 8B", "LoRA distillation", _TEXT),
        )
    ),
]
"""The most important first."""


def tiny_cases(tokens: tuple[int, ...] = (1560, 3120)) -> list[Case]:
    """Every method that runs here, of every kind of model that it is for."""
    has_gpu = torch.cuda.is_available()
    methods = [name for name, changes in METHODS.items() if has_gpu or not changes.items() & NEEDS_A_GPU.items()]
    cases = [Case(model=model, method=method, tokens=tokens, is_timed=True) for model in TINY for method in methods]
    return [case for case in cases if ("expert" in case.method) == (TINY[case.model].kind is MeasuredExperts)]
