"""Measures on real inputs which layers lose most in 4-bit attention, as a table and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qat_kernels import attention
from qat_patch.layer import AttentionCall, AttentionLayer

from .calibrate import LimitCounts, Limits, count_limits, run_observed

_TENSORS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The error of 4-bit attention in one module."""

    name: str
    error: float
    """Relative L2 error of its output against original attention on the same queries, keys and values."""
    query: Limits
    key: Limits
    value: Limits
    """The shares that NVFP4 cannot hold; zeros for tensors that are not quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """The result of `sensitivity`. `print(report)` is a table, `report.plot(file)` draws a picture."""

    layers: tuple[LayerSensitivity, ...]
    """In the order of the model."""

    def __str__(self) -> str:
        width = max(len("module"), *(len(layer.name) for layer in self.layers))
        shares = "  ".join(f"{name[0].upper()} {what:9}" for name in _TENSORS for what in ("flushed", "saturated"))
        lines = [f"{'module':{width}}  rel. error  {shares}"]
        for layer in self.layers:
            limits = [getattr(layer, name) for name in _TENSORS]
            shares = "  ".join(f"{share:11.2%}" for limit in limits for share in (limit.flushed, limit.saturated))
            lines.append(f"{layer.name:{width}}  {layer.error:10.4f}  {shares}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def plot(self, file: str | Path) -> None:
        """Draw the error and the flushed and saturated shares of each layer to a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        names = [layer.name for layer in self.layers]
        figure = Figure(figsize=(9, 1.5 + 0.22 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, [layer.error for layer in self.layers], color="tab:blue")
        left.set_xlabel("relative L2 error of the output")
        left.invert_yaxis()
        height = 0.8 / (2 * len(_TENSORS))
        bars = [(name, what) for name in _TENSORS for what in ("flushed", "saturated")]
        for number, (name, what) in enumerate(bars):
            shares = [100 * getattr(getattr(layer, name), what) for layer in self.layers]
            right.barh(
                [index - 0.4 + (number + 0.5) * height for index in range(len(names))],
                shares,
                height=height,
                label=f"{name} {what}",
            )
        right.set_xlabel("share of the values, %")
        right.legend(fontsize="small")
        figure.savefig(file)


def sensitivity(model: Any, batches: Iterable[Any]) -> SensitivityReport:
    """Compare 4-bit with original attention, module by module, on real inputs.

    The model runs its original attention, so the error of one module does not reach the next. Each patched module is measured
    with its own QuantSpec and shifts. Queries of padding do not count.

    Args:
        model: a patched model, a wrapper around one, or a patched Diffusers pipeline.
        batches: as for `calibrate`.

    Raises:
        ValueError: the model is not patched, there are no batches, or a patched module was never called.
    """
    errors: dict[str, list[torch.Tensor]] = {}
    counts: dict[str, dict[str, LimitCounts]] = {}

    def observe(name: str, layer: AttentionLayer, call: AttentionCall) -> None:
        squares = _squares(layer, call)
        errors[name] = [a + b for a, b in zip(errors[name], squares, strict=True)] if name in errors else [*squares]
        counts[name] = count_limits(counts.get(name), layer, call)

    handle = run_observed("sensitivity", model, batches, observe)
    return SensitivityReport(
        layers=tuple(
            LayerSensitivity(
                name=name,
                error=(errors[name][0] / errors[name][1]).sqrt().item(),
                **{which: count.result() for which, count in counts[name].items()},
            )
            for name in handle.patched
        )
    )


def _squares(layer: AttentionLayer, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms of the error and of the original output, over the queries that are not padding."""
    ours = attention(
        call.query,
        call.key,
        call.value,
        spec=layer.spec,
        causal=call.causal,
        scale=call.scale,
        key_mask=call.key_mask,
        **layer.shifts_on(call.key.device),
        window=call.window,
        bounds=call.bounds,
        softcap=call.softcap,
        sinks=call.sinks,
    ).double()
    original = call.out.double()
    if (mask := call.query_mask) is not None:
        ours, original = (torch.where(mask[:, None, :, None], x, 0.0) for x in (ours, original))
    return (ours - original).square().sum(), original.square().sum()
