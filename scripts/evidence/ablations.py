"""Experiment 3: what each part of the backward is worth, on SmolLM2-135M (the paper's figure 3).

python -m scripts.evidence.language
python -m scripts.evidence.ablations --workers 3 --seconds 100

All arms run the eager implementation of `scripts.evidence.attention.baselines`, so that the backward is all that differs:

- definition: docs/NUMERICS.md
- d_from_o: D from the quantized output, without the high-precision twin (the paper's fix 1 undone)
- p_unquantized_in_dv: dV from the unquantized probabilities (its fix 2 undone)
- normalized_p_backward: dV from normalized probabilities that are rounded again, as the public kernel does
- public_pair: trained on the public training kernel's grid with its backward, served on the public inference kernel's
- public_serving: the same backward on the serving grid, trained and served
- control: trained in original attention, served in the definition

Two kinds of units: `gradients/...` compares each backward with the exact straight-through gradient of the same forward, on real
text, in float32; `train/...` trains.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat_patch import patch_model
from qat_recipes.training.settings import TrainingSettings
from scripts.evidence.attention.baseline_attention import baseline_attention
from scripts.evidence.attention.baselines import BASELINES
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.fine_tuning import OBJECTIVE, Attention, fine_tune, frozen_teacher, means, measure_windows
from scripts.evidence.language import FOLDER as LANGUAGE
from scripts.evidence.language import Language
from scripts.evidence.results import Entry, Results, command_line, work_through

EXACT = {
    "definition": "definition",
    "d_from_o": "definition",
    "p_unquantized_in_dv": "definition",
    "normalized_p_backward": "definition",
    "public_training": "public_training_exact",
}
"""Backwards that are compared, and what has the exact straight-through gradient of the same forward."""
ARMS = {
    "definition": ("definition", "definition"),
    "public_pair": ("public_training", "public_serving"),
    "d_from_o": ("d_from_o", "definition"),
    "normalized_p_backward": ("normalized_p_backward", "definition"),
    "control": ("original", "definition"),
    "p_unquantized_in_dv": ("p_unquantized_in_dv", "definition"),
    "public_serving": ("public_serving", "public_serving"),
}
"""By name: the attention that is trained through, and the one that is served; the most telling first."""
MEASURES = ("relative_l2", "cosine", "norm_ratio")
SEEDS = (0, 1, 2)
LENGTHS = (256, 1024, 4096, 512, 2048)
GRADIENT_WINDOWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How long runs are, and how much is measured."""

    length: int
    batch: int
    steps: int
    rate: float = 1e-4
    """Learning rate, the same for all arms: what differs is the gradient."""
    test: int
    validation: int


SIZES = {
    "512": Size(length=512, batch=8, steps=100, test=32, validation=8),
    "4096": Size(length=4096, batch=1, steps=60, test=8, validation=2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    arm: str
    size: str
    seed: int
    distillation: float = 0.0

    @property
    def key(self) -> str:
        return f"train/{self.size}/{'distill' if self.distillation else 'task'}/{self.arm}/seed={self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients of one window of text."""

    length: int
    window: int

    @property
    def key(self) -> str:
        return f"gradients/{self.length}/window={self.window}"


def plan(_: Mapping[str, Entry]) -> Iterator[tuple[str, Run | Gradients]]:
    """All units, the most important first."""
    gradients = [[Gradients(length=length, window=window) for length in LENGTHS] for window in range(GRADIENT_WINDOWS)]
    units: list[Run | Gradients] = list(gradients[0])
    arms = list(ARMS)
    units += [Run(arm=arm, size="512", seed=seed) for seed in SEEDS for arm in arms[:6]]
    units += [
        Run(arm=arm, size="4096", seed=seed) for seed in SEEDS for arm in ("definition", "normalized_p_backward", "public_pair")
    ]
    # They repeat what one window shows, and training is what is not known.
    units += [unit for window in gradients[1:] for unit in window]
    units += [
        Run(arm=arm, size="512", seed=seed, distillation=1.0) for seed in SEEDS for arm in (*arms[:4], "p_unquantized_in_dv")
    ]
    units += [Run(arm="public_serving", size="512", seed=seed) for seed in SEEDS]
    for unit in units:
        yield unit.key, unit


class Ablations:
    """Measures gradients and trains, from one starting model again and again."""

    def __init__(self, language: Language, device: str, sizes: dict[str, Size]) -> None:
        self.language, self.device, self.sizes = language, torch.device(device), sizes
        self.start = language.model(self.device).requires_grad_(False)
        self.teacher = frozen_teacher(self.start)

    def __call__(self, unit: Run | Gradients) -> Entry:
        return self.gradients(unit) if isinstance(unit, Gradients) else self.train(unit)

    def gradients(self, unit: Gradients) -> Entry:
        """How far each backward is from the exact one.

        `whole`: the parameter gradients of the model, as one vector. `layers`: dQ, dK and dV of each layer's attention alone, all
        of them given what the layers of the unquantized model get: Q, K, V and the gradient of the output.
        """
        ids = self.language.windows("train", unit.length, unit.window + 1)[-1:].to(self.device)
        model = copy.deepcopy(self.start).requires_grad_(True)
        calls = attention_calls(model, ids)
        names = {*EXACT, *EXACT.values()}
        vectors = {name: parameter_gradient(model, ids, name) for name in names}
        whole = {name: difference(vectors[name], vectors[exact]) for name, exact in EXACT.items()}
        layers = {name: {tensor: {m: [] for m in MEASURES} for tensor in ("dq", "dk", "dv")} for name in EXACT}
        for call in calls:
            gradients = {name: call.gradients(name) for name in names}
            for name, exact in EXACT.items():
                for found, ours, theirs in zip(layers[name].values(), gradients[name], gradients[exact], strict=True):
                    for measure, value in difference(ours, theirs).items():
                        found[measure].append(value)
        return {"whole": whole, "layers": layers, "settings": dataclasses.asdict(unit)}

    def train(self, run: Run) -> Entry:
        """Train one arm, and measure it as it was trained and as it is served."""
        size, (trained, served) = self.sizes[run.size], ARMS[run.arm]
        on_gpu = self.device.type == "cuda"
        settings = TrainingSettings(
            output_dir="",
            steps=size.steps,
            batch_size=size.batch,
            learning_rate=size.rate,
            schedule="cosine",
            warmup_steps=size.steps // 10,
            fused_optimizer=on_gpu,
            mixed_precision="bf16" if on_gpu else None,
            seed=run.seed,
            eval_every=size.steps // 4,
            distillation=run.distillation,
        )
        model = copy.deepcopy(self.start).requires_grad_(True)
        with attention_in(model, trained) as handle:
            attentions: dict[str, Attention] = {"original": handle.disabled}
            if trained != "original":
                attentions["trained"] = contextlib.nullcontext
            if served != trained:
                attentions["served"] = partial(instead, handle, model, served)

            def measure(split: str, count: int) -> dict[str, list[float]]:
                windows = self.language.windows(split, size.length, count).to(self.device)
                return measure_windows(model, attentions, windows, self.teacher, settings, size.batch)

            entry = fine_tune(
                model,
                settings,
                self.language.windows("train", size.length).to(self.device),
                teacher=self.teacher if run.distillation else None,
                measure=lambda: means(measure("validation", size.validation)),
            )
            entry["test"] = measure("test", size.test)
        return entry | {"settings": dataclasses.asdict(run) | dataclasses.asdict(size) | {"trained": trained, "served": served}}


@contextlib.contextmanager
def instead(handle: Any, model: torch.nn.Module, name: str) -> Iterator[None]:
    """Inside, another attention than the one in force."""
    with handle.disabled(), attention_in(model, name):
        yield


@dataclasses.dataclass
class Call:
    """What one layer's attention is given, and the gradient of its output; all float32, [1, heads, length, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    grad_out: torch.Tensor | None = None

    def gradients(self, name: str) -> tuple[torch.Tensor, ...]:
        """dQ, dK and dV of a baseline."""
        leaves = [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]
        out = baseline_attention(*leaves, baseline=BASELINES[name], causal=True, scale=self.scale)
        return torch.autograd.grad(out, leaves, self.grad_out)


def attention_calls(model: torch.nn.Module, ids: torch.Tensor) -> list[Call]:
    """The calls of all layers, when the model in its original attention predicts the next token."""
    calls: list[Call] = []
    # The output leaves the observed call behind, as [1, length, heads, head_dim], and enters the output projection.
    with (
        patch_model(model) as handle,
        handle.observed(
            lambda layer, call: calls.append(Call(call.query.detach(), call.key.detach(), call.value.detach(), call.scale))
        ),
    ):
        outputs: list[torch.Tensor] = []
        hooks = [
            model.get_submodule(f"{name}.o_proj").register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
            for name in handle.patched
        ]
        loss = OBJECTIVE.loss(OBJECTIVE.outputs(model, {"input_ids": ids}), {"input_ids": ids})
        for hook in hooks:
            hook.remove()
    for call, grad in zip(calls, torch.autograd.grad(loss, outputs), strict=True):
        heads, _, head_dim = call.query.shape[1:]
        call.grad_out = grad.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    return calls


def parameter_gradient(model: torch.nn.Module, ids: torch.Tensor, name: str) -> torch.Tensor:
    """The gradient of the next-token loss for all parameters, as one vector."""
    with attention_in(model, name):
        loss = OBJECTIVE.loss(OBJECTIVE.outputs(model, {"input_ids": ids}), {"input_ids": ids})
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def difference(ours: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Relative L2 error, cosine, and the ratio of the norms."""
    ours, exact = ours.flatten().double(), exact.flatten().double()
    norms = ours.norm(), exact.norm()
    values = (ours - exact).norm() / norms[1], ours @ exact / (norms[0] * norms[1]), norms[0] / norms[1]
    return {name: float(f"{float(value):.5g}") for name, value in zip(MEASURES, values, strict=True)}


def make_ablations(folder: Path, device: str) -> Callable[[Run | Gradients], Entry]:
    """What measures the units, on a prepared folder."""
    return Ablations(Language(folder), device, SIZES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = command_line("ablations", "ablations.json", "experiment 3: ablations of the backward")
    parser.add_argument("--language", type=Path, default=LANGUAGE, help="what evidence.language prepared; default %(default)s")
    options = parser.parse_args(arguments)
    prepare = partial(make_ablations, options.language, options.device)
    results = Results(options.results)
    work_through(results, plan, prepare, device=options.device, workers=options.workers, seconds=options.seconds)


if __name__ == "__main__":
    main()
