"""Diffusers: 4-bit attention behind the attention dispatcher, chosen module by module.

A processor ends in `dispatch_attention_fn(..., backend=self._attention_backend)`. Each patched module gets a copy of its stock
processor whose `_attention_backend` is the module's `AttentionLayer`; the stock object comes back on restore. The name
`dispatch_attention_fn` in the module of that processor is wrapped once: what comes with a layer runs 4-bit attention, all else
goes on as before. So no processor code is repeated, other models of the process keep their attention, and no state is kept.
The layer travels as an argument, since torch.compile takes no side effects inside a checkpointed block, and blocks that differ
only in the values of a layer share one compiled graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

from qat_kernels import QuantSpec, attention
from qat_patch.config import head_dim_problem
from qat_patch.layer import AttentionCall, AttentionLayer, under_autocast
from qat_patch.metadata import CONFIG_KEYS, AttentionMetadata

from . import context_parallel

if TYPE_CHECKING:
    from collections.abc import Callable

MECHANISM = "diffusers' attention dispatcher"
SUPPORTED_VERSIONS = ("0.42",)
"""Minor versions of diffusers whose dispatcher is known; setup.cfg admits the same."""
_TRANSFORMERS = ("transformer", "transformer_2")
_DISPATCH = "dispatch_attention_fn"
_EXCLUDED = -9000.0
"""What an additive mask must at most hold where it excludes a key; the usual values are -10000 (-9984 in bfloat16) and -inf."""


def owns(model: object) -> bool:
    """Whether this is a model of diffusers; does not import it."""
    return _is_a(model, "ModelMixin")


def pipeline_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """The transformers of a diffusers pipeline by component name (Wan 2.2 has two); empty for anything else."""
    if not _is_a(pipeline, "DiffusionPipeline"):
        return {}
    components = {name: getattr(pipeline, name, None) for name in _TRANSFORMERS}
    return {name: model for name, model in components.items() if isinstance(model, torch.nn.Module)}


def stored_metadata(model: Any) -> AttentionMetadata | None:
    """The metadata that an export of this package left in the model's config."""
    metadata = model.config.get(CONFIG_KEYS["diffusers"])
    return AttentionMetadata.from_dict(metadata) if AttentionMetadata.is_ours(metadata) else None


def attention_modules(model: Any) -> dict[str, torch.nn.Module]:
    """The modules that leave attention to a processor object, by name."""
    return {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}


def original(model: Any, module: Any) -> Any:
    """The stock processor object.

    Raises:
        ValueError: it is one of ours, although the model is not patched.
    """
    if isinstance(module.processor, _Patched):
        raise ValueError(
            f"patch_model: a processor of this {type(model).__name__} belongs to a patched model (set by hand, or the model is "
            "part of a patched one); set a stock processor, or patch the outer model"
        )
    return module.processor


def reason_to_skip(module: Any) -> str | None:
    """Why a module cannot have 4-bit attention although that is no mistake of the user's."""
    if hasattr(module.processor, "_attention_backend") and _DISPATCH in _namespace(module.processor):
        return None
    return f"its {type(module.processor).__name__} does not go through {MECHANISM}"


def problem(module: Any, spec: QuantSpec) -> str | None:
    """Why 4-bit attention cannot compute what this module asks for.

    Raises:
        ValueError: this version of diffusers is not known.
    """
    _check_version()
    return head_dim_problem(_head_dim(module), spec)


def apply(model: Any, layers: list[AttentionLayer]) -> None:
    """Point the model at 4-bit attention."""
    switch(model, layers)


def switch(model: Any, layers: list[AttentionLayer]) -> None:
    """Give each module the processor that its layer asks for now."""
    for layer in layers:
        processor = layer.original
        if layer.quantizes or layer.observer is not None:
            processor = _patched(processor, layer)
        model.get_submodule(layer.name).processor = processor


def new_cache(model: Any, layers: list[AttentionLayer]) -> Any:
    """Denoising keeps no keys and values from step to step."""
    raise ValueError("cache: a diffusers model generates without a cache of keys and values; this is for language models")


def restore(model: Any, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, also a half-finished one."""
    for layer in layers:
        model.get_submodule(layer.name).processor = layer.original


def replaced(model: Any, layer: AttentionLayer) -> str | None:
    """What somebody put in the place of the processor that `switch` chose, or None."""
    processor = model.get_submodule(layer.name).processor
    ours = isinstance(processor, _Patched) and processor._attention_backend is layer
    return None if ours or processor is layer.original else type(processor).__name__


class _Patched:
    """What the classes of patched processors have in common."""

    _attention_backend: Any


@functools.cache
def _patched_class(stock: Any) -> Any:
    """The class of a stock processor with a layer for a backend."""

    class Patched(stock, _Patched):
        @functools.wraps(stock.__call__)  # attention modules look at the signature
        def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(attn, "fused_projections", False) and torch.is_grad_enabled():
                _refuse_fused(self._qat_layer.name, attn)
            return stock.__call__(self, attn, *args, **kwargs)

        @property
        def _attention_backend(self) -> AttentionLayer:
            return self._qat_layer

        @_attention_backend.setter
        def _attention_backend(self, backend: Any) -> None:
            raise ValueError(
                f"{self._qat_layer.name} runs the 4-bit attention of patch_model: expected no other attention backend, got "
                f"{backend!r}; call unpatch_model first, or exclude this module from the patch"
            )

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _rebuild, (stock, dict(self.__dict__))

    Patched.__name__ = Patched.__qualname__ = f"Patched{stock.__name__}"
    return Patched


def _rebuild(stock: type, state: dict[str, Any]) -> Any:
    """A patched processor that was pickled or copied."""
    processor: Any = object.__new__(_patched_class(stock))
    processor.__dict__.update(state)
    _install(processor)
    return processor


def _patched(processor: Any, layer: AttentionLayer) -> Any:
    """A copy of a stock processor that asks for this layer's attention."""
    _install(processor)
    stock: Any = type(processor)
    processor = copy.copy(processor)
    processor.__dict__["_qat_layer"] = layer
    processor.__class__ = _patched_class(stock)
    return processor


def _namespace(processor: Any) -> dict[str, Any]:
    """The globals of the function in which a processor computes attention."""
    kind = type(processor)
    call = inspect.unwrap(kind.forward if isinstance(processor, torch.nn.Module) else kind.__call__)
    return getattr(call, "__globals__", {})


def _install(processor: Any) -> None:
    """Let the dispatcher that this kind of processor calls know layers."""
    namespace = _namespace(processor)
    if not hasattr(namespace[_DISPATCH], "_knows_layers"):
        namespace[_DISPATCH] = _knowing_layers(namespace[_DISPATCH])


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
        if not isinstance(backend, AttentionLayer):
            return original(backend=backend, parallel_config=parallel_config)
        if dropout_p:
            _refuse(backend, "dropout_p", "0", dropout_p, "set the model's attention dropout to 0")
        if is_causal and query.shape[1] != key.shape[1]:
            got = f"{query.shape[1]} queries and {key.shape[1]} keys"
            _refuse(backend, "is_causal", "as many queries as keys", got, "exclude this module from the patch")
        if attention_kwargs:
            _refuse(backend, "attention_kwargs", "none", attention_kwargs, "exclude this module from the patch")
        context = getattr(parallel_config, "context_parallel_config", None)
        if context is not None and (attn_mask is not None or is_causal or backend.observer is not None):
            got = "a mask, or a measurement such as calibrate"
            _refuse(backend, "context parallelism", "plain self-attention", got, "run this on a model without enable_parallelism")
        key_mask, query_mask = _masks(backend, attn_mask, query.shape[0], query.shape[1], key.shape[1])
        if backend.observer is not None:
            out = original(backend=getattr(backend.original, "_attention_backend", None))
            query, key, value, shown = (x.transpose(1, 2) for x in (*under_autocast(query, key, value), out))
            call = AttentionCall(query=query, key=key, value=value, out=shown, causal=is_causal, scale=scale, key_mask=key_mask)
            backend.observer(backend, call)
            return out
        query, key, value = under_autocast(query, key, value)
        attend = functools.partial(attention, spec=backend.spec, causal=is_causal, scale=scale, key_mask=key_mask)
        k_shift = backend.shift_on(key.device)
        if context is not None:
            return context_parallel.attend(attend, query, key, value, k_shift, context)
        out = attend(*(x.transpose(1, 2) for x in (query, key, value)), k_shift=k_shift).transpose(1, 2)
        return out if query_mask is None else torch.where(query_mask[..., None, None], out, 0.0)

    wrapped: Any = dispatch_attention_fn
    wrapped._knows_layers = True
    return wrapped


def _masks(
    layer: AttentionLayer, mask: torch.Tensor | None, batch: int, queries: int, keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask as a key mask, bool [batch, keys], if it is one.

    It may be boolean, or additive with 0 where a key may be seen and -10000 or less where not, in any shape that is the same
    for all heads and queries. Queries that may see nothing at all (padding, in a mask that is the outer product of what is
    none) come as a second mask, bool [batch, queries]: their output is zero.
    """
    if mask is None:
        return None, None

    def refuse(got: str) -> None:
        _refuse(
            layer,
            "attn_mask",
            f"a key mask [{batch}, 1, 1, {keys}] or [{batch}, {keys}]: bool, True where a key may be seen, or float, 0 there and "
            "at most -10000 elsewhere",
            got,
            "exclude the modules that receive such masks from the patch",
        )

    def require(holds: torch.Tensor, got: str) -> None:
        """A condition on values: an error now, or, inside torch.compile, one of PyTorch's own when the graph runs."""
        if torch.compiler.is_compiling():
            torch._assert_async(holds, f"4-bit attention: attn_mask: expected a key mask, got {got}")
        elif not holds:
            refuse(got)

    rows = mask[:, None, None] if mask.ndim == 2 else mask
    if rows.ndim != 4 or rows.shape[0] not in (1, batch) or rows.shape[2] not in (1, queries) or rows.shape[3] != keys:
        refuse(f"{mask.dtype} {tuple(mask.shape)}")
    if rows.dtype != torch.bool:
        allowed = rows == 0
        require((allowed | (rows <= _EXCLUDED)).all(), "an additive mask with other values")
        rows = allowed
    if rows.shape[1] > 1 and rows.stride(1):
        require((rows == rows[:, :1]).all(), "another mask for each head")
    rows = rows[:, 0]
    if rows.shape[1] == 1:
        return rows[:, 0].expand(batch, keys), None
    key_mask, query_mask = rows.any(1), rows.any(2)
    require((rows == key_mask[:, None] & query_mask[:, :, None]).all(), "another mask for each query")
    return key_mask.expand(batch, keys), query_mask.expand(batch, queries)


def _refuse_fused(name: str, attn: torch.nn.Module) -> None:
    """Fused projections are copies: training would move them, and leave the projections that are saved beside them behind."""
    if any(parameter.requires_grad for parameter in attn.parameters()):
        raise ValueError(
            f"4-bit attention ({name}): expected separate projections for training, got those of fuse_qkv_projections, which "
            "adapters do not reach and which leave to_q, to_k and to_v untrained; call model.unfuse_qkv_projections(), or use "
            "torch.no_grad() if this is no training"
        )


def _refuse(layer: AttentionLayer, what: str, expected: str, got: object, remedy: str) -> None:
    raise ValueError(f"4-bit attention ({layer.name}): {what}: expected {expected}, got {got}; {remedy}")


def _check_version() -> None:
    """Raise a ValueError if this version of diffusers is not known to have the dispatcher that we wrap."""
    from diffusers import __version__

    if ".".join(__version__.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ValueError(
            f"patch_model: expected diffusers {' or '.join(SUPPORTED_VERSIONS)}, whose attention dispatcher is known, "
            f"got {__version__}; install one of those"
        )


def _head_dim(module: Any) -> int | None:
    """As far as the module tells; if it does not, the first call does."""
    if isinstance(head_dim := getattr(module, "head_dim", None), int):
        return head_dim
    heads, inner_dim = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    return inner_dim // heads if isinstance(heads, int) and isinstance(inner_dim, int) else None


def _is_a(value: object, base: str) -> bool:
    return any(cls.__name__ == base and cls.__module__.startswith("diffusers.") for cls in type(value).__mro__)
