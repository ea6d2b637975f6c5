"""Measure on real inputs: the mean keys for `k_shift`, and the values that NVFP4 flushes to zero or saturates."""

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
from qat_patch.layer import AttentionCall, AttentionLayer
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


def calibrate(model: Any, batches: Iterable[Any], *, exclude: Sequence[str] = ()) -> dict[str, dict[str, Limits]]:
    """Measure `k_shift`, the mean key of each key head as attention sees it, and apply it.

    The mean is over all visible keys of all batches, in float32; with rotary positions it is taken after the rotation. Padding
    does not count. The model runs its original attention, without gradients and in evaluation mode. Only
    `get_handle(model).k_shift` changes: it holds the result. With several processes (torch.distributed) each passes its own
    batches, the same number of them, and all get the same shifts.

    Args:
        model: a patched model, a wrapper around one, or a patched Diffusers pipeline.
        batches: arguments of model calls: mappings of keyword arguments, sequences of positional ones, or tensors. A few
            batches of real data are enough: the mean hardly depends on their number.
        exclude: patterns of patched modules whose shift stays as it is, such as `("*.attn2",)` of Wan's image to video: they
            attend to the keys of the text and of the image, whose means differ, but a module has one shift.

    Returns:
        For each measured module, and for `query`, `key` and `value`: how much NVFP4 cannot hold (keys without the new shift, as
        they were quantized before).

    Raises:
        ValueError: the model is not patched or lost its patch, there are no batches, a patched module was never called, a module
            attends to several sets of keys in one call, or a pattern matches nothing. The shifts do not change then.
    """
    means: dict[str, _Mean] = {}
    counts: dict[str, dict[str, LimitCounts]] = {}
    keys_of_call: dict[str, torch.Tensor] = {}

    def observe(name: str, layer: AttentionLayer, call: AttentionCall) -> None:
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return
        if call.softcap is not None or call.sinks is not None:
            what = "a soft cap of the scores" if call.softcap is not None else "attention sinks"
            raise ValueError(
                f"calibrate: {name} has {what}, which sees what a K shift adds to all scores of a row; expected modules without: "
                f"exclude it, with exclude=[{name!r}]"
            )
        if not call.causal and call.bounds is None:
            _check_one_set_of_keys(name, keys_of_call.setdefault(name, call.key), call.key)
        means.setdefault(name, _Mean()).add(call)
        counts[name] = count_limits(counts.get(name), layer, call)

    handle = _handle_in_force("calibrate", model)
    for name, layer in handle.patched.items():
        if not layer.spec.rules.options:
            raise ValueError(
                f"calibrate: {name} has preset={layer.spec.preset!r}, whose servers subtract no K shift: there is nothing to "
                "calibrate; expected nvfp4 or nvfp4_qk"
            )
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in handle.patched):
            raise ValueError(
                f"calibrate: exclude: the pattern {pattern!r} matches no patched module; there are {', '.join(handle.patched)}"
            )
    run_observed("calibrate", model, batches, observe, begin=lambda name: keys_of_call.pop(name, None))
    for name, layer in handle.patched.items():
        if name in means:
            layer.k_shift = means[name].result()
    return {name: {which: count.result() for which, count in of_layer.items()} for name, of_layer in counts.items()}


def _check_one_set_of_keys(name: str, first: torch.Tensor, key: torch.Tensor) -> None:
    """Raise a ValueError if a module attends to different keys within one call."""
    length = min(first.shape[2], key.shape[2])
    if first is not key and not torch.equal(first[:, :, :length], key[:, :, :length]):
        raise ValueError(
            f"calibrate: {name} attends to several sets of keys in one call (such as those of a text and of an image): expected "
            "one, for a module has one K shift, and the mean over all of them fits none; leave such modules without a shift: "
            f"calibrate(model, batches, exclude=['*.{name.rpartition('.')[2]}'])"
        )


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
    """The running mean of keys, by key head."""

    def __init__(self) -> None:
        self.total: Any = 0.0  # float64 [key heads, head_dim] after the first call
        self.count: Any = 0.0

    def add(self, call: AttentionCall) -> None:
        key, mask = call.key.float(), call.key_mask
        count = torch.tensor(key.shape[0] * key.shape[2], device=key.device)
        if mask is not None:
            key, count = torch.where(mask[:, None, :, None], key, 0.0), mask.sum()
        self.total = self.total + key.sum((0, 2)).double()
        self.count = self.count + count.double()

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
    if (shift := layer.shift_on(key.device)) is not None:
        key = key - shift[:, None]
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
