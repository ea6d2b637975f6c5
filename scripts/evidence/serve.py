"""Experiment 4: train = serve. The exported, reloaded checkpoint loses what the training forward loses.

python -m scripts.evidence.language
python -m scripts.evidence.serve

Distills SmolLM2-135M through 4-bit attention, exports it, loads it again, and measures the same held-out windows in

- training: the trained model itself, in the forward that the training steps ran, with gradients
- reloaded: the reloaded export, without gradients, in the implementation that `auto` takes
- eager, fp4: the reloaded weights in these implementations (`fp4` is the inference kernel; without FP4 units it emulates them)
- cache: the reloaded export decoding from the FP4 cache, token by token, each told the true tokens before it: the ends of windows
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat_kernels import attention
from qat_patch import export_checkpoint, get_handle, load_checkpoint
from qat_patch.hosts.transformers import masks
from qat_patch.layer import AttentionLayer, under_autocast
from qat_recipes.training.settings import TrainingSettings
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.fine_tuning import OBJECTIVE, autocast, divergences, fine_tune, frozen_teacher, token_losses
from scripts.evidence.language import FOLDER as LANGUAGE
from scripts.evidence.language import Language
from scripts.evidence.results import Entry, Results, command_line, work_through
from scripts.evidence.trained import ALL, PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How long is trained, and how much is measured."""

    length: int = 1024
    batch: int = 4
    steps: int = 60
    windows: int = 8
    """Test windows."""
    decoded: int = 64
    """Tokens at the end of each that are decoded from the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One training, in one attention of attention/by_name.py and one precision."""

    attention: str
    mixed_precision: str | None

    @property
    def key(self) -> str:
        return f"{self.attention}/{self.mixed_precision or 'float32'}"


def plan(device: str, _: Mapping[str, Entry]) -> Iterator[tuple[str, Unit]]:
    """Mixed precision on a GPU, where recipes use it, and float32."""
    for mixed_precision in (("bf16",) if device == "cuda" else ()) + (None,):
        for name in (PLAIN, ALL):
            unit = Unit(attention=name, mixed_precision=mixed_precision)
            yield unit.key, unit


class Server:
    """Trains, exports, reloads and compares."""

    def __init__(self, language: Language, device: str, size: Size) -> None:
        self.language, self.device, self.size = language, torch.device(device), size
        self.start = language.model(self.device).requires_grad_(False)
        self.implementations = ("eager", "fp4") if device == "cuda" else ("eager",)

    def __call__(self, unit: Unit) -> Entry:
        size = self.size
        settings = TrainingSettings(
            output_dir="",
            steps=size.steps,
            batch_size=size.batch,
            learning_rate=1e-4,
            schedule="cosine",
            fused_optimizer=self.device.type == "cuda",
            mixed_precision=unit.mixed_precision,
            distillation=1.0,
        )
        model = copy.deepcopy(self.start).requires_grad_(True)
        windows = self.language.windows("train", size.length).to(self.device)
        ids = self.language.windows("test", size.length, size.windows).to(self.device)
        logits = {}
        with (
            attention_in(model, unit.attention, [{"input_ids": x[None]} for x in windows[:8]]),
            tempfile.TemporaryDirectory() as folder,
        ):
            fine_tune(model, settings, windows, teacher=frozen_teacher(self.start), measure=dict)
            model.eval()
            logits["training"] = self.logits(model, ids, settings)
            export = export_checkpoint(model, Path(folder) / "export")
            reloaded = load_checkpoint(export, device=self.device)
            with torch.no_grad():
                logits["reloaded"] = self.logits(reloaded, ids, settings)
                decoded = self.decode(reloaded, ids, settings)
                for name in self.implementations:
                    with implementation(reloaded, name):
                        logits[name] = self.logits(reloaded, ids, settings)
        tail = slice(size.length - 1 - size.decoded, size.length)  # the first of them predicts the first that is decoded
        found: dict[str, Any] = {"windows": {}, "ends": {}}
        for name, these in logits.items():
            found["windows"][name] = compare(these, logits["training"], ids)
            found["ends"][name] = compare(these[:, tail], logits["training"][:, tail], ids[:, tail])
        found["ends"]["cache"] = compare(decoded, logits["training"][:, tail], ids[:, tail])
        return found | {"settings": dataclasses.asdict(unit) | dataclasses.asdict(size)}

    def logits(self, model: torch.nn.Module, ids: torch.Tensor, settings: TrainingSettings) -> torch.Tensor:
        """Of whole windows, a batch at a time."""
        with autocast(settings, self.device):
            return torch.cat([OBJECTIVE.outputs(model, {"input_ids": x}).detach() for x in ids.split(self.size.batch)])

    def decode(self, model: torch.nn.Module, ids: torch.Tensor, settings: TrainingSettings) -> torch.Tensor:
        """Logits of the last `decoded + 1` tokens: those before are one prefill, these come one by one."""
        cache, found = get_handle(model).cache(), []
        steps = self.size.decoded + 1
        with autocast(settings, self.device):
            for part in (ids[:, :-steps], *ids[:, -steps:].split(1, 1)):
                found.append(model(part, past_key_values=cache, use_cache=True).logits[:, -1:])
        return torch.cat(found[1:], 1)


@contextlib.contextmanager
def implementation(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Inside, a patched model of Transformers computes its attention by one implementation of `qat_kernels.attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    layers = dict(get_handle(model).patched)
    registered = f"qat_fp4_{name}"
    by_module = {model.get_submodule(module): layer for module, layer in layers.items()}
    AttentionInterface.register(registered, partial(_forward, by_module, name))
    AttentionMaskInterface.register(registered, masks.make_mask)
    patched = model.config._attn_implementation
    model.set_attn_implementation(registered)
    try:
        yield
    finally:
        model.set_attn_implementation(patched)


def _forward(
    layers: dict[torch.nn.Module, AttentionLayer],
    impl: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for whole sequences without padding."""
    if masks.read(attention_mask, query.shape[2], key.shape[2], from_the_first=True) != masks.Causal(query.shape[2]):
        raise ValueError("serve: expected whole windows, without padding")
    layer = layers[module]
    if layer.probed:
        layer.note_call()
    query, key, value = under_autocast(query, key, value)
    options = {"spec": layer.spec, "impl": impl} | layer.shifts_on(query.device)
    return attention(query, key, value, causal=True, scale=scaling, **options).transpose(1, 2).contiguous(), None


def compare(logits: torch.Tensor, training: torch.Tensor, ids: torch.Tensor) -> dict[str, list[float]]:
    """Of each window: its loss, and KL(training || these logits); how many tokens have another first choice."""
    other = (logits.argmax(-1) != training.argmax(-1)).float().mean(1)
    values = {"loss": token_losses(logits, ids).mean(1), "kl": divergences(logits, training), "other_choice": other}
    return {name: [float(f"{x:.7g}") for x in each.tolist()] for name, each in values.items()}


def make_server(folder: Path, device: str) -> Callable[[Unit], Entry]:
    """What measures the units, on a prepared folder."""
    return Server(Language(folder), device, Size())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = command_line("serve", "serve.json", "experiment 4: train = serve")
    parser.add_argument("--language", type=Path, default=LANGUAGE, help="what evidence.language prepared; default %(default)s")
    options = parser.parse_args(arguments)
    prepare = partial(make_server, options.language, options.device)
    results = Results(options.results)
    work_through(
        results, partial(plan, options.device), prepare, device=options.device, workers=options.workers, seconds=options.seconds
    )


if __name__ == "__main__":
    main()
