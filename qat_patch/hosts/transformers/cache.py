"""An FP4 cache for transformers' `generate`: a layer that keeps keys and values packed. `PatchHandle.cache` makes the cache.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from qat_kernels import KVCache

from .attention import Incoming


class FP4Layer(CacheLayerMixin):
    """One attention layer's `KVCache`, in the interface of transformers.

    `update` returns no tensors but what 4-bit attention takes in their place: it adds the new tokens itself, for the mask, which
    says where groups begin, is known there only.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.packed = KVCache()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the packed cache makes room as it goes."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Incoming, Incoming]:
        self.is_initialized = True
        incoming = Incoming(self.packed, key_states, value_states)
        return incoming, incoming

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.packed.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.packed.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.packed.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens.

        Raises:
            ValueError: the number is positive, or the values that this would reopen are only left in NVFP4.
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


def new_cache(model: torch.nn.Module, quantized: set[int]) -> DynamicCache:
    """An empty cache for a model: FP4 for the layers of these indices, transformers' own for the others."""
    cache = DynamicCache(config=model.config)
    for index in quantized:
        cache.layers[index] = FP4Layer()
    return cache
