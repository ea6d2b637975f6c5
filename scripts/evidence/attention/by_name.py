"""The attentions that experiments compare, by name, in a model of Transformers or Diffusers.

| name | attention |
|---|---|
| `original` | the model's own |
| `nvfp4`, `pv_bf16` | docs/NUMERICS.md, with V and P in NVFP4 or not, as `patch_model` puts it in force |
| `nvfp4+rotate+k_shift` | the same with options: `rotate`, `four_over_six`, `k_shift`, `q_shift` |
| `nvfp4+rotate/without_2` | the same, but the two modules that lose most (`qat_patch.sensitivity`) keep their own |
| `preset=kv_nvfp4`, ... | a preset of `QuantSpec`, likewise |
| `sage3`, `d_from_o`, ... | a baseline of `scripts.evidence.attention.baselines`, through the host's own seams |
| `definition+rotate+q_shift` | the baseline `definition`, likewise; means of Q are of query heads; in Transformers |
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, get_args

import torch

import qat_patch
from qat_kernels import QuantSpec
from qat_kernels.spec import Preset
from qat_patch import AttnQATConfig
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_patch.hosts.transformers import adapter as transformers_adapter
from qat_patch.hosts.transformers import masks
from qat_patch.layer import SHIFTS, AttentionCall, AttentionLayer, under_autocast
from scripts.evidence.attention import dense
from scripts.evidence.attention.baseline_attention import baseline_attention
from scripts.evidence.attention.baselines import BASELINES, Baseline

_SPECS = {"nvfp4": QuantSpec(), "pv_bf16": QuantSpec(preset="nvfp4_qk")}
_SPECS |= {f"preset={name}": QuantSpec(preset=name) for name in get_args(Preset) if name not in ("nvfp4", "nvfp4_qk")}
_OPTIONS = ("rotate", "four_over_six", *SHIFTS)
_WITHOUT = "/without_"
_OF_BASELINE = (*_OPTIONS, "q_shift_by_block")
"""`q_shift` is the mean of all queries of a head in the calibration, `q_shift_by_block` that of each block of 128 positions. Both
are the same for every text, so that attention stays causal."""
_DISPATCH = "dispatch_attention_fn"
Means = dict[torch.nn.Module, dict[str, torch.Tensor]]
"""For attention modules: `k_shift` and `q_means` of `baseline_attention`."""


class Handle(Protocol):
    """An attention in force; `qat_patch.PatchHandle` is one."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model runs its original attention. Run a checkpointed backward inside too."""


@contextlib.contextmanager
def attention_in(model: torch.nn.Module, name: str, calibration: Iterable[Any] = ()) -> Iterator[Handle]:
    """Inside, the model runs the attention of that name; afterwards its own again.

    Args:
        model: a model of Transformers or Diffusers, or a wrapper around one (PEFT, DDP), that is not patched.
        name: see above.
        calibration: for shifts, and to find the modules that lose most: batches that the model is called with, as
            `qat_patch.calibrate` takes them.

    Raises:
        ValueError: no such name, an option without effect, or shifts without batches.
    """
    check_name(name)
    if name == "original":
        yield _Baselines([])
    elif name in BASELINES:
        baselines = _Baselines(_replacements(model, name))
        with baselines.in_force():
            yield baselines
    elif name.startswith("definition+"):
        with _in_transformers_with_means(model, name, calibration) as baselines:
            yield baselines
    else:
        name, _, number = name.partition(_WITHOUT)
        left_out: tuple[str, ...] = ()
        if number:
            calibration = list(calibration)
            with attention_in(model, name, calibration):
                layers = qat_patch.sensitivity(model, calibration).layers
                left_out = tuple(layer.name for layer in sorted(layers, key=lambda layer: -layer.error)[: int(number)])
        spec, shifts = _options_of(name)
        with qat_patch.patch_model(model, AttnQATConfig(spec=spec, exclude=left_out)) as handle:
            if shifts:
                qat_patch.calibrate(model, calibration, shifts=shifts)
            yield handle


def check_name(name: str) -> None:
    """Raise a ValueError unless there is such an attention."""
    if name.startswith("definition+"):
        _options_of_baseline(name)
    elif name != "original" and name not in BASELINES:
        base, _, number = name.partition(_WITHOUT)
        if _WITHOUT in name and not number.isdecimal():
            raise ValueError(f"attention: expected a number of modules after {_WITHOUT}, got {name!r}")
        _options_of(base)


def _options_of_baseline(name: str) -> list[str]:
    options = name.split("+")[1:]
    both = {"q_shift", "q_shift_by_block"} <= set(options)
    if both or not set(options) <= set(_OF_BASELINE) or len(set(options)) < len(options):
        raise ValueError(f"attention: expected definition with any of +{' +'.join(_OF_BASELINE)}; got {name!r}")
    return options


def _options_of(name: str) -> tuple[QuantSpec, list[str]]:
    """The spec of a name, and which shifts are calibrated."""
    base, *options = name.split("+")
    if base not in _SPECS or not set(options) <= set(_OPTIONS) or len(set(options)) < len(options):
        known = ", ".join(["original", *_SPECS, *BASELINES])
        raise ValueError(
            f"attention: expected one of {known}, nvfp4 and pv_bf16 with any of +{' +'.join(_OPTIONS)}; got {name!r}"
        )
    chosen = {option: True for option in options if option not in SHIFTS}
    return dataclasses.replace(_SPECS[base], **chosen), [option for option in options if option in SHIFTS]


class _Baselines:
    """Pairs of calls that put a baseline in force and take it out again; without any, the model's own attention."""

    def __init__(self, replacements: list[tuple[Any, Any]]) -> None:
        self.replacements = replacements
        self.active = False

    @contextlib.contextmanager
    def in_force(self, yes: bool = True) -> Iterator[None]:
        before = self.active
        try:
            self._switch(yes)
            yield
        finally:
            self._switch(before)

    def disabled(self) -> AbstractContextManager[None]:
        return self.in_force(False)

    def _switch(self, yes: bool) -> None:
        if yes != self.active:
            self.active = yes
            for put, take in self.replacements:
                (put if yes else take)()


def _replacements(model: torch.nn.Module, name: str) -> list[tuple[Any, Any]]:
    for module in model.modules():
        if transformers_adapter.owns(module):
            return [_in_transformers(module, name, BASELINES[name])]
        if diffusers_adapter.owns(module):
            return [_in_diffusers(attention, BASELINES[name]) for attention in _attention_modules(module)]
    raise ValueError(f"attention: expected a model of transformers or diffusers, got {type(model).__name__}")


@contextlib.contextmanager
def _in_transformers_with_means(model: torch.nn.Module, name: str, calibration: Iterable[Any]) -> Iterator[_Baselines]:
    """The definition with options, and with means of Q and K that are measured first."""
    options = _options_of_baseline(name)
    owner = next((module for module in model.modules() if transformers_adapter.owns(module)), None)
    if owner is None:
        raise ValueError(f"attention {name!r}: expected a model of transformers, got {type(model).__name__}")
    sums: dict[str, list[torch.Tensor]] = {}

    def observe(layer: AttentionLayer, call: AttentionCall) -> None:
        query, key = call.query.float(), call.key.float()
        of_q = dense.block_means(query) if "q_shift_by_block" in options else query.mean(2, keepdim=True)
        found = [torch.ones(()), key.mean((0, 2)), of_q.mean(0)]
        sums[layer.name] = [a + b for a, b in zip(sums.get(layer.name, [torch.zeros(())] * 3), found, strict=True)]

    with qat_patch.patch_model(model) as handle, handle.observed(observe), torch.no_grad():
        for batch in calibration:
            model(**batch)
    if not sums:
        raise ValueError(f"attention {name!r}: expected batches to calibrate with, got none")
    means: Means = {}
    for layer, (number, k_shift, q_means) in sums.items():
        chosen = {"k_shift": k_shift} if "k_shift" in options else {}
        if {"q_shift", "q_shift_by_block"} & set(options):
            chosen["q_means"] = q_means
        means[owner.get_submodule(layer)] = {which: x / number for which, x in chosen.items()}
    baseline = Baseline(rotate="rotate" in options, four_over_six="four_over_six" in options)
    baselines = _Baselines([_in_transformers(owner, name, baseline, means)])
    with baselines.in_force():
        yield baselines


def _in_transformers(model: torch.nn.Module, name: str, baseline: Baseline, means: Means | None = None) -> tuple[Any, Any]:
    """A name in transformers' registries. The function for it keeps the means of modules, if there are any."""
    from transformers import AttentionInterface, AttentionMaskInterface

    registered = f"baseline_{name}"
    AttentionInterface.register(registered, functools.partial(_transformers_forward, baseline, means or {}))
    AttentionMaskInterface.register(registered, masks.make_mask)
    original = transformers_adapter.original(model, model)
    return functools.partial(model.set_attn_implementation, registered), functools.partial(
        model.set_attn_implementation, original
    )


def _transformers_forward(
    baseline: Baseline,
    means: Means,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, causal: [B, H, Lq, D] and [B, Hk, Lk, D] -> [B, Lq, H, D]."""
    causal = masks.read(attention_mask, query.shape[2], key.shape[2], from_the_first=True)
    filled, key_mask = causal.filled, causal.key_mask
    packed = causal.documents is not None or [
        name for name in kwargs if name.startswith("cu_seq_lens") and kwargs[name] is not None
    ]
    if dropout or kwargs.get("sliding_window") or causal.window or packed or not module.is_causal:
        raise ValueError(
            "baselines in Transformers: expected causal attention without dropout, windows or packed samples, and no mask or "
            "bool [batch, 1, 1, keys] for padding"
        )
    query, key, value = under_autocast(query, key[:, :, :filled], value[:, :, :filled])
    options = {"causal": True, "scale": scaling, "key_mask": key_mask} | means.get(module, {})
    out = baseline_attention(query, key, value, baseline=baseline, **options)
    return out.transpose(1, 2).contiguous(), None


def _attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    modules = diffusers_adapter.attention_modules(model).values()
    return [module for module in modules if diffusers_adapter.reason_to_skip(module) is None]


def _in_diffusers(module: torch.nn.Module, baseline: Baseline) -> tuple[Any, Any]:
    """A processor of the module's own: the stock one's code, for which the dispatcher is another function."""
    stock = module.processor
    call = inspect.unwrap(type(stock).__call__)
    namespace = call.__globals__ | {_DISPATCH: functools.partial(_diffusers_forward, baseline)}
    replaced = types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)
    replaced.__kwdefaults__ = call.__kwdefaults__
    processor = object.__new__(type(f"Baseline{type(stock).__name__}", (type(stock),), {"__call__": replaced}))
    processor.__dict__.update(stock.__dict__)
    return functools.partial(setattr, module, "processor", processor), functools.partial(setattr, module, "processor", stock)


def _diffusers_forward(
    baseline: Baseline,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # told by the shapes
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,  # this is it
    parallel_config: Any = None,
) -> torch.Tensor:
    """diffusers' dispatcher: query [B, Lq, H, D], key and value [B, Lk, Hk, D] -> [B, Lq, H, D]."""
    if dropout_p or attention_kwargs or parallel_config is not None:
        raise ValueError("baselines in Diffusers: expected attention without dropout, extra arguments or context parallelism")
    query, key, value = (x.transpose(1, 2) for x in under_autocast(query, key, value))
    options = {"causal": is_causal, "scale": scale, "key_mask": _key_mask(attn_mask)}
    return baseline_attention(query, key, value, baseline=baseline, **options).transpose(1, 2)


def _key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, keys] of a mask that is the same for all heads and queries."""
    if mask is None:
        return None
    rows = mask[:, None, None] if mask.ndim == 2 else mask
    if rows.dtype != torch.bool or rows.ndim != 4 or rows.shape[1:3] != (1, 1):
        raise ValueError(
            f"baselines: expected no mask, or bool [batch, 1, 1, keys] for padding, got {mask.dtype} {tuple(mask.shape)}"
        )
    return rows[:, 0, 0]
