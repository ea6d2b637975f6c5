"""The layers of an FP4 cache for transformers' `generate`. They keep keys and values packed; `PatchHandle.cache` makes the cache.

Importing this module imports transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from qat_kernels import KVCache
from qat_patch.layer import AttentionLayer, under_autocast

from .source import attention_code, opens_caches
from .windows import head_dims_of, layer_kind, window_of


class Incoming:
    """New tokens of an FP4 cache. A layer returns them in place of keys and values.

    One call of attention takes them, quantizes them and adds them to the cache: only its mask says where groups begin.
    """

    def __init__(self, layer: FP4Layer, key: torch.Tensor, value: torch.Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.shape = torch.Size((*key.shape[:2], layer.packed.length + key.shape[2], key.shape[3]))
        """The shape of all keys, including these."""

    def attention(
        self, query: torch.Tensor, window: int | None = None, key_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Add the tokens to the cache, and attend from them to all its tokens.

        Args:
            window: the mask's window; None: all keys so far are in it.
            key_mask: bool [batch, n], True where one of the last n keys may be seen.

        Raises:
            ValueError: attention was already called with these tokens; the cache is for another window; or as for
                `KVCache.attention`. The cache does not change then.
        """
        own = self.layer.window
        if window != own and (window is not None or (own is not None and own < self.shape[2])):
            made_for = "no sliding window" if own is None else f"a sliding window of {own} keys"
            raise ValueError(
                f"{self.layer.owner.name}: its FP4 cache is for {made_for}, and its mask has {window or 'none'}; generate with "
                "the default cache"
            )
        if key_mask is not None:  # only the last keys can be in a window
            key_mask = F.pad(key_mask, (self.shape[2] - key_mask.shape[1], 0), value=True)
        if self.layer.incoming is not self:
            raise ValueError(f"{self.layer.owner.name}: attention was called twice with one update of an FP4 cache")
        out = self.layer.packed.attention(*under_autocast(query, self.key, self.value), **options, window=own, key_mask=key_mask)
        self.layer.incoming = None
        return out


class FP4Layer(CacheLayerMixin):
    """The `KVCache` of one patched attention module, with the interface of transformers."""

    is_croppable = True

    def __init__(self, owner: AttentionLayer, window: int | None = None, beside: DynamicSlidingWindowLayer | None = None) -> None:
        super().__init__()
        self.packed = KVCache()
        self.owner = owner
        self.window = window
        """How many keys a query sees, including its own; None: all before it."""
        self.is_sliding = window is not None
        """Transformers makes one mask for all such layers, of the length of the first one's keys."""
        self.beside = beside
        """A layer with the same mask that drops tokens before the window."""
        self.incoming: Incoming | None = None
        """The tokens that `update` took and attention has not used yet."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the packed cache grows as needed."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Incoming, Incoming]:
        """Take new tokens.

        Raises:
            ValueError: the module runs its original attention, which cannot read this cache.
        """
        if not self.owner.quantizes or self.owner.observer is not None:
            raise ValueError(
                f"{self.owner.name}: its keys and values are in an FP4 cache, which original attention cannot read; inside "
                "handle.disabled() generate with the default cache"
            )
        self.is_initialized = True
        # Tokens that a failed forward pass left are dropped.
        self.incoming = Incoming(self, key_states, value_states)
        return self.incoming, self.incoming

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.packed.length + query_length, 0) if self.beside is None else self.beside.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.packed.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.packed.reset()
        self.incoming = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens.

        Raises:
            ValueError: the number is positive, or as for `KVCache.crop`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected how many tokens to remove as a negative number, got {tokens_to_remove}")
        self.packed.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.packed.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.packed.select(torch.arange(self.packed.batch)[indices.cpu()] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.packed.select(torch.arange(self.packed.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        raise ValueError("the FP4 cache stays on its device; use an offloaded cache of transformers instead")


@dataclasses.dataclass(eq=False)
class Generate:
    """Replaces `generate` of a patched model: passes an FP4 cache if the caller passes no cache and does not turn it off.

    While the model runs its original attention, calls do not change.
    """

    model: Any
    layers: list[AttentionLayer]
    new_cache: Callable[[], Cache]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name, config = cache_argument(self.model), kwargs.get("generation_config")
        use_cache = kwargs.get("use_cache", getattr(config, "use_cache", None))
        quantizes = all(layer.quantizes and layer.observer is None for layer in self.layers if layer.is_patched)
        if quantizes and use_cache is not False and kwargs.get(name) is None:
            kwargs[name] = self.new_cache()
        return type(self.model).generate(self.model, *args, **kwargs)

    def __getstate__(self) -> NoReturn:
        raise ValueError(
            f"expected a {type(self.model).__name__} to be copied or pickled as it is, got it inside handle.cached(), which the "
            "copy would never leave; copy the model outside"
        )


def cache_argument(model: Any) -> str:
    """The name of a model's cache argument: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def new_cache(model: Any, modules: dict[str, Any], layers: list[AttentionLayer]) -> Cache:
    """An empty cache for a model: FP4 for the patched modules where it works, transformers' own for all others.

    Args:
        modules: the modules that call attention causally, by name.

    Raises:
        ValueError: an FP4 cache works for no patched module.
    """
    cache = DynamicCache(config=model.config)
    users = Counter(module.layer_idx for module in modules.values())
    patched = [(layer, modules[layer.name]) for layer in layers if layer.is_patched]
    around = opens_caches(model)
    reasons = {layer.name: _reason_against(layer, module, cache.layers, users) or around for layer, module in patched}
    packed = {module.layer_idx for layer, module in patched if reasons[layer.name] is None}
    others = [kept for number, kept in enumerate(cache.layers) if number not in packed]
    for layer, module in patched:
        if reasons[layer.name] is None:
            window = window_of(module)
            beside = [kept for kept in others if isinstance(kept, DynamicSlidingWindowLayer) and kept.sliding_window == window]
            cache.layers[module.layer_idx] = FP4Layer(layer, window, beside[0] if beside else None)
    if not any(isinstance(layer, FP4Layer) for layer in cache.layers):
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise ValueError(
            f"cache: no module of this {type(model).__name__} can keep its keys and values in NVFP4 ({listed}); generate with "
            "the default cache"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def _reason_against(layer: AttentionLayer, module: Any, own: list[Any], users: Counter[int]) -> str | None:
    """Why a patched module keeps transformers' own cache."""
    if layer.spec.preset not in KVCache.presets:
        return f"there is no FP4 cache for preset={layer.spec.preset!r}"
    if module.layer_idx is None or module.layer_idx >= len(own):
        return f"it has number {module.layer_idx} of {len(own)} layers"
    head_dim, head_dim_v = head_dims_of(module)
    if None not in (head_dim, head_dim_v) and head_dim_v != head_dim:
        return f"its keys have {head_dim} elements and its values {head_dim_v}: an FP4 cache holds equal ones"
    kept, window = own[module.layer_idx], window_of(module)
    if type(kept) is DynamicSlidingWindowLayer:
        if layer_kind(module) == "chunked_attention":
            return "it attends in chunks of tokens"
        if window != kept.sliding_window:
            return f"it has a sliding window of {window} keys, and its place in a cache one of {kept.sliding_window}"
    elif type(kept) is not DynamicLayer:
        return f"its place in a cache is a {type(kept).__name__}"
    elif window is not None:
        return f"it has a sliding window of {window} keys, and its place in a cache none"
    if users[module.layer_idx] > 1:
        return "it shares its place in a cache with another module"
    code = attention_code(module)
    if code is None:
        return "it never calls attention"
    return next((use.what for use in code.touches_cached if use.flag is None or getattr(module, use.flag)), None)
