"""Test oracle: the numerics of docs/NUMERICS.md, dense, in float64, one head at a time.

Written from docs/NUMERICS.md alone and meant to be read next to it: explicit value tables for the two rounding
grids (section 1), full [Lq, Lk] score matrices (sections 3 and 4), and two independent backwards, the formulas of
section 5 and autograd through its straight-through rule. Nothing here is fast, and nothing here is shared with the
implementations that it checks.

Only phi, q - q_shift, k - k_shift and the rotation run in float32, because the sections 1 and 6 put them there, and the
smoothing of section 9 in bfloat16. The key bias of section 6 is rounded to float32.
"""

import math
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

GROUP = 16
P_GLOBAL_SCALE = 2688.0  # g of P~ (section 2): 448 * 6
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
# Midpoints between neighbours of E2M1, and whether a tie goes up (to the even code): the list of section 1.
E2M1_TIES = [(0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)]
# All 127 finite non-negative e4m3 values; the position in the table is the bit pattern.
E4M3 = torch.tensor(
    [(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)], dtype=torch.float64
)

# Section 9: Q, K and V as (axis, rule, four_over_six, then_e4m3), where axis is that of a head's [tokens, D]; then P.
OURS, RECIPROCAL = (-1, "divide", False, False), (-1, "reciprocal", False, False)
PRESETS = {
    "nvfp4": (OURS, OURS, (0, "divide", False, False), "two_level"),
    "nvfp4_qk": (OURS, OURS, None, None),
    "kv_nvfp4": (None, RECIPROCAL, RECIPROCAL, None),
    "kv_nvfp4_fp8": ("e4m3", (-1, "reciprocal", False, True), (-1, "reciprocal", False, True), None),
    "kv_nvfp4_4over6": ("e4m3", (-1, "reciprocal", True, True), (-1, "reciprocal", True, True), None),
    "fa4_fp4": (RECIPROCAL, RECIPROCAL, None, None),
    "sage3": (RECIPROCAL, RECIPROCAL, (0, "reciprocal", False, False), "sage"),
    "fastvideo_sm120": (RECIPROCAL, RECIPROCAL, (0, "reciprocal", False, False), "sage_one_level"),
}


def _e4m3_rn(x):
    """Nearest e4m3 value of x >= 0, ties to the even bit pattern, saturating at 448 (docs/NUMERICS.md, section 1)."""
    x = x.double()
    above = torch.searchsorted(E4M3, x.contiguous()).clamp(1, 126)
    to_below, to_above = x - E4M3[above - 1], E4M3[above] - x
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return E4M3[torch.where(up, above, above - 1)]


def _e2m1_rn(x):
    """Position in E2M1 of the value nearest to x >= 0, by the tie list of docs/NUMERICS.md, section 1; 0 for NaN."""
    index = torch.zeros(x.shape, dtype=torch.int64)
    for midpoint, tie_goes_up in E2M1_TIES:
        index += (x >= midpoint) if tie_goes_up else (x > midpoint)
    return index


def phi(x, axis, g=1.0, four_over_six=False, rule="divide"):
    """NVFP4 and back in groups of 16 along `axis`: docs/NUMERICS.md, section 1; `four_over_six`: section 6.

    Returns xf (float64), codes (uint8, sign << 3 | e2m1 bits) and scales (float64, ceil(n / 16) along `axis`).
    """
    x = x.detach().to(torch.float32).movedim(axis, -1)
    n = x.shape[-1]
    groups = (n + GROUP - 1) // GROUP
    x = torch.nn.functional.pad(x, (0, groups * GROUP - n)).reshape(*x.shape[:-1], groups, GROUP)
    global_scale = torch.tensor(g, dtype=torch.float32)
    amax = x.abs().amax(-1, keepdim=True)

    def round_with(divisor):
        if rule == "divide":
            s = _e4m3_rn((amax * global_scale) / torch.full_like(amax, divisor)).clamp(2.0**-9, 448.0).float()
        else:
            s = _e4m3_rn(amax * global_scale * torch.tensor(1 / divisor, dtype=torch.float32)).float()
        s = s.masked_fill(~amax.isfinite(), math.nan)
        x_scaled = (x * global_scale) / s if rule == "divide" else torch.where(s == 0, 0.0, (x * global_scale) * (1 / s))
        index = _e2m1_rn(x_scaled.abs())
        # In units of the power of two below amax, at most 1/2, squared in float32 and cut to 28 bits behind the point.
        error = (E2M1[index] * s.double() - (x * global_scale).abs().double()).float().double().abs()
        error = torch.ldexp(error, 1 - torch.frexp(amax * global_scale).exponent).clamp(max=0.5).float().square()
        return index, s, (error.double() * 2**28).floor().sum(-1, keepdim=True)

    index, s, error = round_with(6.0)
    if four_over_six:
        index4, s4, error4 = round_with(4.0)
        better = error4 < error
        index, s = torch.where(better, index4, index), torch.where(better, s4, s)
    sign = torch.signbit(x)
    xf = torch.where(sign, -E2M1[index], E2M1[index]) * s.double() / g
    codes = (sign.long() * 8 + index).to(torch.uint8)
    xf, codes = (t.flatten(-2)[..., :n].movedim(-1, axis) for t in (xf, codes))
    return xf, codes, s.double().squeeze(-1).movedim(-1, axis)


def hadamard(d):
    """Sylvester-Hadamard matrix of size d with entries +-1/8, float32 (docs/NUMERICS.md, section 6)."""
    if d < 1 or d & (d - 1):
        raise ValueError(f"rotate needs a power of two, not {d}")
    signs = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(d)] for i in range(d)]
    return torch.tensor(signs, dtype=torch.float32) / 8


def _straight_through(x, xf):
    """x + detach(xf - x), with the value exactly xf (docs/NUMERICS.md, section 5).

    The sum in the order written there is off by an ulp of float64, which is enough to flip a code of P~.
    """
    return xf.detach() + (x - x.detach())


def in_format(x, how, four_over_six=False):
    """A head's Q, K or V in a format of PRESETS; the option `four_over_six` changes those of section 6."""
    if how is None:
        return x
    if how == "e4m3":
        return torch.copysign(_e4m3_rn(x.float().abs()), x)
    axis, rule, always, then_e4m3 = how
    xf = phi(x, axis, four_over_six=four_over_six or always, rule=rule)[0]
    return torch.copysign(_e4m3_rn(xf.abs()), xf) if then_e4m3 else xf


def sage_p(p, g):
    """Section 9: phi of P~ with codes that divide by the scale before it is rounded."""
    n = p.shape[-1]
    x = torch.nn.functional.pad(p.float(), (0, -n % GROUP)).reshape(*p.shape[:-1], -1, GROUP)
    amax = x.amax(-1, keepdim=True)
    index = _e2m1_rn(torch.where(amax == 0, 0.0, x * (torch.tensor(6.0) / amax)))
    return (E2M1[index] * _e4m3_rn(amax * torch.tensor(g / 6, dtype=torch.float32)) / g).flatten(-2)[..., :n]


def sage_smooth(q, k):
    """Section 9: Q and K as they are quantized, and what is added to their scores; each with the gradient of what it rounds."""

    def bf16(x, exact):
        return _straight_through(exact, x.detach().float().bfloat16().double())

    q, k = bf16(q, q), bf16(k, k)  # what a server is given
    centred_k = bf16(k - bf16(k.mean(0), k.mean(0)), k - k.mean(0))
    blocks = torch.arange(q.shape[0]) // 128
    mean = torch.zeros(int(blocks[-1]) + 1, q.shape[1], dtype=torch.float64).index_add(0, blocks, q) / 128
    centred_q = bf16(q - mean.float().double()[blocks], q - mean[blocks])
    added = bf16(mean, mean) @ centred_k.T
    return centred_q, centred_k, bf16(added, added)[blocks]


def _quantize_rows(x, shift, rotate, four_over_six, how=OURS):
    """QF or KF of one head: shift, rotate and phi along the head dim (docs/NUMERICS.md, sections 2, 6 and 9)."""
    if how is None:
        return x
    rounded = x.detach().to(torch.float32)
    if shift is not None:
        x, rounded = x - shift.double(), rounded - shift.float()
    if rotate:
        h = hadamard(x.shape[-1])
        x, rounded = x @ h.double(), rounded @ h
    return _straight_through(x, in_format(rounded, how, four_over_six))


def _key_bias(k, shift, q_shift):
    """b of one head, in float32, with the gradient of c . (k - s) (docs/NUMERICS.md, section 6)."""
    rounded, exact = k.detach().float(), k
    if shift is not None:
        rounded, exact = rounded - shift.float(), exact - shift.double()
    return _straight_through(exact @ q_shift.double(), (rounded.double() @ q_shift.double()).float().double())


def _ceil_max(s):
    """Ceiled row maximum, -inf for rows without a key (docs/NUMERICS.md, section 3)."""
    # The extra column lets rows of zero keys have a maximum.
    return torch.cat([s, s.new_full((s.shape[0], 1), -math.inf)], -1).amax(-1, keepdim=True).ceil()


def _who_sees_whom(lq, lk, first, causal, window, block_size, prefix, bounds):
    """Section 4, query by query: a table [lq, lk - first] of what is seen, and one of what would be kept.

    Keys count from the first allowed one; `bounds` are those of this sequence, [lq] each, in the caller's positions.
    """
    keys = lk - first
    seen, kept = (torch.zeros(lq, keys, dtype=torch.bool) for _ in range(2))
    for i in range(lq):
        if bounds is not None:
            lower, upper = (int(bound[i]) - first for bound in bounds)
        elif causal:
            upper = ((i + lk - lq - first) // block_size + 1) * block_size - 1
            lower = 0 if window is None else upper - window + 1
            upper = min(upper, keys - 1)
        else:
            seen[i] = True
            continue
        j, in_prefix = torch.arange(keys), min(prefix, keys)
        seen[i] = (j < in_prefix) | ((lower <= j) & (j <= upper))
        kept[i] = (j // GROUP == 0) | (j // GROUP == max(upper, in_prefix - 1) // GROUP)
    return seen, kept


def _head(q, k, v, valid, seen, kept, *, preset, rotate, four_over_six, scale, shift, q_shift, softcap, sink):
    """Forward of one head, differentiable by the rule of section 5 (docs/NUMERICS.md, sections 3 and 4).

    `k` and `v` start at the first allowed key of the sequence, so that groups along tokens start at index 0; so do the tables
    `seen` and `kept`. `sink` is a number or None.
    """
    k, v = (torch.where(valid[:, None], x, torch.zeros_like(x)) for x in (k, v))
    allowed = seen & valid
    kept = kept & allowed

    q_format, k_format, v_format, p_format = PRESETS[preset]
    added = 0.0
    if preset == "sage3":
        q, k, added = sage_smooth(q, k)
    qf = _quantize_rows(q, q_shift, rotate, four_over_six, q_format)
    kf = _quantize_rows(k, shift, rotate, four_over_six, k_format)
    factor = scale * 64 / q.shape[-1] if rotate else scale
    s, slope, log2_e = qf @ kf.T + added, 1.0, math.log2(math.e)
    if q_shift is not None:
        s = s + _key_bias(k, shift, q_shift) * (q.shape[-1] / 64 if rotate else 1)
    if softcap is None:
        s = s * (factor * log2_e)
    else:
        capped = torch.tanh(s * factor / softcap)
        s, slope = capped * softcap * log2_e, 1 - capped**2
    s = s.masked_fill(~allowed, -math.inf)

    # Codes of P~ are those against m; everything else is relative to the maximum of all keys, kept ones included, an
    # integer too, so the change of reference is an exact power of two and nothing overflows.
    m = _ceil_max(s.detach().masked_fill(kept, -math.inf))
    top = _ceil_max(s.detach())
    if sink is not None:
        top = torch.maximum(top, (sink.detach() * log2_e).ceil())
    top = torch.where(top == -math.inf, 0.0, top)
    exp_scores = torch.exp2(s - top)
    row_sum = exp_scores.sum(-1, keepdim=True)
    if sink is not None:
        row_sum = row_sum + torch.exp2(sink * log2_e - top)
    norm = torch.where(row_sum == 0, 1.0, row_sum)
    p = exp_scores / norm
    pf, vf = p, v if v_format is None else _straight_through(v, in_format(v, v_format, four_over_six))
    if p_format is not None:
        p_tilde = torch.where(allowed & ~kept, torch.exp2(s.detach() - m), 0.0)
        if p_format == "two_level":
            rounded_p = phi(p_tilde, -1, g=P_GLOBAL_SCALE)[0]
        else:
            rounded_p = sage_p(p_tilde, P_GLOBAL_SCALE if p_format == "sage" else 1.0)
        pf = _straight_through(p, rounded_p * torch.exp2(m - top) / norm)
    else:
        kept = torch.zeros_like(kept)
    high = p.masked_fill(~kept, 0.0) @ v
    return SimpleNamespace(
        out=pf.masked_fill(kept, 0.0) @ vf + high,
        out_hp=p.masked_fill(kept, 0.0) @ vf + high,
        lse=(top + torch.log2(row_sum)).squeeze(-1) * math.log(2),
        p_sink=None if sink is None else torch.exp2(sink * log2_e - top) / norm, slope=slope,
        m=m.squeeze(-1), p=p, pf=pf, kept=kept, qf=qf, kf=kf, v=v, vf=vf, factor=factor,
    )  # fmt: skip


def _heads(
    q, k, v, *, preset="nvfp4", rotate=False, four_over_six=False, causal=False, scale=None, key_mask=None, k_shift=None,
    q_shift=None, window=None, block_size=1, prefix=0, bounds=None, softcap=None, sinks=None,
):  # fmt: skip
    """Yields (b, h, kv, first, _head(...)) for every query head (docs/NUMERICS.md, Notation, sections 3 and 4)."""
    q, k, v = q.double(), k.double(), v.double()
    (batch, heads, lq, d), (kv_heads, lk) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    for b in range(batch):
        valid = torch.ones(lk, dtype=torch.bool) if key_mask is None else key_mask[b]
        first = int(valid.nonzero()[0]) if valid.any() else lk
        of_batch = None if bounds is None else [x.expand(batch, -1)[b] for x in bounds]
        seen, kept = _who_sees_whom(lq, lk, first, causal, window, block_size, prefix, of_batch)
        for h in range(heads):
            kv = h // (heads // kv_heads)
            shift = None if k_shift is None else k_shift[kv]
            head = _head(
                q[b, h], k[b, kv, first:], v[b, kv, first:], valid[first:], seen, kept,
                preset=preset, rotate=rotate, four_over_six=four_over_six, scale=scale, shift=shift,
                q_shift=None if q_shift is None else q_shift[kv], softcap=softcap,
                sink=None if sinks is None else sinks[h].double(),
            )  # fmt: skip
            if shift is not None:
                head.lse = head.lse + scale * (q[b, h] @ shift.double())
            yield b, h, kv, first, head


@torch.no_grad()
def attention(q, k, v, **options):
    """The forward, docs/NUMERICS.md, sections 3, 4 and 6: dict of "out" O, "out_hp" O', "lse" and "row_max" m (float64)."""
    out, row = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64), torch.zeros(q.shape[:-1], dtype=torch.float64)
    result = {"out": out, "out_hp": out.clone(), "lse": row, "row_max": row.clone()}
    for b, h, _, _, head in _heads(q, k, v, **options):
        for name, value in (("out", head.out), ("out_hp", head.out_hp), ("lse", head.lse), ("row_max", head.m)):
            result[name][b, h] = value
    return result


def _score_gradients(head, do):
    """dP and D of one head (docs/NUMERICS.md, section 5)."""
    dp = torch.where(head.kept, do @ head.v.T, do @ head.vf.T)
    return dp, (do * head.out_hp).sum(-1, keepdim=True)


@torch.no_grad()
def backward(q, k, v, grad_out, **options):
    """(dq, dk, dv) by the formulas of docs/NUMERICS.md, section 5, and with sinks theirs; options as for `attention`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    dsinks = torch.zeros(q.shape[1], dtype=torch.float64)
    for b, h, kv, first, head in _heads(q, k, v, **options):
        do = grad_out[b, h].double()
        dp, delta = _score_gradients(head, do)
        ds = head.p * (dp - delta) * head.slope
        if head.p_sink is not None:
            dsinks[h] -= (head.p_sink * delta).sum()
        back = hadamard(q.shape[-1]).double().T if options.get("rotate") else torch.eye(q.shape[-1], dtype=torch.float64)
        dq[b, h] = head.factor * ds @ head.kf @ back
        dk[b, kv, first:] += head.factor * ds.T @ head.qf @ back
        if (q_shift := options.get("q_shift")) is not None:
            scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
            dk[b, kv, first:] += scale * ds.sum(0)[:, None] * q_shift[kv].double()
        dv[b, kv, first:] += torch.where(head.kept, head.p, head.pf).T @ do
    return (dq, dk, dv) if options.get("sinks") is None else (dq, dk, dv, dsinks)


@torch.no_grad()
def uncancelled(q, k, v, grad_out, **options):
    """The norms that dQ and dK would have if nothing cancelled: |dP| + |D| for dP - D, magnitudes in the products after it.

    Where softmax saturates, dP - D is an exact zero whose roundoff is relative to these norms and not to the gradient's.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for b, h, _, _, head in _heads(q, k, v, **options):
        dp, delta = _score_gradients(head, grad_out[b, h].double())
        ds = head.factor * head.p * (dp.abs() + delta.abs()) * head.slope
        squares += torch.stack([x.square().sum() for x in (ds @ head.kf.abs(), ds.T @ head.qf.abs())])
    if options.get("rotate"):
        squares *= q.shape[-1] / 64  # the rotation back multiplies norms by sqrt(D) / 8
    return squares.sqrt()


@torch.enable_grad()
def autograd_backward(q, k, v, grad_out, **options):
    """(dq, dk, dv, and dsinks) by autograd through the straight-through rule of docs/NUMERICS.md, section 5; options as above."""
    sinks = [] if (given := options.pop("sinks", None)) is None else [given]
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v, *sinks)]
    outs, grads = [], []
    for b, h, _, _, head in _heads(*leaves[:3], **options, sinks=leaves[3] if sinks else None):
        outs.append(head.out)
        grads.append(grad_out[b, h].double())
    return torch.autograd.grad(outs, leaves, grads)


def tangent(q, k, v, tangents, **options):
    """The tangent of O along those of q, k, v and any sinks, by forward-mode differentiation of the same rule."""
    sinks = [] if (given := options.pop("sinks", None)) is None else [given]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach().double(), t.double()) for x, t in zip((q, k, v, *sinks), tangents, strict=True)]
        for b, h, _, _, head in _heads(*duals[:3], **options, sinks=duals[3] if sinks else None):
            along = forward_ad.unpack_dual(head.out).tangent
            out[b, h] = 0.0 if along is None else along
    return out
