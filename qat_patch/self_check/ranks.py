"""In a distributed run every process uses the verdicts that rank 0 has read, so that all run the same kernels."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch

_KEY = "qat_patch/verdicts"
_PATIENCE = datetime.timedelta(seconds=20)


def in_a_distributed_run() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def read_by_rank_0(read: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The result of `read`. With several ranks, its first result on rank 0, as long as the process group lasts.

    Only the first: ranks read when they patch, and a later reading could differ between them. This uses the store of the process
    group and is not a collective, so rank 0 does not wait if it loads a model alone.
    """
    if not in_a_distributed_run():
        return read()
    store = torch.distributed.distributed_c10d._get_default_store()
    if torch.distributed.get_rank() == 0:
        if not store.check([_KEY]):
            store.set(_KEY, json.dumps(read()))
    elif not torch.cuda.device_count():
        return []
    try:
        store.wait([_KEY], _PATIENCE)
    except RuntimeError:
        warnings.warn(
            "patch_model: rank 0 has patched no model, so this process knows no verdicts of the self-check; `auto` takes triton",
            stacklevel=2,
        )
        return []
    return json.loads(store.get(_KEY))
