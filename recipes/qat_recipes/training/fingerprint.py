"""Digests of models: whether a run goes on from the weights that it was started from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from .adapters import has_adapters, names_left_out


def digest_of_weights(model: torch.nn.Module) -> str:
    """SHA-256 of all bytes of the weights that were loaded: with adapters of the frozen ones, before the first step of all."""
    state = model.state_dict()
    names = sorted(names_left_out(model) if has_adapters(model) else state)
    whole = hashlib.sha256()
    # Hashing lets other threads run, and there is much to hash.
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: _digest(state[name]), names), strict=True):
            whole.update(f"{name} {digest}".encode())
    return whole.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()
