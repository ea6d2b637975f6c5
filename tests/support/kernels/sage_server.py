"""SageAttention3 as its server computes it: P's scales are rounded against the running maximum of tiles of 128 keys.

In float32, after its public sources. What differs from the preset `sage3` of this package is this and nothing else.
`PYTHONPATH=tests python -m support.kernels.sage_server` prints how much that is: the numbers of docs/NUMERICS.md, section 9.
"""

import math

import torch

from qat_kernels import QuantSpec, attention
from qat_kernels.nvfp4 import in_format, p_in_format
from qat_kernels.smoothing import per_row, smooth

TILE = 128
SPEC = QuantSpec(preset="sage3")


def attend(query, key, value):
    """O of Q, K, V [batch, heads, tokens, head_dim] in 16 bits, in the dtype of `query`."""
    smoothed, formats = smooth(query, key), SPEC.formats
    q, k, v = (
        in_format(x.float(), how)
        for x, how in ((smoothed.query, formats.query), (smoothed.key, formats.key), (value, formats.value))
    )
    log2_scale = query.shape[-1] ** -0.5 * math.log2(math.e)
    out = torch.zeros_like(q)
    row_sum, row_max = torch.zeros_like(q[..., :1]), torch.full_like(q[..., :1], -torch.inf)
    for start in range(0, k.shape[-2], TILE):
        tile = slice(start, start + TILE)
        scores = (q @ k[..., tile, :].mT + per_row(smoothed.scores[..., tile], q.shape[-2])) * log2_scale
        before, row_max = row_max, torch.maximum(row_max, scores.amax(-1, keepdim=True))
        p, rescale = (scores - row_max).exp2(), (before - row_max).exp2()
        p_fq, too_large = p_in_format(p, formats.probabilities)
        out = out * rescale + p_fq @ v[..., tile, :] / too_large
        row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
    return (out / row_sum).to(query.dtype)


def errors(a, b):
    """Relative L2 of all, and of the worst row."""
    difference, norm = (a.float() - b.float()).norm(dim=-1), b.float().norm(dim=-1)
    return (difference.norm() / norm.norm()).item(), (difference / norm).max().item()


def main():
    """How far the server, and other grids, are from our definition of it."""
    generator = torch.Generator().manual_seed(0)
    problems = {  # batch, heads, queries, keys, size of Q, means of Q and K, mean of V
        "gaussian": (1, 4, 256, 384, 1, 0, 0),
        "peaky": (1, 2, 200, 200, 3, 0, 0),
        "odd lengths": (2, 3, 133, 269, 1, 0, 0),
        "one query": (1, 16, 1, 131, 1, 0, 0),
        "few keys": (1, 2, 150, 37, 1, 0, 0),
        "shifted": (1, 2, 160, 240, 1, 3, 0),
        "V with a mean": (1, 2, 256, 1024, 1, 0, 1),
        "20,000 keys": (1, 1, 32, 20_000, 1, 0, 0),
        "45,000 rows": (1, 300, 150, 37, 1, 0, 0),
    }
    print(f"{'':24}{'server':>8}{'worst row':>11}{'* 1.05':>8}{'nvfp4':>8}{'fastvideo_sm120':>17}")
    for head_dim in (64, 128):
        for name, (batch, heads, queries, keys, size, shift, mean) in problems.items():
            q, k, v = (torch.randn(batch, heads, n, head_dim, generator=generator) for n in (queries, keys, keys))
            means = shift * torch.randn(2, batch, heads, 1, head_dim, generator=generator)
            q, k, v = (x.bfloat16() for x in (q * size + means[0], k + means[1], v + mean))
            ours, server = attention(q, k, v, spec=SPEC, impl="eager"), attend(q, k, v)
            grids = [attention(q, k, v, spec=QuantSpec(preset=preset), impl="eager") for preset in ("nvfp4", "fastvideo_sm120")]
            found = [*errors(server, ours), *(errors(each, ours)[0] for each in (1.05 * server, *grids))]
            print(
                f"head_dim {head_dim:3}, {name:14}"
                + "".join(f"{x:{w}.4f}" for x, w in zip(found, (6, 11, 8, 8, 17), strict=True))
            )


if __name__ == "__main__":
    main()
