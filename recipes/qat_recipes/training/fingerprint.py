"""Digests of models, to check that a resumed run has the same starting weights."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from .adapters import has_adapters, names_left_out


def digest_of_weights(model: torch.nn.Module) -> str:
    """The SHA-256 of all loaded weights: with adapters only of the frozen ones, else of all, before the first step."""
    state = model.state_dict()
    names = sorted(names_left_out(model) if has_adapters(model) else state)
    whole = hashlib.sha256()
    # Hashing releases the GIL, and there is much to hash.
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(state[name]), names), strict=True):
            whole.update(f"{name} {digest}".encode())
    return whole.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()
