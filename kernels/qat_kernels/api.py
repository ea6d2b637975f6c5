"""The public attention: validate, resolve, call. docs/NUMERICS.md has the formulas."""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import kv_only
from .arguments import Features, Impl, PackingArguments, check, not_computed
from .derivatives import attention_under_transforms, attention_with_gradient
from .dispatch import resolve, why_not_sdpa
from .mask import Bounds
from .ops import NO_EXTRAS, Extras, attention_forward, forward, op_arguments, seen_by_others
from .spec import INFERENCE_KERNELS, NVFP4, QuantSpec
from .transforms import transformed
from .varlen import Packing
from .verdicts import Verdicts


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: torch.Tensor | None = ...,
    k_shift: torch.Tensor | None = ...,
    q_shift: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    window: int | None = ...,
    block_size: int = ...,
    prefix: int = ...,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl | Verdicts = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: torch.Tensor | None = ...,
    k_shift: torch.Tensor | None = ...,
    q_shift: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    window: int | None = ...,
    block_size: int = ...,
    prefix: int = ...,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: Impl | Verdicts = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = NVFP4,
    causal: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    k_shift: torch.Tensor | None = None,
    q_shift: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    block_size: int = 1,
    prefix: int = 0,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: Impl | Verdicts = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """4-bit attention with the straight-through gradient of docs/NUMERICS.md.

    These derivatives exist: `backward`, and `torch.func`'s `grad`, `vjp`, `jacrev`; forward mode, which is `torch.func`'s `jvp`,
    `jacfwd`, `linearize` and `torch.autograd.forward_ad`; `vmap` over any of them, one sample after the other. The gradient may
    go through the output of a `jvp`, with its tangent detached. Under `torch.compile` all except `backward` and `vmap` break the
    graph. Second derivatives are refused, and so is a tangent with `impl="fp4"`, `impl="sageattn3"` or `return_lse`.

    Args:
        q: queries [B, H, Lq, D], or packed [total_q, H, D]; D a multiple of 16 up to 256; float32, float16, bfloat16 (float64
            for tests). Strides may be any: a transposed view costs no copy.
        k, v: keys and values [B, Hk, Lk, D], or packed [total_k, Hk, D], of the same dtype and device; H is a multiple of Hk
            (grouped-query attention: query head h reads key head h // (H / Hk)). `v` may have another head dim Dv than `q` and
            `k`, also a multiple of 16 up to 256 (MLA: 192 and 128).
        spec: what is quantized, and how.
        causal: query i may see key j if j <= i + (Lk - Lq). The query's own group of 16 keys and the first group of the
            sequence stay in high precision (section 4), which makes the result strictly causal.
        scale: factor of the scores; default D ** -0.5.
        key_mask: bool [B, Lk], True where a key may be seen. Excluded keys and values are never used, and may hold anything,
            also NaN. Groups along tokens are counted from the first allowed key. Not with packed sequences: pack only the
            allowed tokens.
        k_shift: float32 [Hk, D], subtracted from the keys before quantization. Each row of exact scores changes by a constant, so
            the result does not change.
        q_shift: float32 [Hk, D], subtracted from the queries of all query heads that share this key head, before quantization.
            Its product with the unquantized keys is added to the scores again, so that exact scores do not change
            (section 6). Both shifts have no gradient.
        cu_seqlens_q, cu_seqlens_k: packed sequences, in the convention of FlashAttention's varlen functions: int32
            [documents + 1] on the device of `q`, starting at 0, never decreasing and ending at total_q (total_k). Document n
            is the tokens from entry n to entry n + 1, and may be empty. Its queries see its keys, and the result is that
            of the document alone: Lq and Lk above, groups of 16 along tokens and kept groups are those of each document.
        max_seqlen_q, max_seqlen_k: with packed sequences, at least the length of the longest document.
        window: with `causal`, how many keys a query sees, counted back from the last one that it may see: with block size 1
            its own and `window - 1` before it, like `sliding_window` of Transformers. The group of 16 in which a window
            begins is not kept: a V scale may have been set by up to 15 tokens that the query does not see (section 4).
        block_size: with `causal`, the tokens of a block (a frame, a chunk of frames). A query sees its own block to the end, and
            with `window` that many keys counted back from there. Blocks are counted from the first allowed key. Default 1.
        prefix: with `causal` or `bounds`, every query also sees this many first keys, counted from the first allowed one:
            attention sinks of video models, prefixes of images.
        bounds: (lower, upper), the first and the last key that each query sees, int32 [B, Lq] or [1, Lq] on the device of `q`,
            neither ever decreasing along the queries, lower from 0 to Lk, upper from -1 to Lk - 1; lower > upper sees none.
            They replace `causal`, `window` and `block_size`; `key_mask` and `prefix` apply too. Positions are those of `k`
            as given, padding included: query i of a causal call has upper i + (Lk - Lq) with any padding. Not with
            packed sequences. Groups are kept for all values of the bounds.
        softcap: scores become softcap * tanh(scores / softcap), after `scale` and before softmax (Gemma 2). Not with `k_shift`.
        sinks: one logit for each query head, [H] in float32 or the dtype of `q`. It is part of the denominator of the softmax and
            of the log-sum-exp, and has a gradient (gpt-oss). Not with `k_shift`.
        return_lse: also return the log-sum-exp of the true scores, not differentiable.
        impl: `eager` is PyTorch on any device. `triton` is the fused kernels, for NVIDIA GPUs from sm_80 on and all dtypes except
            float64; their matrix products take bfloat16 operands, which hold quantized values exactly, and sum in float32.
            `fp4` is the kernel for FP4 units, without a gradient; other GPUs from sm_80 on emulate it. `sageattn3` is
            SageAttention3's own kernel if it is installed: for the preset `sage3` in 16 bits, without a gradient, on GPUs with
            FP4 units. `sdpa` is PyTorch's own attention, only for specs that quantize K and V alone (`QuantSpec.kv_only`).
            `auto` takes `triton` or `sdpa` where it can run, and `eager` elsewhere. `Verdicts` are like `auto`, but take
            `fp4` or `sageattn3` if a self-check on this GPU found it right and faster, and the call needs no derivative.
            Only `eager` and `triton` compute `window`, `block_size`, `prefix`, `bounds`, `softcap` and `sinks`, and take values
            of another head dim. `auto` and `Verdicts` choose accordingly. `explain` says what runs, and why.

    Returns:
        The output in the shape (with Dv), dtype and stride order of `q` (of `sdpa`: in PyTorch's own order); with `return_lse`
        also float32 [B, H, Lq] (float64 for float64 inputs), packed [H, total_q] as FlashAttention's varlen functions return it:
        the rows of a head lie together in both layouts, so that one head stride addresses them. Rows that may see no key are 0;
        their log-sum-exp is -inf, or with `sinks` the sink of their head.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `impl` cannot run here, or the derivative does not exist (for a
            second one: when it is computed). The message says what was expected. Only `eager` checks the
            values of `cu_seqlens` and `bounds`, on any device. Kernels on a GPU never copy them to the host, because that would
            wait for all work queued before, so they do not notice wrong values.
    """
    packed = None
    if not (cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None):
        packed = PackingArguments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    features = Features(window, block_size, prefix, bounds, softcap, sinks)
    chosen: Impl = "auto" if isinstance(impl, Verdicts) else impl
    call = check(
        q, k, v, spec, key_mask, k_shift, q_shift, packed, features, chosen, causal=causal, scale=scale, return_lse=return_lse
    )
    needs_gradient = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    under_transforms = transformed()
    packing, extras = None, NO_EXTRAS
    if not (key_mask is k_shift is q_shift is packed is bounds is sinks is None):
        packing = None if packed is None else Packing(*packed)  # type: ignore[arg-type]  # checked
        extras = Extras(key_mask, k_shift, q_shift, packing, None if bounds is None else Bounds(*bounds), sinks)
    if isinstance(impl, Verdicts) and impl.win:
        chosen = _with_verdicts(impl, q, k, spec, causal, needs_gradient or under_transforms, packing, call.asked)
    if chosen == "auto":
        chosen = resolve(q.device, q.dtype, spec.preset, packing is not None, call.asked)
    elif chosen in INFERENCE_KERNELS and needs_gradient:
        raise ValueError(f"attention: impl={chosen!r} has no gradient; call it under torch.no_grad(), or use impl='triton'")
    if chosen == "sdpa":
        reason = why_not_sdpa(q.device, q.dtype, packing is not None)
        if reason is not None:
            raise ValueError(f"attention: impl='sdpa': {reason}; use impl='eager'")
        if not under_transforms:
            return kv_only.attention(q, k, v, key_mask, packing, spec=spec, causal=causal, scale=call.scale)
    if under_transforms and chosen not in INFERENCE_KERNELS:  # nothing here shows which transform needs a derivative
        needs_gradient = torch.is_grad_enabled()
    options = call.options(chosen, needs_gradient)
    if under_transforms:
        out, _, lse, *_ = attention_under_transforms(return_lse, *op_arguments(q, k, v, extras, options))
    elif seen_by_others(q, k, v, *(() if sinks is None else (sinks,))):
        out, _, lse, *_ = attention_forward(*op_arguments(q, k, v, extras, options))
    elif needs_gradient:
        out, lse = attention_with_gradient(q, k, v, extras, options)
    else:
        out, _, lse, *_ = forward(q, k, v, extras, options)
    return (out, lse.detach()) if return_lse else out


def _with_verdicts(
    verdicts: Verdicts,
    q: torch.Tensor,
    k: torch.Tensor,
    spec: QuantSpec,
    causal: bool,
    needs_derivative: bool,
    packing: Packing | None,
    asked: tuple[str, ...],
) -> Impl:
    """The kernel for inference, if it was checked, wins and computes all that is `asked`.

    For packed sequences the mean length counts: most are short.
    """
    kernel = spec.inference_kernel
    if needs_derivative or kernel is None or (asked and not_computed(kernel, asked)):
        return "auto"
    documents = None if packing is None else max(packing.cu_seqlens_q.shape[0] - 1, 1)
    queries, keys = (q.shape[2], k.shape[2]) if documents is None else (q.shape[0] // documents, k.shape[0] // documents)
    return kernel if verdicts.take_kernel(q.device, q.dtype, q.shape[-1], causal, spec.to_json(), queries, keys) else "auto"
