"""Transformers: which modules of a model can be patched, and how the model is switched to 4-bit attention and back."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_kernels.spec import MAX_HEAD_DIM
from qat_patch.config import spec_problem
from qat_patch.layer import AttentionLayer
from qat_patch.metadata import CONFIG_KEYS, METHOD, RECORD, AttentionMetadata

from . import masks, packed_samples, windows
from .attention import CHECKED, COMPUTED, LAYER, WITHOUT_EFFECT, attention_forward
from .source import attention_code, reads_padding, recurrent
from .windows import head_dims_of

MECHANISM = "transformers' AttentionInterface"
REPLACED_BY = "set_attn_implementation"
CAUSAL = True
NAME = "qat_fp4"
"""The prefix of 4-bit attention among transformers' attention implementations. The original implementation's name follows it."""
_CONFIG = "_qat_config"
"""The attribute of an unpatched module that holds its model's config, while the module has a copy of its own."""
_ARGUMENTS = frozenset(
    {
        # Arguments of every attention function, and some that do nothing if they are None, which the module or the call shows.
        "module", "query", "key", "value", "attention_mask", "dropout", "softcap", "s_aux", "sliding_window", "output_attentions",
    }
) | COMPUTED | WITHOUT_EFFECT  # fmt: skip
"""The arguments that a module may pass to attention by name."""
_FEATURES = {"window": "a sliding window", "softcap": "a soft cap of the scores", "sinks": "attention sinks"}
"""Descriptions of what modules ask for, by argument name of `qat_kernels.attention`."""


def owns(model: object) -> bool:
    """Whether this is a model of transformers. This does not import transformers."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def pipeline_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """Always empty: pipelines of transformers have one model, so pass that."""
    return {}


def other_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """None, as above."""
    return {}


def stored_metadata(model: Any) -> AttentionMetadata | None:
    """The metadata that an export of this package left in the model's config."""
    stored = getattr(model, RECORD, None) or getattr(model.config, CONFIG_KEYS["transformers"], None)
    if isinstance(stored, AttentionMetadata):
        return stored
    if isinstance(metadata := getattr(stored, "metadata", None), AttentionMetadata):
        return metadata  # transformers has turned it into our quantizer's config
    return AttentionMetadata.from_dict(stored) if AttentionMetadata.is_ours(stored) else None


def attention_modules(model: Any) -> dict[str, torch.nn.Module]:
    """The modules whose attention goes through AttentionInterface, by name, also those of encoders.

    The model directly around a module decides: some models for pictures or sound have a language model of another file, and an
    encoder whose attention does not go through the interface.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if _is_attention(module) and _models_around(model, name)[-1]._can_set_attn_implementation()
    }


def _is_attention(module: Any) -> bool:
    if owns(module) or not hasattr(module, "config"):
        return False
    return attention_code(module) is not None or (hasattr(module, "is_causal") and hasattr(module, "layer_idx"))


def original(model: Any, module: Any) -> str:
    """The name of the active attention implementation.

    Raises:
        ValueError: it is 4-bit attention already (a submodel of a patched model, or a shared config).
    """
    name = module.config._attn_implementation
    if _is_ours(name):
        raise ValueError(
            "patch_model: this model's config already names 4-bit attention: it is part of a patched model, or shares its "
            "config object; patch the outer model, or build each model from a config of its own"
        )
    return name or "eager"


def reason_to_skip(module: Any) -> str | None:
    """Why a module keeps its original attention, in cases that are not a mistake of the user."""
    if attention_code(module) is None:
        return f"its {type(module).__name__} never calls {MECHANISM}"
    if hasattr(module, "layer_idx") and not hasattr(module, "is_causal"):
        return f"its {type(module).__name__} does not say whether it is causal (is_causal)"
    if not getattr(module, "is_causal", False) or not hasattr(module, "layer_idx"):
        return "not causal: only decoder self-attention is supported"
    head_dim, _ = head_dims_of(module)
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim}: at most {MAX_HEAD_DIM} is supported"
    return None


def problem(module: Any, spec: QuantSpec) -> str | None:
    """Why 4-bit attention cannot compute what this module needs."""
    dropout = getattr(module, "attention_dropout", 0.0)
    head_dim, head_dim_v = head_dims_of(module)
    found = {
        "a position bias": "position_bias" if getattr(module, "has_relative_attention_bias", None) is not None else None,
        "dropout": (dropout.p if isinstance(dropout, torch.nn.Dropout) else dropout) or None,
    }
    for what, value in found.items():
        if value is not None:
            return f"{what} ({value})" + ("; set it to 0 in the config" if what == "dropout" else "")
    code = attention_code(module)
    features = {
        "window": windows.window_of(module),
        "softcap": windows.softcap_of(module),
        "sinks": getattr(module, "sinks", None),
    }
    for feature, argument in (("softcap", "softcap"), ("sinks", "s_aux")):
        if features[feature] is not None and (code is None or code.keywords is None or argument not in code.keywords):
            return f"{_FEATURES[feature]} that its {type(module).__name__} does not pass to attention as {argument}"
    for feature, value in features.items():
        if value is not None and feature not in spec.rules.features:
            return f"{_FEATURES[feature]}, which the servers of preset={spec.preset!r} do not compute"
    if code is not None and code.keywords is not None and (unknown := sorted(code.keywords - _ARGUMENTS)):
        return f"its {type(module).__name__} passes {', '.join(unknown)} to attention, which is not known here"
    if code is not None and code.uses_mask is not None:
        return f"its {type(module).__name__} makes a mask of its own: {code.uses_mask}"
    grouped = getattr(module, "num_key_value_groups", 1) != 1
    return spec_problem(spec, head_dim, causal=module.is_causal, grouped=grouped, head_dim_v=head_dim_v)


def prepare(original: Any) -> str:
    """Register 4-bit attention and its masks for this original implementation; transformers finds both by the returned name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = original or "eager"
    name = f"{NAME}_{re.sub('flash|[^a-z0-9_]', '', before)}"  # transformers must not take it for an implementation that it knows
    AttentionInterface.register(name, partial(attention_forward, original=before))
    AttentionMaskInterface.register(name, partial(masks.make_mask, original=before))
    return name


def key_shape(module: Any) -> tuple[int, int] | None:
    """Key heads and head dim, as far as the module says. The number of heads may differ between layers."""
    head_dim, out_features = getattr(module, "head_dim", None), getattr(getattr(module, "k_proj", None), "out_features", None)
    config, heads = module.config, None
    if isinstance(head_dim, int) and isinstance(out_features, int):
        heads = out_features // head_dim
    elif isinstance(head_dim, int):
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None


def apply(model: Any, layers: list[AttentionLayer]) -> None:
    """Switch the model to 4-bit attention."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    ours = [config for config in _configs(model, layers) if not _is_ours(config._attn_implementation)]
    checked = packed_samples.Checked(recurrent(model))
    for layer in layers:
        module = modules[layer.name]
        setattr(module, windows.KIND, windows.layer_kind(module))
        setattr(module, LAYER, layer)
        if layer.is_patched:
            around = _models_around(model, layer.name)[-1]
            if not hasattr(around, CHECKED):
                around.register_forward_pre_hook(_begin_pass, with_kwargs=True)
            setattr(around, CHECKED, checked)
            setattr(module, CHECKED, checked)
            if (window := windows.window_of(module)) is not None:
                setattr(around, windows.WINDOWS, getattr(around, windows.WINDOWS, frozenset()) | {window})
        elif any(module.config is config for config in ours):
            # It runs the host's code unchanged: under its original name, with the masks for that name.
            setattr(module, _CONFIG, module.config)
            module.config = copy.copy(module.config)
            module.register_forward_pre_hook(_give_original_masks, with_kwargs=True)
    for each in {id(x): x for layer in layers if layer.is_patched for x in _models_that_turn(model, layer)}.values():
        # Before `_begin_pass`, which needs its result.
        each.register_forward_pre_hook(_count_positions, with_kwargs=True, prepend=True)
    switch(model, layers)


def switch(model: Any, layers: list[AttentionLayer]) -> None:
    """Set the name of 4-bit attention in the configs; the original name while all modules run original attention."""
    from transformers import AttentionInterface

    ours = any(layer.quantizes or layer.observer is not None for layer in layers)
    for config in _configs(model, layers):
        name = config._attn_implementation
        if ours and not _is_ours(name):
            config._attn_implementation_internal = prepare(name)
        elif not ours and _is_ours(name):
            config._attn_implementation_internal = AttentionInterface()[name].keywords["original"]


def replaced(module: Any, layer: AttentionLayer) -> str | None:
    """The attention implementation or module that was set after the patch, or None."""
    if getattr(module, LAYER, None) is not layer:
        return type(module).__name__
    name = module.config._attn_implementation
    in_place = _is_ours(name) or not (layer.quantizes or layer.observer is not None)
    return None if in_place else name


def skipping_hook(module: Any) -> str | None:
    """Always None: transformers has no hooks that skip attention."""
    return None


def why_not_reached(module: Any) -> str:
    """Always the same reason: the code of the module's class has a path without the interface."""
    return f"its {type(module).__name__} did not call {MECHANISM}"


def restore(model: Any, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, even an unfinished one."""
    from transformers import AttentionInterface

    configs = _configs(model, layers)
    for layer in layers:
        for module in (model.get_submodule(layer.name), *_models_around(model, layer.name)):
            module.config = module.__dict__.pop(_CONFIG, module.config)
            module.__dict__.pop(LAYER, None)
            module.__dict__.pop(CHECKED, None)
            module.__dict__.pop(windows.KIND, None)
            module.__dict__.pop(windows.WINDOWS, None)
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook in (_give_original_masks, _count_positions, _begin_pass):
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for config in configs:
        if _is_ours(config._attn_implementation):
            config._attn_implementation_internal = AttentionInterface()[config._attn_implementation].keywords["original"]
    model.__dict__.pop(RECORD, None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
        quantizer.remove_quantization_config(model)  # from now on the model is saved as an ordinary one


def new_cache(model: Any, layers: list[AttentionLayer]) -> Any:
    """A transformers cache that keeps K and V of patched layers in NVFP4, where that works.

    Raises:
        ValueError: it works for no layer.
    """
    from . import cache

    modules = {name: module for name, module in attention_modules(model).items() if reason_to_skip(module) is None}
    return cache.new_cache(model, modules, layers)


@contextlib.contextmanager
def generating(model: Any, layers: list[AttentionLayer]) -> Iterator[None]:
    """Inside, every call of the model's `generate` without a cache gets an FP4 cache.

    Raises:
        ValueError: no FP4 cache works, the model has no `generate`, or it is inside `generating` already.
    """
    from . import cache

    new_cache(model, layers)
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"cached: expected a model that generates, got a {type(model).__name__}, which has no generate")
    if "generate" in vars(model):
        raise ValueError(f"cached: the generate of this {type(model).__name__} has been replaced already; leave that first")
    model.generate = cache.Generate(model, layers, partial(new_cache, model, layers))
    try:
        yield
    finally:
        del model.generate


def named_original(name: Any) -> str | None:
    """The original implementation, if this attention name in a config is one of 4-bit attention; else None."""
    from transformers import AttentionInterface

    known = AttentionInterface()
    return known[name].keywords["original"] if isinstance(name, str) and _is_ours(name) and name in known else None


def _is_ours(name: str | None) -> bool:
    return name is not None and name.startswith(f"{NAME}_")


def _configs(model: Any, layers: list[AttentionLayer]) -> list[Any]:
    """The configs that name the attention of patched modules, and those that their models make masks from; each once."""
    patched = [layer for layer in layers if layer.is_patched]
    modules = [x for layer in patched for x in (*_models_around(model, layer.name), model.get_submodule(layer.name))]
    return list({id(module.config): module.config for module in modules}.values())


def _models_around(model: Any, name: str) -> list[Any]:
    """The models of transformers that the module of this name is part of, the outermost first."""
    names = name.split(".")
    return [x for depth in range(len(names)) if owns(x := model.get_submodule(".".join(names[:depth])))]


def _count_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook for models with rotary embeddings: positions count from the first token that is not padding, as in `generate`.

    Without position_ids the host counts padding too. Ordinary attention depends only on distances, so it does not change. But
    Q and K are rotated before they are quantized, so padding in front would change their codes (docs/NUMERICS.md,
    section 3).
    """
    mask, given = kwargs.get("attention_mask"), [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = next((x for x in given if x is not None), None)
    if kwargs.get("position_ids") is not None or not _is_ours(module.config._attn_implementation):
        return None
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and tokens is not None and mask.shape[1] >= tokens.shape[1]):
        return None
    in_front = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    positions = (torch.arange(mask.shape[1], device=mask.device) - in_front).clamp(min=0)
    return args, kwargs | {"position_ids": positions[:, -tokens.shape[1] :]}


def _models_that_turn(model: Any, layer: AttentionLayer) -> list[Any]:
    """The models around a module that make its positions or masks, if positions serve only rotary embeddings."""
    around = _models_around(model, layer.name)
    if not hasattr(around[-1], "rotary_emb"):
        return []
    # Positions in pictures are made by the models around a language model, which do not count padding, and which make none
    # where there is no picture. The inputs of the models around a decoder are for the encoder.
    if any(hasattr(each, "get_rope_index") for each in around) or getattr(around[0].config, "is_encoder_decoder", False):
        around = around[-1:]
    return [each for each in around if reads_padding(each)]


def _begin_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook on the models directly around patched modules."""
    if torch.compiler.is_compiling():
        return None
    getattr(module, CHECKED).begin(kwargs)
    if not hasattr(module, windows.WINDOWS) or not _is_ours(module.config._attn_implementation):
        return None
    return args, windows.prepare_cache(module, kwargs)


def _give_original_masks(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook on unpatched modules, which may get the compact masks of patched modules beside them."""
    values = (*args, *kwargs.values())
    # The module computes with the first floating-point tensor.
    numbers = (x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and not masks.is_compact(x))
    dtype = next((x.dtype for x in numbers), torch.float32)
    name = module.config._attn_implementation or "eager"
    cache = next((x for x in values if hasattr(x, "get_mask_sizes")), None)

    def back(value: Any) -> Any:
        if not masks.is_compact(value):
            return value
        keys = None if cache is None else _keys(cache, module.layer_idx, value.shape[2])
        return masks.restore(value, name, keys, dtype)

    return tuple(map(back, args)), {key: back(value) for key, value in kwargs.items()}


def _keys(cache: Any, layer_idx: int, queries: int) -> int:
    """How many keys a layer will see, including the empty slots of a static cache."""
    is_dummy = getattr(cache, "is_dummy", ())
    if layer_idx < len(is_dummy) and is_dummy[layer_idx]:
        # It sees the keys of an earlier layer, which are in the cache already: those of the first layer with full attention.
        kinds = zip(cache.is_sliding, cache.is_linear, is_dummy, strict=True)
        layer_idx, queries = next((index for index, kind in enumerate(kinds) if not any(kind)), 0), 0
    return cache.get_mask_sizes(queries, layer_idx)[0]
