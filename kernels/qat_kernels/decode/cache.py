"""The keys and values of one attention layer in NVFP4, for generation: docs/NUMERICS.md, section 4, token by token.

K is quantized as it arrives, V as soon as a group of 16 tokens is complete. The values of the kept groups stay unquantized:
those of the sink group, and those of the last tokens, which include the open group. So attention over the cache gives the same
result as causal attention over all of its tokens.

With a window of w keys the cache keeps only the tokens that may be seen again: a ring of w tokens and some more. The
group in which a window begins is kept as a whole, with the codes that V got when the group was complete.

With `kv_nvfp4` groups of V lie along the head dim too, as in the caches of servers (section 9): V is quantized as it arrives, and
nothing is kept.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal, overload

import torch

from qat_kernels import ran
from qat_kernels.api import attention
from qat_kernels.arguments import Features, Impl, number, validate
from qat_kernels.dispatch import needs_triton, without_verdicts
from qat_kernels.spec import GROUP_SIZE, NVFP4, QuantSpec
from qat_kernels.transforms import transformed
from qat_kernels.verdicts import Verdicts

from . import eager
from .byte_layout import BLOCK_BYTES, BLOCK_SCALES, BLOCK_TOKENS, CacheTensors, row_words

RECENT_TOKENS = 48
"""The last tokens, whose values are also kept unquantized: the open group, and enough for `crop` to go back some steps."""
_WITH_A_WINDOW = 64
"""With a window, about this many tokens attend at once, because the keys of all their windows must be in the cache. `crop` can
remove as many."""
_GROW = 64
"""The cache grows by 1/64 of its tokens at a time, in whole blocks: few copies, and little unused memory."""


class KVCache:
    """Packed keys and values of one layer, which `attention` extends and attends to.

    Slots are the columns of a batch, padding included. Inside, tokens are counted from each sequence's first allowed slot, as
    groups along tokens are. A value takes 4.5 bits. Except with `kv_nvfp4`, it also keeps 64 tokens of V in the dtype of
    the inputs. A Q shift takes 32 bits more for each token and key head.
    """

    presets = ("nvfp4", "kv_nvfp4")
    """The presets of the specs that it can hold."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        """Slots filled so far."""
        self.spec: QuantSpec | None = None
        self.window: int | None = None
        """How many keys a query sees, its own among them; None: all before it."""
        self._packed: dict[str, torch.Tensor] = {}
        """As in `CacheTensors`."""
        self._recent = torch.empty(0, 0, 0, 0)
        """V of the last slots as a ring [B, Hk, n, D], 0 where the mask excludes a slot. Slot s is at s % n. At first n is 0;
        with `kv_nvfp4` it stays 0."""
        self._recent_start = 0
        """The first slot whose V is in the ring."""
        self._first = 0
        """The first slot whose place in the ring is not overwritten."""
        self._leftpad: torch.Tensor | None = None
        """int32 [B]: the first allowed slot of each sequence, at least `length` where there is none yet; None without a mask."""

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
        q_shift: torch.Tensor | None = ...,
        window: int | None = ...,
        softcap: float | None = ...,
        sinks: torch.Tensor | None = ...,
        return_lse: Literal[False] = ...,
        impl: Impl | Verdicts = ...,
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
        q_shift: torch.Tensor | None = ...,
        window: int | None = ...,
        softcap: float | None = ...,
        sinks: torch.Tensor | None = ...,
        return_lse: Literal[True],
        impl: Impl | Verdicts = ...,
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
        q_shift: torch.Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        return_lse: bool = False,
        impl: Impl | Verdicts = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Add k and v to the cache, then compute causal `qat_kernels.attention` from q to all that it holds.

        Args:
            q, k, v: [B, H, n, D] and [B, Hk, n, D]: the next n slots of each sequence.
            key_mask: bool [B, length + n], over all slots. The part that was given before must not change.
            window: as for `qat_kernels.attention`, the same at every call. Keys that are in no window are not read.
            softcap, sinks: as for `qat_kernels.attention`, if the preset has them.
            impl: `auto`, `eager` or `triton`; for `nvfp4` also `fp4`, for the first call only.
            Others: as for `qat_kernels.attention`, the same at every call.

        Returns:
            Like `qat_kernels.attention`, without a gradient.

        Raises:
            ValueError: as `qat_kernels.attention`; the inputs do not continue what the cache holds; the preset is not one of
                `presets`; or an input requires a derivative. The cache does not change then.
        """
        features = Features(window=window, softcap=softcap, sinks=sinks)
        scale = None if scale is None else number("scale", scale)
        for_first, impl = impl, self._check(q, k, v, spec, key_mask, k_shift, q_shift, features, impl, scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # SDPA returns no log-sum-exp and computes none of the features.
        if self.length == 0 and not (spec.kv_only and (return_lse or features.asked)):
            out, lse = self._attend_at_once(q, k, v, scale, key_mask, k_shift, q_shift, spec, features, for_first)
            self._extend(k, v, key_mask, k_shift, q_shift, spec, window, impl)
        else:
            out, lse = self._attend_as_it_grows(q, k, v, scale, key_mask, k_shift, q_shift, spec, features, impl)
        self._trim()
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        spec: QuantSpec = NVFP4,
        key_mask: torch.Tensor | None = None,
        k_shift: torch.Tensor | None = None,
        q_shift: torch.Tensor | None = None,
        window: int | None = None,
        impl: Impl | Verdicts = "auto",
    ) -> None:
        """Add k and v without attending, with the arguments and errors of `attention`."""
        impl = self._check(k, k, v, spec, key_mask, k_shift, q_shift, Features(window=window), impl, None)
        self._extend(k, v, key_mask, k_shift, q_shift, spec, window, impl)
        self._trim()

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` slots.

        Raises:
            ValueError: this would reopen a group whose values are kept in NVFP4 only (not with `kv_nvfp4`); a window would then
                need tokens that are not kept; or there are fewer slots. The cache does not change then.
        """
        if not 0 <= tokens <= self.length:
            raise ValueError(f"KVCache.crop: expected a number of slots from 0 to {self.length}, got {tokens}")
        if tokens in (0, self.length):
            return self.reset() if tokens else None
        length = self.length - tokens
        assert self.spec is not None, "something was added"
        if self.window is not None and max(length - self.window + 1, 0) < self._first:
            raise ValueError(
                f"KVCache.crop: after {tokens} slots are removed, a window of {self.window} keys begins at slot "
                f"{max(length - self.window + 1, 0)}, and those before {self._first} are not kept; crop at most "
                f"{self.length - self.window + 1 - self._first}, or start again from an empty cache"
            )
        if not self.spec.kv_only:
            self._check_crop(tokens)
        self.length, self._recent_start = length, min(self._recent_start, length)

    def _check_crop(self, tokens: int) -> None:
        """Raise a ValueError if without the last `tokens` slots a group would be open whose values are not kept."""
        length = self.length - tokens
        leftpad = torch.zeros(1, dtype=torch.int32) if self._leftpad is None else self._leftpad.cpu()
        opened = (length - leftpad).clamp(min=0) // GROUP_SIZE * GROUP_SIZE
        needed = (opened + leftpad)[(opened > 0) & (leftpad + opened < length)].tolist()
        if needed and min(needed) < self._recent_start:
            raise ValueError(
                f"KVCache.crop: {tokens} slots reach into a group of {GROUP_SIZE} whose values are kept in NVFP4 only; the cache "
                f"keeps those of the last {self.length - self._recent_start} slots unquantized; crop fewer slots (in assisted "
                "generation set num_assistant_tokens to less), or start again from an empty cache"
            )

    def select(self, rows: torch.Tensor) -> None:
        """Make the batch consist of these rows (int64 indices; rows may be repeated or left out)."""
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
        q_shift: torch.Tensor | None,
        features: Features,
        impl: Impl | Verdicts,
        scale: float | None,
    ) -> Impl:
        """Raise a ValueError unless these continue what the cache holds and can be computed; returns what `impl` runs."""
        kv_only = isinstance(spec, QuantSpec) and spec.kv_only
        if isinstance(impl, Verdicts):
            impl = "auto"
        # The kernels of the cache are not those that `attention` has for `kv_nvfp4`.
        validate(q, k, v, spec, None, k_shift, q_shift, None, "auto" if kv_only else impl, scale=scale)
        features.checked(q, spec, "auto", causal=True, packed=False, k_shift=k_shift)
        problem = None
        slots = self.length + k.shape[2]
        if spec.preset not in self.presets:
            expected = " or ".join(map(repr, self.presets))
            problem = f"expected a spec with preset {expected}, got {spec}; keep K and V in an ordinary cache"
        elif k.shape[-1] != v.shape[-1]:
            problem = (
                f"expected values of the head dim of the keys, {k.shape[-1]}, got {v.shape[-1]}; keep them in an ordinary cache"
            )
        elif kv_only and impl not in ("auto", "eager", "triton"):
            problem = f"impl with preset={spec.preset!r}: expected auto, eager or triton, got {impl!r}"
        elif kv_only and impl == "triton" and q.dtype == torch.float64:
            problem = f"dtype with impl={impl!r}: expected float32, float16 or bfloat16, got {q.dtype}; use impl='eager'"
        elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, features.sinks)):
            problem = "it has no gradient; expected a call under torch.no_grad(), or tensors that require no gradient"
        elif transformed():
            problem = "it has no derivative; expected a call outside of torch.func and forward mode"
        elif q.shape[2] != k.shape[2] or not q.shape[2]:
            problem = f"expected as many queries as new keys, and at least one, got {q.shape[2]} and {k.shape[2]}"
        elif self.length and spec != self.spec:
            problem = f"expected {self.spec}, with which it was filled, got {spec}"
        elif self.length and features.window != self.window:
            problem = f"expected window={self.window}, with which it was filled, got window={features.window}"
        elif self.length and (q_shift is not None) != ("key_bias" in self._packed):
            was, got = ("None", "a tensor") if q_shift is not None else ("a tensor", "None")
            problem = f"expected q_shift={was}, with which it was filled, got {got}"
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
        impl = without_verdicts(impl, q.device, q.dtype, NVFP4.preset)  # all kernels of the cache run where those of `nvfp4` do
        if impl != "eager":
            _implementation(impl).check_device(q.device)
        return impl

    def _attend_at_once(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        q_shift: torch.Tensor | None,
        spec: QuantSpec,
        features: Features,
        impl: Impl | Verdicts,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over these tokens, which are the first ones: O, and LSE (None with `kv_nvfp4`)."""
        with torch.no_grad():
            if spec.kv_only:
                at_once: Impl = "eager" if impl == "eager" else "sdpa"
                return attention(q, k, v, spec=spec, causal=True, scale=scale, key_mask=key_mask, impl=at_once), None
            return attention(
                q, k, v, spec=spec, causal=True, scale=scale, key_mask=key_mask, k_shift=k_shift, q_shift=q_shift,
                window=features.window, softcap=features.softcap, sinks=features.sinks, return_lse=True, impl=impl,
            )  # fmt: skip

    def _attend_as_it_grows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        q_shift: torch.Tensor | None,
        spec: QuantSpec,
        features: Features,
        impl: Impl,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add K and V, then attend to all tokens: O and LSE. With a window this goes in steps of some tokens."""
        kernels, start, new = _implementation(impl), self.length, q.shape[2]
        ran.note("eager" if impl == "eager" else "decode")
        softcap = None if features.softcap is None else float(features.softcap)
        at_once = new if features.window is None else _ring(features.window) - features.window + 1
        parts = []
        for begin in range(0, new, at_once):
            part = slice(begin, min(begin + at_once, new))
            mask = None if key_mask is None else key_mask[:, : start + part.stop]
            self._extend(k[:, :, part], v[:, :, part], mask, k_shift, q_shift, spec, features.window, impl)
            inputs = (q[:, :, part], mask, k_shift, q_shift)
            parts.append(kernels.attend(self._tensors(spec), *inputs, scale, softcap, features.sinks))
        if len(parts) == 1:
            return parts[0]
        out = torch.empty_like(q)
        torch.cat([each for each, _ in parts], 2, out=out)
        return out, torch.cat([lse for _, lse in parts], 2)

    def _extend(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        k_shift: torch.Tensor | None,
        q_shift: torch.Tensor | None,
        spec: QuantSpec,
        window: int | None,
        impl: Impl,
    ) -> None:
        """Add K and V of the next slots. Afterwards `_recent` reaches back far enough for as many queries to attend."""
        start, new = self.length, k.shape[2]
        self.spec, self.window = spec, window
        # No new slot may overwrite a slot of the open group.
        self._resize(max(RECENT_TOKENS, new + GROUP_SIZE - 1) if start else RECENT_TOKENS, v)
        self.length = start + new
        self._grow(k, has_key_bias=q_shift is not None)
        if key_mask is not None and self._leftpad is None:
            self._leftpad = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
        _implementation(impl).append(self._tensors(spec), k, v, key_mask, k_shift, q_shift)
        self._recent_start = max(self._recent_start, self.length - self._recent.shape[2])
        if window is not None:
            self._first = max(self._first, self.length - _ring(window))

    def _trim(self) -> None:
        self._resize(RECENT_TOKENS, self._recent)

    def _resize(self, slots: int, like: torch.Tensor) -> None:
        """Make `_recent` a ring of this many slots, or of none if no group is kept."""
        assert self.spec is not None, "something is added"
        slots = 0 if self.spec.kv_only else slots
        old = self._recent
        if old.shape[:3] == (*like.shape[:2], slots):
            return
        self._recent = like.new_zeros(*like.shape[:2], slots, like.shape[3])
        if old.shape[2]:
            self._recent_start = max(self._recent_start, self.length - slots)
            kept = torch.arange(self._recent_start, self.length, device=like.device)
            self._recent[:, :, kept % slots] = old[:, :, kept % old.shape[2]]

    def _grow(self, k: torch.Tensor, *, has_key_bias: bool) -> None:
        """Make room for all slots; with a window, for those that are kept."""
        batch, num_heads_k, _, head_dim = k.shape
        assert self.spec is not None, "something is added"
        blocks = self._tensors(self.spec).num_blocks if self._packed else 0
        length = self.length if self.window is None else min(self.length, _ring(self.window))
        if length <= blocks * BLOCK_TOKENS:
            return
        blocks = -(-max(length, length * (_GROW + 1) // _GROW if blocks else 0) // BLOCK_TOKENS)
        if self.window is not None:
            blocks = min(blocks, _ring(self.window) // BLOCK_TOKENS)
        words = row_words(head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "key_codes": (blocks * BLOCK_TOKENS, 16 * words),
            "key_scales": (blocks * BLOCK_TOKENS, 2 * words),
        }
        if self.spec.kv_only:
            shapes |= {"value_codes": shapes["key_codes"], "value_scales": shapes["key_scales"]}
        else:
            shapes |= {"value_codes": (blocks, head_dim, BLOCK_BYTES), "value_scales": (blocks, head_dim, BLOCK_SCALES)}
        if has_key_bias:
            shapes["key_bias"] = (blocks * BLOCK_TOKENS,)
        for name, shape in shapes.items():
            dtype = torch.float32 if name == "key_bias" else torch.uint8
            grown = k.new_zeros(batch, num_heads_k, *shape, dtype=dtype)
            if name in self._packed:
                grown[:, :, : self._packed[name].shape[2]] = self._packed[name]
            self._packed[name] = grown
        if not self.spec.kv_only and "sink" not in self._packed:
            self._packed["sink"] = k.new_zeros(batch, num_heads_k, GROUP_SIZE, head_dim)

    def _tensors(self, spec: QuantSpec) -> CacheTensors:
        """The tensors that implementations read and change."""
        recent = None if spec.kv_only else self._recent
        return CacheTensors(self._packed, recent, self._leftpad, self.length, spec, self.window)


def _ring(window: int) -> int:
    """How many tokens are kept with a window, in whole blocks."""
    return -(-(window + _WITH_A_WINDOW - 1) // BLOCK_TOKENS) * BLOCK_TOKENS


@lru_cache
def _implementation(impl: Impl) -> ModuleType:
    """`eager.py`, or `launch.py`, imported when it is first asked for."""
    if impl == "eager":
        return eager
    with needs_triton():
        from . import launch
    return launch
