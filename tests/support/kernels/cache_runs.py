"""A problem computed by a KVCache, some tokens at a time."""

import torch

from qat_kernels import KVCache
from support.kernels.cases import Case


def run_cache(case: Case, steps: list[int], tensors, *, impl: str = "eager", prompt_impl: str | None = None, device: str = "cpu"):
    """O and LSE of all tokens, added to a cache in steps, the first of them with `prompt_impl`."""
    q, k, v = (x.to(device) for x in tensors[:3])
    key_mask, *shifts = (None if x is None else x.to(device) for x in (case.key_mask(), case.k_shift(), case.q_shift()))
    k_shift, q_shift = shifts
    cache, parts, start = KVCache(), [], 0
    for n in steps:
        part, stop = slice(start, start + n), start + n
        mask = None if key_mask is None else key_mask[:, :stop]
        options = {"spec": case.spec(), "scale": case.scale, "key_mask": mask, "k_shift": k_shift, "q_shift": q_shift}
        options |= {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.features().items()}
        options["impl"] = impl if start or prompt_impl is None else prompt_impl
        parts.append(cache.attention(*(x[:, :, part] for x in (q, k, v)), return_lse=True, **options))
        start = stop
    return torch.cat([out for out, _ in parts], 2).cpu(), torch.cat([lse for _, lse in parts], 2).cpu(), cache
