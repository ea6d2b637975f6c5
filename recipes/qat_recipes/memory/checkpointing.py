"""Gradient checkpointing for models of Transformers and Diffusers: layers are computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def enable_checkpointing(model: torch.nn.Module, *, keep_attention: bool = False) -> None:
    """Keep only the inputs of each layer for the backward pass.

    Args:
        model: of Transformers or Diffusers.
        keep_attention: keep the results of 4-bit attention too, so that it runs once a step and not twice. A call with Q of
            [B, H, Lq, D] keeps O and O' (2 bytes a value each), and the codes of Q, K and V. Other attention is computed again.

    Raises:
        ValueError: by the host, if the model cannot be checkpointed.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        # The op is what PyTorch's policy knows it by. With such a context, calls run as the op.
        kept = [torch.ops.qat_kernels.attention_forward.default]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    host: Any = model
    if hasattr(model, "enable_gradient_checkpointing"):  # Diffusers
        host.enable_gradient_checkpointing(partial(checkpoint, **options))
    elif hasattr(model, "activation_checkpointing_enable"):  # Transformers
        host.activation_checkpointing_enable(options)
    else:  # older releases of it
        host.gradient_checkpointing_enable(options)
