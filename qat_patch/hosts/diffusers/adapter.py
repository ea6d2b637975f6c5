"""Diffusers: 4-bit attention behind the attention dispatcher, for each module separately.

A processor ends in `dispatch_attention_fn(..., backend=self._attention_backend)`. Each patched module gets a copy of its stock
processor whose `_attention_backend` is the module's `AttentionLayer`; restore puts the stock object back. The dispatcher that the
processor's code calls is wrapped once: a call with a layer runs 4-bit attention, any other call runs as before. So no processor
code is repeated, other models in the process keep their attention, and there is no state. The layer is passed as an argument,
because torch.compile allows no side effects inside a checkpointed block, and because blocks that differ only in a layer's values
then share one compiled graph. The layer is also the `_parallel_config` of the copy, for processors that pass `backend=None`.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch

from qat_kernels import QuantSpec, attention
from qat_patch.config import spec_problem
from qat_patch.layer import AttentionCall, AttentionLayer, under_autocast
from qat_patch.metadata import RECORD, AttentionMetadata, in_config, without_entries

from . import context_parallel, listeners, masks, processor_code
from .masks import refuse_call
from .patched_processor import PREFIX, Patched, Refusal, patched_class

if TYPE_CHECKING:
    from collections.abc import Callable

MECHANISM = "diffusers' attention dispatcher"
REPLACED_BY = "set_processor"
CAUSAL = False
_BACKEND_METHODS = ("set_attention_backend", "reset_attention_backend")


def owns(model: object) -> bool:
    """Whether this is a model of diffusers. This does not import diffusers."""
    return _is_a(model, "ModelMixin")


def pipeline_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """The transformers of a diffusers pipeline by component name; empty for anything else.

    Some have several: `transformer_2` of Wan 2.2, `transformer_ref` of MiniMax-H3, `unconditional_transformer` of Ideogram 4.
    """
    return {name: model for name, model in _components(pipeline).items() if "transformer" in name}


def other_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """Other models of a pipeline that could be patched, such as a ControlNet, by component name."""
    others = {name: model for name, model in _components(pipeline).items() if "transformer" not in name and owns(model)}
    return {
        name: model
        for name, model in others.items()
        if any(reason_to_skip(module) is None for module in attention_modules(model).values())
    }


def _components(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline (ordinary or modular), by name."""
    if not (_is_a(pipeline, "DiffusionPipeline") or _is_a(pipeline, "ModularPipeline")):
        return {}
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, torch.nn.Module)}


def stored_metadata(model: Any) -> AttentionMetadata | None:
    """The metadata of an export of this package, in the model's config or beside it."""
    if isinstance(record := getattr(model, RECORD, None), AttentionMetadata):
        return record
    metadata = in_config("diffusers", model.config)
    return AttentionMetadata.from_dict(metadata) if AttentionMetadata.is_ours(metadata) else None


def attention_modules(model: Any) -> dict[str, torch.nn.Module]:
    """The modules that leave attention to a processor object, by name."""
    return {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}


def original(model: Any, module: Any) -> Any:
    """The stock processor object.

    Raises:
        ValueError: it is one of ours, although the model is not patched.
    """
    if isinstance(module.processor, Patched):
        raise ValueError(
            f"patch_model: a processor of this {type(model).__name__} belongs to a patched model (set by hand, or the model is "
            "part of a patched one); set a stock processor, or patch the outer model"
        )
    return module.processor


def reason_to_skip(module: Any) -> str | None:
    """Why a module keeps its original attention, in cases that are not a mistake of the user."""
    return processor_code.reason_to_skip(type(module.processor), MECHANISM)


def problem(module: Any, spec: QuantSpec) -> str | None:
    """Why 4-bit attention cannot compute what this module needs."""
    return spec_problem(spec, _head_dim(module), causal=False, grouped=False)


def prepare(original: Any) -> None:
    """Nothing to do: unpickling a patched processor wraps its dispatcher."""


def key_shape(module: Any) -> tuple[int, int] | None:
    """Key heads and head dim, as far as the module says."""
    head_dim, out_features = _head_dim(module), getattr(getattr(module, "to_k", None), "out_features", None)
    if head_dim is None or not isinstance(out_features, int):
        return None
    return out_features // head_dim, head_dim


def apply(model: Any, layers: list[AttentionLayer]) -> None:
    """Switch the model to 4-bit attention."""
    switch(model, layers)
    name = next(layer.name for layer in layers if layer.is_patched)
    for method in _BACKEND_METHODS:
        setattr(model, method, Refusal(name))


def switch(model: Any, layers: list[AttentionLayer]) -> None:
    """Give each module the processor that its layer asks for now. A processor that other code has set stays."""
    for layer in layers:
        module = model.get_submodule(layer.name)
        if replaced(module, layer) is None:
            runs = layer.quantizes or layer.observer is not None
            module.processor = _patched(layer.original, layer) if runs else layer.original


def new_cache(model: Any, layers: list[AttentionLayer]) -> Any:
    """Always raises: denoising keeps no keys and values between steps."""
    raise ValueError("cache: a diffusers model generates without a cache of keys and values; this is for language models")


def generating(model: Any, layers: list[AttentionLayer]) -> Any:
    """As above."""
    return new_cache(model, layers)


def restore(model: Any, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, even an unfinished one."""
    for method in _BACKEND_METHODS:
        if isinstance(vars(model).get(method), Refusal):
            delattr(model, method)
    for layer in layers:
        model.get_submodule(layer.name).processor = layer.original
    # From now on the model is saved as an ordinary one.
    model.__dict__.pop(RECORD, None)
    model._internal_dict = type(model.config)(without_entries("diffusers", model.config))


def replaced(module: Any, layer: AttentionLayer) -> str | None:
    """What has replaced the processor that `switch` set, or None."""
    processor = getattr(module, "processor", None)
    ours = isinstance(processor, Patched) and processor._attention_backend is layer
    return None if ours or processor is layer.original else type(processor).__name__


def skipping_hook(module: Any) -> str | None:
    """The diffusers hook on this module that may skip its attention (layer skip, caches), or None."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [] if registry is None else registry.hooks.values()
    return next((type(hook).__name__ for hook in hooks if hasattr(hook, "new_forward")), None)


def why_not_reached(module: Any) -> str:
    """Always the same reason: the processor did not use its backend."""
    return f"its {type(module.processor).__name__.removeprefix(PREFIX)} computed attention without its backend"


def _rebuild(stock: type, state: dict[str, Any]) -> Any:
    """Build a patched processor again after pickling or copying."""
    processor: Any = object.__new__(stock)
    _install(processor)
    processor.__class__ = patched_class(stock, _rebuild)
    processor.__dict__.update(state)
    return processor


def _patched(processor: Any, layer: AttentionLayer) -> Any:
    """A copy of a stock processor that calls this layer's attention."""
    _install(processor)
    stock: Any = type(processor)
    processor = copy.copy(processor)
    processor.__dict__["_qat_layer"] = layer
    processor.__class__ = patched_class(stock, _rebuild)
    return processor


def _install(processor: Any) -> None:
    """Wrap the dispatcher that this kind of processor calls, so that it accepts layers."""
    for namespace, name in processor_code.dispatchers(type(processor)):
        if not hasattr(namespace[name], "_knows_layers"):
            namespace[name] = _knowing_layers(namespace[name])


def _knowing_layers(dispatch: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(dispatch)
    def dispatch_attention_fn(
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
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """diffusers' dispatcher: query [B, Lq, H, D], key and value [B, Lk, Hk, D] -> [B, Lq, H, D]."""
        original = functools.partial(
            dispatch, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs
        )
        layer = backend if isinstance(backend, AttentionLayer) else parallel_config
        if not isinstance(layer, AttentionLayer):
            return original(backend=backend, parallel_config=parallel_config)
        if isinstance(parallel_config, AttentionLayer):
            parallel_config = getattr(layer.original, "_parallel_config", None)
        if backend is not layer and backend is not None:
            refuse_call(layer, "backend", "that of the processor", repr(backend), "exclude this module from the patch")
        if dropout_p:
            refuse_call(layer, "dropout_p", "0", dropout_p, "set the model's attention dropout to 0")
        if is_causal and query.shape[1] != key.shape[1]:
            got = f"{query.shape[1]} queries and {key.shape[1]} keys"
            refuse_call(layer, "is_causal", "as many queries as keys", got, "exclude this module from the patch")
        if attention_kwargs:
            refuse_call(layer, "attention_kwargs", "none", attention_kwargs, "exclude this module from the patch")
        context = getattr(parallel_config, "context_parallel_config", None)
        if context is not None and (attn_mask is not None or is_causal or layer.observer is not None):
            got = "a mask, or a measurement such as calibrate"
            refuse_call(
                layer, "context parallelism", "plain self-attention", got, "run this on a model without enable_parallelism"
            )
        sizes = (query.shape[0], query.shape[1], key.shape[1])
        seen = masks.read(layer, attn_mask, *sizes)
        key_mask, causal = seen.key_mask, is_causal or seen.causal
        if layer.observer is not None:
            out = original(backend=getattr(layer.original, "_attention_backend", None))
            query, key, value, shown = (x.transpose(1, 2) for x in (*under_autocast(query, key, value), out))
            limits: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "bounds": seen.bounds}
            call = AttentionCall(query=query, key=key, value=value, out=shown, scale=scale, **limits)
            layer.observer(layer, call)
            return out
        query, key, value = under_autocast(query, key, value)
        shifts = layer.shifts_on(key.device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shifts: dict[str, torch.Tensor]) -> torch.Tensor:
            options: dict[str, Any] = {"spec": layer.spec, "causal": causal, "scale": scale, "impl": layer.impl} | shifts
            out = attention(query, key, value, key_mask=key_mask, bounds=seen.bounds, **options)
            if layer.probed:
                layer.note_call()
            return out

        if context is not None:
            return context_parallel.attend(attend, query, key, value, shifts, context)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if (listener := listeners.listener()) is None:
            out = attend(query, key, value, shifts)
        else:
            heard = functools.partial(attend, shifts=shifts)
            told = attn_mask if seen.bounds is not None or key_mask is None else key_mask[:, None, None]
            out = listeners.heard(heard, query, key, value, told, causal, scale)
            if layer.probed and not layer.reached:
                layer.skipped_by = listener
        out = out.transpose(1, 2)
        return out if seen.query_mask is None else torch.where(seen.query_mask[..., None, None], out, 0.0)

    wrapped: Any = dispatch_attention_fn
    wrapped._knows_layers = True
    return wrapped


def _head_dim(module: Any) -> int | None:
    """The head dim, as far as the module says. Otherwise the first call shows it."""
    if isinstance(head_dim := getattr(module, "head_dim", None), int):
        return head_dim
    heads, inner_dim = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    return inner_dim // heads if isinstance(heads, int) and isinstance(inner_dim, int) else None


def _is_a(value: object, base: str) -> bool:
    return any(cls.__name__ == base and cls.__module__.startswith("diffusers.") for cls in type(value).__mro__)
