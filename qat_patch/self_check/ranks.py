"""In a distributed run every process goes by what rank 0 has read, so that all run the same kernels."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch

_KEY = "qat_patch/verdicts"
_PATIENCE = datetime.timedelta(seconds=20)


def read_by_rank_0(read: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `read` returns, on rank 0 if there are ranks.

    It goes through the store of the process group and is no collective: where rank 0 alone loads a model, it waits for nobody.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return read()
    store = torch.distributed.distributed_c10d._get_default_store()
    if torch.distributed.get_rank() == 0:
        records = read()
        store.set(_KEY, json.dumps(records))
        return records
    if not torch.cuda.device_count():
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
