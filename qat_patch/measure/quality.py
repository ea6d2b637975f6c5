"""What a model loses with each attention, before any training: measured with the same text or the same noise in all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from qat_kernels import QuantSpec
from qat_patch.config import AttnQATConfig
from qat_patch.layer import Shifts
from qat_patch.patch import get_handle, patch_model, require_handle, unpatch_model

from .videos import check_installed, motion, psnr, ssim

ORIGINAL, EXPORTED = "original", "exported"
_TOKENS_AT_ONCE = 1024
"""The number of tokens whose log-probabilities are in memory at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityReport:
    """The measured quality of each attention. `print(report)` is a table."""

    measured_on: str
    """Such as `8 x 1024 tokens`."""
    attentions: dict[str, dict[str, float]]
    """By attention, then by measure. NAME_se is the standard error of NAME."""

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for row in self.attentions.values() for name in row if not name.endswith("_se")))
        rows = [["attention", *columns]]
        for name, row in self.attentions.items():
            rows.append([name, *(_cell(row, column) for column in columns)])
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"on {self.measured_on}:", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)


class Attentions:
    """A model that runs several attentions in turn. It takes over the model's patch, if it has one, and restores it on exit.

    Args:
        model: a model or a pipeline. If it is patched, as an export is, that patch is the attention `exported`, and other
            presets are put into the modules that it patches.
        names: `original`, `exported`, and presets of QuantSpec. The original attention is always the reference, and comes first.
        config: which modules, for a model that is not patched. Its spec has no effect.

    Raises:
        ValueError: an attention does not exist, or the model cannot run it. The model does not change then.
    """

    def __init__(self, model: Any, names: Sequence[str], config: AttnQATConfig | None = None) -> None:
        handle = get_handle(model)
        self.names = list(dict.fromkeys([ORIGINAL, *names]))
        self.exported: list[tuple[Any, AttnQATConfig, Shifts]] = []
        self.targets = [(model, config or AttnQATConfig())]
        if handle is not None:
            if config is not None:
                raise ValueError("evaluate: the model is patched, which says which modules: expected no config")
            for plan in handle.plans.values():
                self.exported.append((plan.model, plan.config, require_handle(plan.model).shifts))
            self.targets = [(part, part_config) for part, part_config, _ in self.exported]
            unpatch_model(model)
        try:
            for name in self.names:
                with self.in_force(name):
                    pass
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def in_force(self, name: str) -> Iterator[None]:
        """Inside, the model runs this attention."""
        patched: list[Any] = []
        try:
            if name == EXPORTED:
                if not self.exported:
                    raise ValueError(f"evaluate: --attention {EXPORTED}: expected an export, got a model that says nothing")
                for model, config, shifts in self.exported:
                    patch_model(model, config, **shifts)
                    patched.append(model)
            elif name != ORIGINAL:
                spec = _preset(name)
                for model, config in self.targets:
                    try:
                        patch_model(model, dataclasses.replace(config, spec=spec, overrides={}), k_shift={}, q_shift={})
                    except ValueError as error:
                        raise ValueError(f"evaluate: --attention {name}: {error}") from error
                    patched.append(model)
            yield
        finally:
            for model in patched:
                unpatch_model(model)

    def close(self) -> None:
        """Restore the model's patch."""
        for model, config, shifts in self.exported:
            if get_handle(model) is None:
                patch_model(model, config, **shifts)

    def __enter__(self) -> Attentions:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _preset(name: str) -> QuantSpec:
    try:
        return QuantSpec(preset=name)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"evaluate: --attention: expected {ORIGINAL}, {EXPORTED} or a preset, got {name!r}: {error}") from error


@torch.no_grad()
def text_quality(model: torch.nn.Module, rows: Iterable[torch.Tensor], attentions: Attentions) -> QualityReport:
    """Loss on text, and distance to the model's original attention.

    Args:
        model: a causal language model, in evaluation mode.
        rows: token ids, int64 [1, tokens], on the device of the model; each row is a separate text.
        attentions: those of this model.

    Returns:
        By attention, means over rows: `loss` in nats per token; `loss_change` from original attention; `kl`, KL(original || this)
        in nats per token, with standard errors; `same_token`, the share of positions with the same most likely next token.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in attentions.names}
    for row in (rows := list(rows)):
        reference: Any = None
        for name in attentions.names:
            with attentions.in_force(name):
                logits = model(input_ids=row, use_cache=False).logits[0]
            reference = logits if name == ORIGINAL else reference
            measured[name].append(_compared(logits, reference, row[0]))
    if not rows:
        raise ValueError("evaluate: expected at least one row of tokens, got none")
    original = [each["loss"] for each in measured[ORIGINAL]]
    report: dict[str, dict[str, float]] = {}
    for name, found in measured.items():
        report[name] = _mean("loss", [each["loss"] for each in found], with_error=False)
        if name != ORIGINAL:
            report[name] |= _mean("loss_change", [each["loss"] - loss for each, loss in zip(found, original, strict=True)])
            report[name] |= _mean("kl", [each["kl"] for each in found])
            report[name] |= _mean("same_token", [each["same_token"] for each in found], with_error=False)
    return QualityReport(measured_on=f"{len(rows)} x {rows[0].shape[1]} tokens", attentions=report)


def _compared(logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Compare logits [tokens, vocabulary], in float32 with sums in float64."""
    loss, kl, same = 0.0, 0.0, 0
    for start in range(0, len(ids), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        ours, theirs, following = logits[part].float(), reference[part].float(), ids[start + 1 : start + _TOKENS_AT_ONCE + 1]
        loss += functional.cross_entropy(ours[: len(following)], following, reduction="sum").double().item()
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl += functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).double().sum().item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return {"loss": loss / (len(ids) - 1), "kl": kl / len(ids), "same_token": same / len(ids)}


@torch.no_grad()
def sample_quality(
    pipe: Any, prompts: Sequence[str], attentions: Attentions, *, seeds: int, arguments: dict[str, Any]
) -> QualityReport:
    """How samples of a pipeline change with its attention: each prompt from the same noise in all of them.

    Args:
        pipe: a diffusers pipeline that makes videos or images from a prompt.
        prompts: the prompts.
        attentions: those of this pipeline.
        seeds: the number of samples for each prompt, from noise of the seeds 0, 1, ...
        arguments: more arguments of the pipeline's call.

    Returns:
        By attention, means over samples: `psnr` in dB and `ssim` (Wang et al., 2004), compared with the sample in original
        attention, with standard errors; for videos `motion`, the change between frames as a share of the original's.
    """
    check_installed()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in attentions.names}
    for prompt in prompts:
        for seed in range(seeds):
            reference: Any = None
            for name in attentions.names:
                with attentions.in_force(name):
                    # On the CPU: the same noise on every machine.
                    generator = torch.Generator().manual_seed(seed)
                    video = _frames(pipe(prompt=prompt, generator=generator, output_type="np", **arguments))
                reference = video if name == ORIGINAL else reference
                values = {} if name == ORIGINAL else {"psnr": psnr(video, reference), "ssim": ssim(video, reference)}
                if len(video) > 1:
                    values["motion"] = motion(torch.from_numpy(video)[None])[0]
                for key, value in values.items():
                    found[name].setdefault(key, []).append(value)
    report: dict[str, dict[str, float]] = {}
    for name, samples in found.items():
        report[name] = {}
        for key, of_samples in samples.items():
            if key == "motion":
                moved = sum(found[ORIGINAL]["motion"])
                report[name]["motion"] = sum(of_samples) / moved if moved else math.nan
            else:
                report[name] |= _mean(key, of_samples)
    return QualityReport(measured_on=f"{len(prompts)} prompts x {seeds} samples", attentions=report)


def _frames(output: Any) -> Any:
    """A pipeline's output, float [frames, height, width, 3] in [0, 1]; an image is one frame."""
    if (frames := getattr(output, "frames", None)) is not None:
        return frames[0]
    if (images := getattr(output, "images", None)) is not None:
        return images[:1]
    raise ValueError(f"evaluate: expected a pipeline that makes videos or images, got {type(output).__name__}")


def _mean(name: str, values: Sequence[float], *, with_error: bool = True) -> dict[str, float]:
    """The mean, and its standard error if there are several values."""
    mean = sum(values) / len(values)
    if not with_error or len(values) < 2:
        return {name: mean}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {name: mean, f"{name}_se": math.sqrt(variance / len(values))}


def _cell(row: dict[str, float], column: str) -> str:
    if column not in row:
        return ""
    error = row.get(f"{column}_se")
    return f"{row[column]:.4g}" if error is None else f"{row[column]:.4g} ± {error:.1g}"
