"""Measure on real inputs: the means for `k_shift` and `q_shift`, and the values that NVFP4 flushes to zero or saturates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist

from qat_kernels.reference import rotated
from qat_kernels.smoothing import smooth
from qat_kernels.spec import E2M1_MAX, E4M3_MAX, GROUP_SIZE, NVFP4Format
from qat_patch.handle import PatchHandle
from qat_patch.layer import SHIFTS, AttentionCall, AttentionLayer
from qat_patch.patch import get_handle

FLUSHED_AT = {"divide": 2.0**-11, "reciprocal": E2M1_MAX * 2.0**-10}
"""For each rule of the scale: a group whose largest magnitude is at most this is rounded to zero (docs/NUMERICS.md, sections 1
and 9). Without a smallest scale, half of the smallest E4M3 value gives a scale of zero."""
SATURATED_ABOVE = E2M1_MAX * E4M3_MAX
"""Larger magnitudes saturate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The shares of a tensor's values that NVFP4 cannot hold; both are 0 in a healthy layer."""

    flushed: float
    """The share of nonzero values in groups that are rounded to zero."""
    saturated: float
    """The share of values beyond the largest that NVFP4 holds."""


def calibrate(
    model: Any, batches: Iterable[Any], *, exclude: Sequence[str] = (), shifts: Sequence[str] = tuple(SHIFTS)
) -> dict[str, dict[str, Limits]]:
    """Measure the means of K and Q as attention sees them, and apply them: `k_shift` and `q_shift` of each key head.

    `k_shift` is the mean of all visible keys of all batches, and `q_shift` that of all queries of the query heads that share the
    key head, in float32; with rotary positions they are taken after the rotation. Padding does not count. The model runs its
    original attention, without gradients and in evaluation mode. Only `get_handle(model).k_shift` and `.q_shift` change: they
    hold the result. With several processes (torch.distributed) each passes its own batches, the same number of them, and all get
    the same shifts.

    Two kinds of modules get a Q shift only: those with a soft cap or sinks, which see what a K shift adds to all scores of a row;
    and those that attend to several sets of keys in one call, such as the text and the image in `attn2` of Wan's image to video,
    because a module has one K shift, and the mean over all of them fits none.

    Args:
        model: a patched model, a wrapper around one, or a patched Diffusers pipeline.
        batches: arguments of model calls: mappings of keyword arguments, sequences of positional ones, or tensors. A few
            batches of real data are enough: the means hardly depend on their number.
        exclude: patterns of patched modules whose shifts stay as they are.
        shifts: what to measure; the other shift of a module stays as it is.

    Returns:
        For each measured module, and for `query`, `key` and `value`: how much NVFP4 cannot hold (without the new shifts, as they
        were quantized before).

    Raises:
        ValueError: the model is not patched or lost its patch, there are no batches, a patched module was never called, a module
            can have a Q shift only and `shifts` asks for K shifts only or holds another name, or a pattern matches nothing. The
            shifts do not change then.
    """
    means: dict[str, dict[str, _Mean]] = {}
    counts: dict[str, dict[str, LimitCounts]] = {}
    keys_of_call: dict[str, torch.Tensor] = {}
    without_k_shift: set[str] = set()

    def observe(name: str, layer: AttentionLayer, call: AttentionCall) -> None:
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return
        if "k_shift" in shifts and (reason := _why_no_k_shift(name, call, keys_of_call)) is not None:
            if "q_shift" not in shifts:
                such = f"*.{name.rpartition('.')[2]}"
                raise ValueError(
                    f"calibrate: {name} {reason}; expected modules without: exclude such modules, with exclude=[{such!r}], or "
                    "measure Q shifts too, which they can have"
                )
            without_k_shift.add(name)
        of_module = means.setdefault(name, {which: _Mean() for which in shifts})
        for which, mean in of_module.items():
            x, mask = (call.key, call.key_mask) if which == "k_shift" else (call.query, call.query_mask)
            mean.add(x, mask, call.key.shape[1])
        counts[name] = count_limits(counts.get(name), layer, call)

    handle = _handle_in_force("calibrate", model)
    if isinstance(shifts, str) or not shifts or not SHIFTS.keys() >= {*shifts}:
        raise ValueError(f"calibrate: shifts: expected some of {', '.join(SHIFTS)}, got {shifts!r}")
    for name, layer in handle.patched.items():
        if not layer.spec.rules.options:
            raise ValueError(
                f"calibrate: {name} has preset={layer.spec.preset!r}, whose servers subtract no shifts: there is nothing to "
                "calibrate; expected nvfp4 or nvfp4_qk"
            )
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in handle.patched):
            raise ValueError(
                f"calibrate: exclude: the pattern {pattern!r} matches no patched module; there are {', '.join(handle.patched)}"
            )
    run_observed("calibrate", model, batches, observe, begin=lambda name: keys_of_call.pop(name, None))
    # Processes take part in every sum, in the same order, whatever each of them reached first and found.
    measured = [name for name in handle.patched if name in means]
    for name, without in zip(measured, _in_any_process([name in without_k_shift for name in measured], means), strict=True):
        for which, mean in means[name].items():
            shift = mean.result()
            if which != "k_shift" or not without:
                setattr(handle.patched[name], which, shift)
    return {name: {which: count.result() for which, count in of_layer.items()} for name, of_layer in counts.items()}


def _why_no_k_shift(name: str, call: AttentionCall, keys_of_call: dict[str, torch.Tensor]) -> str | None:
    """Why a module can have no K shift, or None. `keys_of_call`: the first keys in the present call of each module."""
    if call.softcap is not None or call.sinks is not None:
        what = "a soft cap of the scores" if call.softcap is not None else "attention sinks"
        return f"has {what}, which sees what a K shift adds to all scores of a row"
    if call.causal or call.bounds is not None:
        return None
    first, key = keys_of_call.setdefault(name, call.key), call.key
    length = min(first.shape[2], key.shape[2])
    if first is key or torch.equal(first[:, :, :length], key[:, :, :length]):
        return None
    return (
        "attends to several sets of keys in one call (such as those of a text and of an image), but a module has one K shift, "
        "and the mean over all of them fits none"
    )


def _in_any_process(flags: list[bool], means: dict[str, dict[str, _Mean]]) -> list[bool]:
    """Which flags are set in some process of torch.distributed."""
    if not (flags and dist.is_available() and dist.is_initialized()):
        return flags
    device = next(mean.total.device for of_module in means.values() for mean in of_module.values())
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def _handle_in_force(what: str, model: Any) -> PatchHandle:
    handle = get_handle(model)
    if handle is None:
        raise ValueError(f"{what}: the model is not patched; call patch_model first, which says what is to be quantized")
    handle.check_in_force(what)
    return handle


def run_observed(
    what: str, model: Any, batches: Iterable[Any], observe: Any, begin: Callable[[str], Any] | None = None
) -> PatchHandle:
    """Run the batches through original attention, with `observe(name, layer, call)` for every call of a patched module's
    attention, and `begin(name)` when a call of the module begins.

    Raises:
        ValueError: as `calibrate`.
    """
    handle = _handle_in_force(what, model)
    names = {layer: name for name, layer in handle.patched.items()}
    seen, number = set(), 0

    def observer(layer: AttentionLayer, call: AttentionCall) -> None:
        seen.add(layer)
        observe(names[layer], layer, call)

    hooks = []
    if begin is not None:
        for prefix, plan in handle.plans.items():
            for layer in plan.patched:
                start = functools.partial(_begin, begin, prefix + layer.name)
                hooks.append(plan.model.get_submodule(layer.name).register_forward_pre_hook(start))
    modules = [module for part in handle.models for module in part.modules()]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad(), handle.observed(observer):
            for batch in batches:
                _call(model, batch)
                number += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in zip(modules, training, strict=True):
            module.training = was
    if not number:
        raise ValueError(f"{what}: expected at least one batch, got none")
    if missing := [name for layer, name in names.items() if layer not in seen]:
        raise ValueError(
            f"{what}: these batches never reached {len(missing)} of {len(names)} patched modules, such as {missing[0]}; pass "
            "batches that do, or exclude those modules from the patch"
        )
    return handle


def _begin(begin: Callable[[str], Any], name: str, *_: Any) -> None:
    begin(name)


def _call(model: Any, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


class _Mean:
    """The running mean of keys or queries, by key head."""

    def __init__(self) -> None:
        self.total: Any = 0.0  # float64 [key heads, head_dim] after the first call
        self.count: Any = 0.0

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, key_heads: int) -> None:
        """Add x [batch, heads, tokens, head_dim], without those where mask [batch, tokens] is False."""
        x, shared_by = x.float(), x.shape[1] // key_heads
        count = torch.tensor(x.shape[0] * x.shape[2], device=x.device)
        if mask is not None:
            x, count = torch.where(mask[:, None, :, None], x, 0.0), mask.sum()
        self.total = self.total + x.sum((0, 2)).double().unflatten(0, (key_heads, -1)).sum(1)
        self.count = self.count + count.double() * shared_by

    def result(self) -> torch.Tensor:
        sums = torch.cat([self.total.flatten(), self.count.flatten()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        return (sums[:-1] / sums[-1].clamp(min=1)).view_as(self.total).float()


@dataclasses.dataclass
class LimitCounts:
    """Running counts behind `Limits`."""

    flushed: torch.Tensor | int = 0
    saturated: torch.Tensor | int = 0
    values: torch.Tensor | int = 0

    def add(self, groups: torch.Tensor, values: torch.Tensor | int, how: NVFP4Format) -> None:
        """Add groups of values [..., 16]; `values` of them count, the others are zero."""
        magnitude = groups.abs()
        flushed = magnitude.amax(-1, keepdim=True) <= FLUSHED_AT[how.scale]
        self.flushed = self.flushed + (flushed & (magnitude > 0)).sum()
        self.saturated = self.saturated + (magnitude > SATURATED_ABOVE).sum()
        self.values = self.values + values

    def result(self) -> Limits:
        values = max(1, int(self.values))
        return Limits(flushed=int(self.flushed) / values, saturated=int(self.saturated) / values)


def count_limits(counts: dict[str, LimitCounts] | None, layer: AttentionLayer, call: AttentionCall) -> dict[str, LimitCounts]:
    """Add one call to the counts of each tensor, with Q, K and V as the quantization gets them (docs/NUMERICS.md, section 6)."""
    counts = counts or {"query": LimitCounts(), "key": LimitCounts(), "value": LimitCounts()}
    query, key, value, mask, formats = call.query, call.key, call.value.float(), call.key_mask, layer.spec.formats
    if formats.smooth is not None:
        query, key = smooth(query, key)[:2]
    query, key = query.float(), key.float()
    shifts = layer.shifts_on(key.device)
    if "k_shift" in shifts:
        key = key - shifts["k_shift"][:, None]
    if "q_shift" in shifts:
        query = query - shifts["q_shift"].repeat_interleave(query.shape[1] // key.shape[1], 0)[:, None]
    query, key = rotated(query, layer.spec), rotated(key, layer.spec)
    seen: int | torch.Tensor = key.numel()
    if mask is not None:
        key, value = (torch.where(mask[:, None, :, None], x, 0.0) for x in (key, value))
        seen = mask.sum() * (key.numel() // mask.numel())
    for which, x, number in (("query", query, query.numel()), ("key", key, seen), ("value", value, seen)):
        how = getattr(formats, which)
        if isinstance(how, NVFP4Format):
            groups = _token_groups(x, mask) if how.axis == "keys" else x.unflatten(-1, (-1, GROUP_SIZE))
            counts[which].add(groups, number, how)
    return counts


def _token_groups(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Groups along tokens, counted from the first allowed key: [B, Hk, D, groups, 16]."""
    if mask is not None:
        order = (torch.arange(mask.shape[1], device=mask.device) + mask.int().argmax(1, keepdim=True)) % mask.shape[1]
        value = value.gather(2, order[:, None, :, None].expand_as(value))
    value = torch.nn.functional.pad(value, (0, 0, 0, -value.shape[2] % GROUP_SIZE))
    return value.mT.unflatten(-1, (-1, GROUP_SIZE))
