"""`KVCache` in eager PyTorch, with the functions of launch.py: the reference of the kernels, and what runs where they cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qat_kernels import nvfp4, reference
from qat_kernels.spec import GROUP_SIZE, NVFP4Format

from .byte_layout import (
    BLOCK_SCALES,
    BLOCK_TOKENS,
    ROW_MULTIPLE,
    CacheTensors,
    group_places,
    pack_rows,
    row_words,
    unpack_rows,
)


def append(
    cache: CacheTensors,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
) -> None:
    """Quantize and store K and V of the last slots, for which there is room already."""
    start, formats = cache.length - k.shape[2], cache.spec.formats
    k = k.float()
    if key_mask is not None:
        assert cache.leftpad is not None
        new_mask = key_mask[:, start:]
        k, v = (torch.where(new_mask[:, None, :, None], x, 0.0) for x in (k, v))
        begin = start + torch.where(new_mask.any(1), new_mask.int().argmax(1), k.shape[2]).int()
        cache.leftpad.copy_(torch.where(cache.leftpad >= start, begin, cache.leftpad))
    stored = {}
    with torch.autocast(k.device.type, enabled=False):
        k = k if k_shift is None else k - k_shift[:, None]
        if q_shift is not None:
            stored["key_bias"] = reference.key_bias(k, q_shift, cache.spec, reference.accumulator(v.dtype))
        k = reference.rotated(k, cache.spec)
    stored["key_codes"], stored["key_scales"] = _quantized_rows(k, formats.key)
    if cache.spec.kv_only:
        assert formats.value is not None
        stored["value_codes"], stored["value_scales"] = _quantized_rows(v, formats.value)
    else:
        _append_values(cache, v, start)
    for name, new in stored.items():
        for rows, leftpad in _rows(cache):
            count = cache.length - leftpad
            old = max(start - leftpad, 0, count - cache.capacity)
            if old < count:
                places = torch.arange(old, count, device=k.device) % cache.capacity
                cache.packed[name][rows, :, places] = new[rows, :, leftpad + old - start :]


def attend(
    cache: CacheTensors,
    q: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O in the strides of q, and LSE [B, H, n], of the last n tokens in the cache."""
    dtype = reference.accumulator(q.dtype)
    leftpad = torch.zeros(1, dtype=torch.int32, device=q.device) if cache.leftpad is None else cache.leftpad
    tokens = _Tokens(_first_read(cache, leftpad, q.shape[2]), cache.length - int(leftpad.min()))
    key = _tokens(cache, "key", tokens, q.shape[-1]).to(dtype)
    key_bias = None
    if q_shift is not None:
        key_bias = cache.packed["key_bias"][:, :, tokens.numbers(q.device) % cache.capacity]
    slots = tokens.numbers(q.device) + leftpad[:, None]
    allowed = slots < cache.length
    if cache.spec.kv_only:
        value = _tokens(cache, "value", tokens, q.shape[-1]).to(dtype)
        value = value_fq = torch.where(allowed[:, None, :, None], value, 0.0)  # what was cropped may not be finite
    else:
        value, value_fq = _values(cache, leftpad, tokens, q.shape[2], dtype)
    if key_mask is not None:
        allowed &= key_mask.gather(1, slots.clamp(max=cache.length - 1))
    allowed = allowed.expand(q.shape[0], -1)
    positions = torch.arange(cache.length - q.shape[2], cache.length, device=q.device) - leftpad[:, None] - tokens.start
    options: dict[str, Any] = {"spec": cache.spec, "scale": scale, "window": cache.window, "softcap": softcap, "sinks": sinks}
    with torch.autocast(q.device.type, enabled=False):
        return reference.forward_cached(q, key, value_fq, value, allowed, positions, k_shift, q_shift, key_bias, **options)


class _Tokens(NamedTuple):
    """A range of tokens, counted from each sequence's first allowed slot."""

    start: int
    """Where a group begins."""
    stop: int

    def numbers(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.start, max(self.start, self.stop), device=device)


def _first_read(cache: CacheTensors, leftpad: torch.Tensor, queries: int) -> int:
    """The first token to be read. It is one group before the windows, because the first group that is read counts as kept."""
    if cache.window is None:
        return 0
    first_seen = cache.length - queries - (cache.window - 1) - int(leftpad.max())
    return max(0, first_seen // GROUP_SIZE - 1) * GROUP_SIZE


def _rows(cache: CacheTensors) -> list[tuple[slice, int]]:
    """Parts of the batch with the same first allowed slot."""
    if cache.leftpad is None:
        return [(slice(None), 0)]
    return [(slice(row, row + 1), leftpad) for row, leftpad in enumerate(cache.leftpad.tolist())]


def _quantized_rows(x: torch.Tensor, how: NVFP4Format) -> tuple[torch.Tensor, torch.Tensor]:
    """K or V [B, Hk, n, D] along the head dim, as `pack_rows` returns it."""
    x = F.pad(x, (0, row_words(x.shape[-1]) * ROW_MULTIPLE - x.shape[-1]))
    return pack_rows(*_bytes(nvfp4.quantize(x, four_over_six=how.four_over_six, scale=how.scale)))


def _tokens(cache: CacheTensors, name: str, tokens: _Tokens, head_dim: int) -> torch.Tensor:
    """The inverse of `_quantized_rows`: tokens of "key" or "value", float32 [B, Hk, n, D]. Cropped tokens may be among them."""
    places = tokens.numbers(cache.packed["key_codes"].device) % cache.capacity
    codes, scales = (cache.packed[f"{name}_{part}"][:, :, places] for part in ("codes", "scales"))
    return _dequantize(*unpack_rows(codes, scales, head_dim))


def _append_values(cache: CacheTensors, v: torch.Tensor, start: int) -> None:
    """Store V of the slots from `start` on: groups along the tokens that are complete now, the sink group and the ring."""
    assert cache.recent is not None
    known_start = max(start - GROUP_SIZE + 1, 0)
    known = torch.cat((_recent_values(cache, slice(None), known_start, start), v), 2)  # also of the group that was open
    ring_size = cache.recent.shape[2]
    last = torch.arange(max(start, cache.length - ring_size), cache.length, device=v.device)
    cache.recent[:, :, last % ring_size] = v[:, :, last - start]
    places = cache.packed["value_codes"].unflatten(-1, (2, 2, BLOCK_SCALES // 2, 4))  # h, lane of a group, i, bytes of a word
    scale_places = cache.packed["value_scales"].unflatten(-1, (2, BLOCK_SCALES // 2))
    for rows, leftpad in _rows(cache):
        count, old = cache.length - leftpad, max(start - leftpad, 0)
        if count <= 0:
            continue
        values = known[rows]
        if old < GROUP_SIZE:
            new = values[:, :, leftpad + old - known_start :][:, :, : GROUP_SIZE - old]
            cache.packed["sink"][rows, :, old : old + new.shape[2]] = new
        closed = count // GROUP_SIZE
        opened = max(old // GROUP_SIZE, 1, closed - cache.capacity // GROUP_SIZE)  # the sink group is never read
        if opened < closed:
            complete = torch.arange(opened, closed, device=v.device)
            from_known = leftpad - known_start
            span = slice(from_known + opened * GROUP_SIZE, from_known + closed * GROUP_SIZE)
            groups = values[:, :, span].unflatten(2, (-1, GROUP_SIZE)).mT  # [B, Hk, groups, D, 16]
            groups, group_scales = _bytes(nvfp4.quantize(groups, four_over_six=cache.spec.four_over_six))  # and [..., 1]
            # A group is half of a row of 32: its two lanes' words stand apart in a row of 128.
            words, _ = pack_rows(groups, group_scales)
            words = words.unflatten(-1, (4, 4))[..., :2, :]
            block, h, i = group_places(complete % (cache.capacity // GROUP_SIZE))
            places[rows][:, :, block, :, h, :, i] = words.movedim(2, 0)
            scale_places[rows][:, :, block, :, h, i] = group_scales[..., 0].movedim(2, 0)


def _values(
    cache: CacheTensors, leftpad: torch.Tensor, tokens: _Tokens, queries: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """V [B, Hk, n, D] twice: as the kept groups of the last `queries` tokens read it, and quantized along the tokens."""
    packed, (start, stop) = cache.packed, tokens
    first_block = start // BLOCK_TOKENS
    blocks = torch.arange(first_block, max(first_block, -(-stop // BLOCK_TOKENS)), device=leftpad.device) % cache.num_blocks
    by_column = _dequantize(*unpack_rows(packed["value_codes"][:, :, blocks], packed["value_scales"][:, :, blocks], BLOCK_TOKENS))
    by_token = by_column.mT.flatten(2, 3)[:, :, start - first_block * BLOCK_TOKENS :][:, :, : max(0, stop - start)]
    complete = (cache.length - leftpad)[:, None] // GROUP_SIZE * GROUP_SIZE
    # Cropped tokens may lie behind the last complete group.
    value_fq = torch.where((tokens.numbers(leftpad.device) < complete)[:, None, :, None], by_token, 0.0).to(dtype)
    value = value_fq.clone()
    if start == 0:
        value[:, :, :GROUP_SIZE] = packed["sink"][:, :, :stop]
    for rows, begin in _rows(cache):
        count = cache.length - begin
        opened = max(count - queries, GROUP_SIZE) // GROUP_SIZE * GROUP_SIZE  # behind the sink group
        if opened < count:
            value[rows, :, opened - start : count - start] = _recent_values(cache, rows, begin + opened, cache.length).to(dtype)
    return value, value_fq


def _recent_values(cache: CacheTensors, rows: slice, start: int, stop: int) -> torch.Tensor:
    """V of these slots, [B, Hk, n, D], from the ring."""
    assert cache.recent is not None
    slots = torch.arange(start, stop, device=cache.recent.device)
    return cache.recent[rows, :, slots % cache.recent.shape[2]]


def _bytes(quantized: nvfp4.Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, both as uint8."""
    return quantized.codes, quantized.scales.view(torch.uint8)


def _dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return nvfp4.dequantize(codes, scales.contiguous().view(torch.float8_e4m3fn))
