"""Diffusers: 4-bit attention as backends of the attention dispatcher, chosen module by module.

Each patched module gets a copy of its stock processor whose `_attention_backend` is ours; the stock object comes back on
restore. No processor code is repeated, and other models of the process keep their attention, for the process-wide default
is never touched. A backend function receives tensors only, so there is one backend per QuantSpec, named after it; it holds
no state.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from qat_kernels import NVFP4, QuantSpec, attention

from .block import CONFIG_KEYS, AttentionBlock
from .config import AttnQATConfig, check_head_dim

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models.attention_dispatch import AttentionBackendName

    from .patch import AttentionLayer

MECHANISM = "diffusers' attention dispatcher"
NAME = "qat_fp4"
"""How the names of our backends begin."""
SUPPORTED_VERSIONS = ("0.42",)
"""Minor versions of diffusers whose dispatcher is known; setup.cfg admits the same."""
_TRANSFORMERS = ("transformer", "transformer_2")


def owns(model: object) -> bool:
    """Whether this is a model of diffusers; does not import it."""
    return _is_a(model, "ModelMixin")


def pipeline_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """The transformers of a diffusers pipeline by component name (Wan 2.2 has two); empty for anything else."""
    if not _is_a(pipeline, "DiffusionPipeline"):
        return {}
    components = {name: getattr(pipeline, name, None) for name in _TRANSFORMERS}
    return {name: model for name, model in components.items() if isinstance(model, torch.nn.Module)}


def stored_config(model: torch.nn.Module) -> AttnQATConfig | None:
    """The config that an export of this package left in the model's config."""
    block = model.config.get(CONFIG_KEYS["diffusers"])
    return AttentionBlock.from_dict(block).config if AttentionBlock.is_ours(block) else None


def attention_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that leave attention to a processor object, by name."""
    return {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}


def original(model: torch.nn.Module, module: torch.nn.Module) -> Any:
    """The stock processor object.

    Raises:
        ValueError: it runs 4-bit attention already, but not by a patch.
    """
    backend = getattr(module.processor, "_attention_backend", None)
    if isinstance(backend, str) and backend.startswith(NAME):
        raise ValueError(
            f"patch_model: a processor of this {type(model).__name__} has the attention backend {NAME} already, set by hand; "
            "call model.reset_attention_backend() first"
        )
    return module.processor


def reason_to_skip(module: torch.nn.Module) -> str | None:
    """Why a module cannot have 4-bit attention although that is no mistake of the user's."""
    if hasattr(module.processor, "_attention_backend"):
        return None
    return f"its {type(module.processor).__name__} does not go through {MECHANISM}"


def check(name: str, module: torch.nn.Module, spec: QuantSpec) -> None:
    """Raise a ValueError if 4-bit attention cannot compute what this module asks for."""
    if getattr(module.processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"patch_model: {name} runs under context parallelism, which 4-bit attention cannot do; "
            "load the model without enable_parallelism"
        )
    check_head_dim(name, _head_dim(module), spec)


def apply(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Point the model at 4-bit attention."""
    switch(model, layers)


def switch(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Give each module the processor that its layer asks for now."""
    for layer in layers:
        processor = layer.original
        if layer.quantizes:
            processor = copy.copy(processor)
            processor._attention_backend = register_backend(layer.spec)
        model.get_submodule(layer.name).processor = processor


def new_cache(model: torch.nn.Module, layers: list[AttentionLayer]) -> Any:
    """Denoising keeps no keys and values from step to step."""
    raise ValueError("cache: a diffusers model generates without a cache of keys and values; this is for language models")


def restore(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, also a half-finished one."""
    for layer in layers:
        model.get_submodule(layer.name).processor = layer.original


def backend_name(spec: QuantSpec) -> str:
    """The name of the backend that computes this spec: `qat_fp4` and what differs from the default."""
    parts = [NAME]
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value != getattr(NVFP4, field.name):
            parts.append(field.name if value is True else f"{value}{field.name}".lower())
    return "_".join(parts)


def register_backend(spec: QuantSpec) -> AttentionBackendName:
    """The dispatcher's name for 4-bit attention with this spec; registers it when it is new.

    Diffusers has no public way to add a backend: the dispatcher knows them by the members of a closed enum. So this makes
    a member and enters it where `Enum` keeps its own (as an attribute too, which Python 3.12 and later do not look up in
    `_member_map_`). It comes last, so that a failure leaves nothing behind.

    Raises:
        ValueError: this version of diffusers is not known to have such a dispatcher.
    """
    names, registry = _dispatcher()
    value = backend_name(spec)
    if value in names._value2member_map_:
        return names(value)
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    registry.register(member)(_backend(spec))
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    names._member_names_.append(member._name_)
    type.__setattr__(names, member._name_, member)
    return member


def _backend(spec: QuantSpec) -> Callable[..., torch.Tensor]:
    # The dispatcher drops, without a word, whatever is not declared here. So everything is, and what cannot be done raises.
    def qat_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # told by the shapes
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """diffusers' backend interface: query [B, Lq, H, D], key and value [B, Lk, Hk, D] -> [B, Lq, H, D]."""
        if dropout_p:
            _refuse("dropout_p", "0", dropout_p, "set the model's attention dropout to 0")
        if is_causal and query.shape[1] != key.shape[1]:
            got = f"{query.shape[1]} queries and {key.shape[1]} keys"
            _refuse("is_causal", "as many queries as keys", got, "exclude this module from the patch")
        if return_lse:
            _refuse("return_lse", "False", return_lse, "call qat_kernels.attention, which returns it")
        if _parallel_config is not None:
            _refuse("parallel_config", "no context parallelism", "one", "load the model without enable_parallelism")
        key_mask = _key_mask(attn_mask, query.shape[0], key.shape[1])
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if torch.is_autocast_enabled(query.device.type):
            # On CUDA autocast runs RMSNorm in float32, so that queries and keys come in float32 and values in bfloat16.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return attention(query, key, value, spec=spec, causal=is_causal, scale=scale, key_mask=key_mask).transpose(1, 2)

    return qat_attention


def _key_mask(mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """The mask as bool [batch, keys], if it is one."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or tuple(mask.shape) not in {(batch, keys), (batch, 1, 1, keys), (1, 1, 1, keys)}:
        _refuse(
            "attn_mask",
            f"a key mask, bool [{batch}, 1, 1, {keys}] or [{batch}, {keys}], True where a key may be seen",
            f"{mask.dtype} {tuple(mask.shape)}",
            "exclude the modules that receive such masks from the patch",
        )
    return mask.reshape(-1, keys).expand(batch, keys)


def _refuse(what: str, expected: str, got: object, remedy: str) -> None:
    raise ValueError(f"4-bit attention: {what}: expected {expected}, got {got}; {remedy}")


def _dispatcher() -> tuple[Any, Any]:
    """The dispatcher's enum of names and its registry."""
    from diffusers import __version__

    if ".".join(__version__.split(".")[:2]) in SUPPORTED_VERSIONS:
        with contextlib.suppress(ImportError):
            from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

            return AttentionBackendName, _AttentionBackendRegistry
    raise ValueError(
        f"patch_model: expected diffusers {' or '.join(SUPPORTED_VERSIONS)}, whose attention dispatcher is known, "
        f"got {__version__}; install one of those"
    )


def _head_dim(module: torch.nn.Module) -> int | None:
    """As far as the module tells; if it does not, the first call does."""
    if isinstance(head_dim := getattr(module, "head_dim", None), int):
        return head_dim
    heads, inner_dim = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    return inner_dim // heads if isinstance(heads, int) and isinstance(inner_dim, int) else None


def _is_a(value: object, base: str) -> bool:
    return any(cls.__name__ == base and cls.__module__.startswith("diffusers.") for cls in type(value).__mro__)
