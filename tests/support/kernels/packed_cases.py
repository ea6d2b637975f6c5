"""Packed attention problems: documents of every kind, alone and packed."""

from dataclasses import replace
from itertools import accumulate

import torch

from support.kernels.cases import Case

# Queries and keys of each document: shorter than a group, over group boundaries, Lq < Lk, Lq > Lk, without queries, keys or both.
DOCUMENTS = ((33, 33), (1, 1), (5, 40), (0, 0), (48, 48), (20, 3), (7, 0), (0, 9), (17, 17))
SPECS = (
    {},
    {"causal": True},
    {"preset": "nvfp4_qk", "causal": True, "heads": (3, 1)},
    {"causal": True, "rotate": True, "four_over_six": True, "shift": True},
    {"shift": True, "scale": 0.3, "heads": (2, 2)},
    {"head_dim": 192, "head_dim_v": 128, "causal": True, "heads": (2, 2)},  # DeepSeek V3
)


def problem(dtype=torch.float64, documents=DOCUMENTS, **options):
    """A case, its q, k, v and gradient of every document as batches of one, the same packed, and the keywords of both calls."""
    case = Case(batch=1, coarse=True, **options)
    alone = [replace(case, lq=lq, lk=lk, seed=n).tensors(dtype) for n, (lq, lk) in enumerate(documents)]
    together = [torch.cat([x[0].transpose(0, 1) for x in tensors]) for tensors in zip(*alone, strict=True)]
    lengths = tuple(zip(*documents, strict=True))
    packing = {}
    for name, each in zip("qk", lengths, strict=True):
        packing[f"cu_seqlens_{name}"] = torch.tensor([0, *accumulate(each)], dtype=torch.int32)
        packing[f"max_seqlen_{name}"] = max(each)
    keywords = case.options()
    del keywords["key_mask"]
    return case, alone, together, keywords, packing


def unpacked(results, packing):
    """Output, log-sum-exp and gradients of a packed call by document, as batches of one."""
    out, lse, grads = results
    queries, keys = (packing[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    outs, rows = out.split(queries), lse.split(queries, dim=1)
    parts = [grad.split(lengths) for grad, lengths in zip(grads, (queries, keys, keys), strict=True)]
    documents = zip(outs, rows, *parts, strict=True)
    return [(as_batch(o), r[None], [as_batch(x) for x in g]) for o, r, *g in documents]


def as_batch(x):
    """One document, [tokens, heads, head_dim], as a batch of one, [1, heads, tokens, head_dim]."""
    return x.transpose(0, 1)[None]
