"""The keys and values of one attention layer in NVFP4, for generation: docs/NUMERICS.md, section 4, token by token.

K is quantized as it arrives, V as soon as a group of 16 tokens is complete. The values of the kept groups stay as they are:
those of the sink group, and of the last tokens, among them the open group. So attention over the cache is causal attention
over all of its tokens, computed once or again.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal, overload

import torch

from qat_kernels import nvfp4, reference
from qat_kernels.api import attention
from qat_kernels.arguments import Impl, validate
from qat_kernels.dispatch import needs_triton, resolve
from qat_kernels.spec import GROUP_SIZE, NVFP4, QuantSpec
from qat_kernels.transforms import transformed

from .byte_layout import BLOCK_BYTES, BLOCK_SCALES, BLOCK_TOKENS, CacheTensors, group_places, pack_rows, row_words, unpack_rows

RECENT_TOKENS = 48
"""The last tokens, whose values are also kept as they are: the open group, and enough that `crop` can go back some steps."""
_GROW = 64
"""Room for new tokens is made for 1/64 of the tokens at a time, in whole blocks: a copy now and then, little memory unused."""


class KVCache:
    """Packed keys and values of one layer, which `attention` extends and attends to.

    Slots are the columns of a batch, padding included. Inside, tokens are counted from each sequence's first allowed slot, as
    groups along tokens are. 4.5 bits a value, and 64 tokens of V in the dtype of the inputs.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        """Slots filled so far."""
        self.spec: QuantSpec | None = None
        self._packed: dict[str, torch.Tensor] = {}
        """Codes and scales of K [B, Hk, capacity, bytes] and V [B, Hk, blocks, D, bytes]; V of the sink group [B, Hk, 16, D]. In
        this order, in which the kernels take them."""
        self._recent = torch.empty(0, 0, 0, 0)
        """A ring [B, Hk, n, D] of V of the last slots, 0 where excluded: that of slot s is at s % n. At first n is 0."""
        self._recent_start = 0
        """The first slot whose V is in the ring."""
        self._leftpad: torch.Tensor | None = None
        """int32 [B]: the first allowed slot of each sequence, not below `length` where there is none yet; None: no mask came."""

    @property
    def batch(self) -> int:
        """Sequences in the batch; 0 before the first call."""
        return self._recent.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(x.numel() * x.element_size() for x in (*self._packed.values(), self._recent))

    @overload
    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        spec: QuantSpec = ...,
        scale: float | None = ...,
        key_mask: torch.Tensor | None = ...,
        k_shift: torch.Tensor | None = ...,
        return_lse: Literal[False] = ...,
        impl: Impl = ...,
    ) -> torch.Tensor: ...

    @overload
    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        spec: QuantSpec = ...,
        scale: float | None = ...,
        key_mask: torch.Tensor | None = ...,
        k_shift: torch.Tensor | None = ...,
        return_lse: Literal[True],
        impl: Impl = ...,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        spec: QuantSpec = NVFP4,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
        k_shift: torch.Tensor | None = None,
        return_lse: bool = False,
        impl: Impl = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Add k and v to the cache; causal `qat_kernels.attention` from q to all that it holds then.

        Args:
            q, k, v: [B, H, n, D] and [B, Hk, n, D]: the next n slots of each sequence.
            key_mask: bool [B, length + n], over all slots; it may not change where it was given before.
            Others: as for `qat_kernels.attention`, the same at every call.

        Returns:
            As `qat_kernels.attention`, with no gradient.

        Raises:
            ValueError: as `qat_kernels.attention`; the inputs do not continue what the cache holds; V is not quantized
                (`pv="bf16"`); or a derivative is asked for. The cache is as it was then.
        """
        self._check(q, k, v, spec, key_mask, k_shift, impl)
        impl = resolve(q.device, q.dtype) if impl == "auto" else impl
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if self.length == 0:
            # The same numbers as over the cache, computed in one piece.
            with torch.no_grad():
                result = attention(
                    q, k, v, spec=spec, causal=True, scale=scale, key_mask=key_mask, k_shift=k_shift, return_lse=True, impl=impl
                )
            self._extend(k, v, key_mask, k_shift, spec, impl)
        else:
            self._extend(k, v, key_mask, k_shift, spec, impl)
            result = self._attend(q, scale, key_mask, k_shift, spec, impl)
        self._trim()
        return result if return_lse else result[0]

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        spec: QuantSpec = NVFP4,
        key_mask: torch.Tensor | None = None,
        k_shift: torch.Tensor | None = None,
        impl: Impl = "auto",
    ) -> None:
        """Add k and v without attending: what `attention` does first, with its arguments and errors."""
        self._check(k, k, v, spec, key_mask, k_shift, impl)
        impl = resolve(k.device, k.dtype) if impl == "auto" else impl
        self._extend(k, v, key_mask, k_shift, spec, impl)
        self._trim()

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` slots.

        Raises:
            ValueError: this would reopen a group whose values are only left in NVFP4, or there are not so many slots. The cache
                is as it was then.
        """
        if not 0 <= tokens <= self.length:
            raise ValueError(f"KVCache.crop: expected a number of slots from 0 to {self.length}, got {tokens}")
        if tokens in (0, self.length):
            return self.reset() if tokens else None
        length = self.length - tokens
        leftpad = torch.zeros(1, dtype=torch.int32) if self._leftpad is None else self._leftpad.cpu()
        opened = (length - leftpad).clamp(min=0) // GROUP_SIZE * GROUP_SIZE
        needed = (opened + leftpad)[(opened > 0) & (leftpad + opened < length)].tolist()
        if needed and min(needed) < self._recent_start:
            raise ValueError(
                f"KVCache.crop: {tokens} slots reach into a group of {GROUP_SIZE} whose values are only left in NVFP4: of the "
                f"last {self.length - self._recent_start} slots the values are at hand; crop fewer (in assisted generation guess "
                "fewer tokens, num_assistant_tokens), or start again from an empty cache"
            )
        self.length, self._recent_start = length, min(self._recent_start, length)

    def select(self, rows: torch.Tensor) -> None:
        """Make the batch consist of these rows (int64 indices, repeated or left out as you like)."""
        if self.length:
            self._packed = {name: x.index_select(0, rows.to(x.device)) for name, x in self._packed.items()}
            self._recent = self._recent.index_select(0, rows.to(self._recent.device))
            if self._leftpad is not None:
                self._leftpad = self._leftpad.index_select(0, rows.to(self._leftpad.device))

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: QuantSpec,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        impl: Impl,
    ) -> None:
        """Raise a ValueError unless these continue what the cache holds."""
        validate(q, k, v, spec, None, k_shift, None, impl)
        problem = None
        slots = self.length + k.shape[2]
        if spec.pv != "nvfp4":
            problem = (
                f"expected a spec with pv='nvfp4', which the cache stores V in, got {spec}; keep K and V in an ordinary cache"
            )
        elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            problem = "it has no gradient; expected a call under torch.no_grad(), or tensors that require no gradient"
        elif transformed():
            problem = "it has no derivative; expected a call outside of torch.func and forward mode"
        elif q.shape[2] != k.shape[2] or not q.shape[2]:
            problem = f"expected as many queries as new keys, and at least one, got {q.shape[2]} and {k.shape[2]}"
        elif self.length and spec != self.spec:
            problem = f"expected {self.spec}, with which it was filled, got {spec}"
        elif self.length and (k.dtype, k.device, *k.shape[:2], k.shape[3]) != (
            self._recent.dtype, self._recent.device, *self._recent.shape[:2], self._recent.shape[3]
        ):  # fmt: skip
            problem = (
                f"expected k that continues {self._recent.dtype} [batch, key_heads, *, head_dim] of {list(self._recent.shape)} "
                f"on {self._recent.device}, got {k.dtype} {list(k.shape)} on {k.device}"
            )
        elif key_mask is not None and (key_mask.dtype, tuple(key_mask.shape), key_mask.device) != (
            torch.bool, (k.shape[0], slots), k.device
        ):  # fmt: skip
            problem = (
                f"expected key_mask bool {[k.shape[0], slots]} over all slots on {k.device}, "
                f"got {key_mask.dtype} {list(key_mask.shape)} on {key_mask.device}"
            )
        if problem is not None:
            raise ValueError(f"KVCache.attention: {problem}")

    def _extend(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        spec: QuantSpec,
        impl: Impl,
    ) -> None:
        """K and V of the next slots; afterwards `_recent` reaches back far enough for `_attend` with as many queries."""
        start, new = self.length, k.shape[2]
        # No new slot may take the place of what belongs to the group that is open.
        self._resize(max(RECENT_TOKENS, new + GROUP_SIZE - 1) if start else RECENT_TOKENS, v)
        self.length, self.spec = start + new, spec
        self._grow(k)
        if key_mask is not None and self._leftpad is None:
            self._leftpad = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
        if impl != "eager":
            _kernels().append(self._tensors(spec), k, v, key_mask, k_shift)
        else:
            self._append_eager(k, v, None if key_mask is None else key_mask[:, start:], k_shift, spec, start)
        self._recent_start = max(self._recent_start, self.length - self._recent.shape[2])

    def _trim(self) -> None:
        self._resize(RECENT_TOKENS, self._recent)

    def _resize(self, slots: int, like: torch.Tensor) -> None:
        """Make `_recent` a ring of so many slots."""
        old = self._recent
        if old.shape[2] == slots:
            return
        self._recent = like.new_zeros(*like.shape[:2], slots, like.shape[3])
        if old.shape[2]:
            self._recent_start = max(self._recent_start, self.length - slots)
            kept = torch.arange(self._recent_start, self.length, device=like.device)
            self._recent[:, :, kept % slots] = old[:, :, kept % old.shape[2]]

    def _grow(self, k: torch.Tensor) -> None:
        """Make room for all slots."""
        batch, num_heads_k, _, head_dim = k.shape
        blocks = self._packed["value_codes"].shape[2] if self._packed else 0
        if self.length <= blocks * BLOCK_TOKENS:
            return
        blocks = -(-max(self.length, self.length * (_GROW + 1) // _GROW if blocks else 0) // BLOCK_TOKENS)
        words = row_words(head_dim)
        shapes = {
            "key_codes": (blocks * BLOCK_TOKENS, 16 * words),
            "key_scales": (blocks * BLOCK_TOKENS, 2 * words),
            "value_codes": (blocks, head_dim, BLOCK_BYTES),
            "value_scales": (blocks, head_dim, BLOCK_SCALES),
        }
        for name, shape in shapes.items():
            grown = k.new_zeros(batch, num_heads_k, *shape, dtype=torch.uint8)
            if name in self._packed:
                grown[:, :, : self._packed[name].shape[2]] = self._packed[name]
            self._packed[name] = grown
        if "sink" not in self._packed:
            self._packed["sink"] = k.new_zeros(batch, num_heads_k, GROUP_SIZE, head_dim)

    def _rows(self) -> list[tuple[slice, int]]:
        """Parts of the batch with the same first allowed slot."""
        if self._leftpad is None:
            return [(slice(None), 0)]
        return [(slice(row, row + 1), leftpad) for row, leftpad in enumerate(self._leftpad.tolist())]

    def _append_eager(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        new_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        spec: QuantSpec,
        start: int,
    ) -> None:
        """Quantize and store K and V of the slots from `start` on; `new_mask` is the part of the key mask for them."""
        k, ring_size = k.float(), self._recent.shape[2]
        if new_mask is not None:
            assert self._leftpad is not None
            k, v = (torch.where(new_mask[:, None, :, None], x, 0.0) for x in (k, v))
            begin = start + torch.where(new_mask.any(1), new_mask.int().argmax(1), k.shape[2]).int()
            self._leftpad = torch.where(self._leftpad >= start, begin, self._leftpad)
        old_values = self._recent_values(slice(None), max(self._recent_start, start - GROUP_SIZE + 1), start)
        known = torch.cat((old_values, v), 2)  # also what is left of the group that was open
        known_start = self.length - known.shape[2]
        last = torch.arange(max(start, self.length - ring_size), self.length, device=k.device)
        self._recent[:, :, last % ring_size] = v[:, :, last - start]
        k = reference.rotated(k if k_shift is None else k - k_shift[:, None], spec)
        codes, scales = pack_rows(*_bytes(nvfp4.quantize(k, four_over_six=spec.four_over_six)))
        packed = self._packed
        places = packed["value_codes"].unflatten(-1, (2, 2, BLOCK_SCALES // 2, 4))  # h, lane of a group, i, bytes of a word
        scale_places = packed["value_scales"].unflatten(-1, (2, BLOCK_SCALES // 2))
        for rows, leftpad in self._rows():
            count, old = self.length - leftpad, max(start - leftpad, 0)
            if count <= 0:
                continue
            packed["key_codes"][rows, :, old:count] = codes[rows, :, leftpad + old - start :]
            packed["key_scales"][rows, :, old:count] = scales[rows, :, leftpad + old - start :]
            values = known[rows]
            if old < GROUP_SIZE:
                packed["sink"][rows, :, old:count] = values[:, :, leftpad + old - known_start :][:, :, : GROUP_SIZE - old]
            opened, closed = max(old // GROUP_SIZE, 1), count // GROUP_SIZE  # the sink group is never read
            if opened < closed:
                complete = torch.arange(opened, closed, device=k.device)
                from_known = leftpad - known_start
                span = slice(from_known + opened * GROUP_SIZE, from_known + closed * GROUP_SIZE)
                groups = values[:, :, span].unflatten(2, (-1, GROUP_SIZE)).mT  # [B, Hk, groups, D, 16]
                groups, group_scales = _bytes(nvfp4.quantize(groups, four_over_six=spec.four_over_six))  # and [..., 1]
                # A group is half of a row of 32: its two lanes' words stand apart in a row of 128.
                words, _ = pack_rows(groups, group_scales)
                words = words.unflatten(-1, (4, 4))[..., :2, :]
                block, h, i = group_places(complete)
                places[rows][:, :, block, :, h, :, i] = words.movedim(2, 0)
                scale_places[rows][:, :, block, :, h, i] = group_scales[..., 0].movedim(2, 0)

    def _tensors(self, spec: QuantSpec) -> CacheTensors:
        """What the kernels read and change."""
        return CacheTensors(self._packed, self._recent, self._leftpad, self.length, spec)

    def _recent_values(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """V of these slots, [B, Hk, n, D], from the ring."""
        slots = torch.arange(start, stop, device=self._recent.device)
        return self._recent[rows, :, slots % self._recent.shape[2]]

    def _attend(
        self,
        q: torch.Tensor,
        scale: float,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        spec: QuantSpec,
        impl: Impl,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """O and LSE of the last tokens, whose keys and values the cache holds already."""
        if impl != "eager":
            return _kernels().attend(self._tensors(spec), q, key_mask, k_shift, scale)
        with torch.autocast(q.device.type, enabled=False):
            return self._attend_eager(q, scale, key_mask, k_shift, spec)

    def _attend_eager(
        self,
        q: torch.Tensor,
        scale: float,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        spec: QuantSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        leftpad = torch.zeros(1, dtype=torch.int32, device=q.device) if self._leftpad is None else self._leftpad
        count = self.length - int(leftpad.min())
        packed = self._packed
        codes, scales = (packed[name][:, :, :count] for name in ("key_codes", "key_scales"))
        key = _dequantize(*unpack_rows(codes, scales, q.shape[-1]))
        by_column = _dequantize(*unpack_rows(packed["value_codes"], packed["value_scales"], BLOCK_TOKENS))
        complete = (self.length - leftpad)[:, None] // GROUP_SIZE * GROUP_SIZE
        column = torch.arange(count, device=q.device)
        # Behind the last complete group may be what was cropped.
        value_fq = torch.where((column < complete)[:, None, :, None], by_column.mT.flatten(2, 3)[:, :, :count], 0.0).to(dtype)
        value = value_fq.clone()
        value[:, :, :GROUP_SIZE] = packed["sink"][:, :, :count]
        for rows, begin in self._rows():
            recent = max(self._recent_start, begin)
            value[rows, :, recent - begin : self.length - begin] = self._recent_values(rows, recent, self.length).to(dtype)
        slots = column + leftpad[:, None]
        allowed = slots < self.length
        if key_mask is not None:
            allowed &= key_mask.gather(1, slots.clamp(max=self.length - 1))
        allowed = allowed.expand(q.shape[0], -1)
        positions = torch.arange(self.length - q.shape[2], self.length, device=q.device) - leftpad[:, None]
        return reference.forward_cached(q, key.to(dtype), value_fq, value, allowed, positions, k_shift, spec=spec, scale=scale)


@lru_cache
def _kernels() -> ModuleType:
    """`launch.py`, imported when it is first asked for."""
    with needs_triton():
        from . import launch
    return launch


def _bytes(quantized: nvfp4.Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, both as uint8."""
    return quantized.codes, quantized.scales.view(torch.uint8)


def _dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return nvfp4.dequantize(codes, scales.contiguous().view(torch.float8_e4m3fn))
