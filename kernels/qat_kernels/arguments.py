"""What a call of attention may look like: every shape, dtype and device is checked before anything is computed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch

from .mask import Mask
from .spec import FEATURES, GROUP_SIZE, MAX_HEAD_DIM, Q_SHIFT, UNEQUAL_HEAD_DIMS, QuantSpec

Impl = Literal["auto", "eager", "sdpa", "triton", "fp4", "sageattn3"]
"""The implementations of attention; `auto` chooses one."""
_ALL = (*FEATURES, UNEQUAL_HEAD_DIMS, Q_SHIFT)
COMPUTED: dict[str, tuple[str, ...]] = {
    "eager": _ALL,
    "sdpa": (),
    "triton": _ALL,
    "fp4": (Q_SHIFT,),
    "sageattn3": (),
}
"""Which FEATURES each implementation computes, whether V may have another head dim than Q and K, and whether Q may be shifted."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class PackingArguments(NamedTuple):
    """The arguments that say how sequences are packed, as the caller gave them."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    def check(self, total_q: int, total_k: int, device: torch.device) -> None:
        """Everything that can be checked without reading `cu_seqlens`, which on a GPU would wait for it.

        Raises:
            ValueError: an argument is missing or has the wrong type, shape, dtype or device, or there are more tokens than
                documents of this length hold.
        """
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = self
        if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
            missing = [name for name, value in zip(self._fields, self, strict=True) if value is None]
            raise ValueError(
                f"attention: packed sequences: expected {', '.join(self._fields)}, all four; missing: {', '.join(missing)}"
            )
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if not isinstance(x, torch.Tensor) or x.ndim != 1 or len(x) < 1 or (x.dtype, x.device) != (torch.int32, device):
                got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
                raise ValueError(f"attention: {name}: expected torch.int32 [documents + 1] on {device}, got {got}")
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                "attention: cu_seqlens_q and cu_seqlens_k: expected the same number of documents, got "
                f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
            )
        documents = len(cu_seqlens_q) - 1
        for name, length, total in (("max_seqlen_q", max_seqlen_q, total_q), ("max_seqlen_k", max_seqlen_k, total_k)):
            if not isinstance(length, int | torch.SymInt) or isinstance(length, bool) or length < 0:
                raise ValueError(f"attention: {name}: expected an int, the length of the longest document, got {length!r}")
            if documents * length < total:
                raise ValueError(
                    f"attention: {name}: expected the length of the longest document; {documents} documents of at most {length} "
                    f"cannot hold {total} tokens"
                )


def validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: QuantSpec,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packed: PackingArguments | None,
    impl: str,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> None:
    """Raise a ValueError unless these are arguments of `qat_kernels.attention`."""
    if not isinstance(spec, QuantSpec):
        _refuse("spec", "a QuantSpec", repr(spec))
    if impl not in get_args(Impl):
        _refuse("impl", f"one of {', '.join(get_args(Impl))}", repr(impl))
    layout = "batch, heads, length, head_dim" if packed is None else "total, heads, head_dim"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.ndim != layout.count(",") + 1:
            _refuse(
                name,
                f"a tensor [{layout}]" + (" with cu_seqlens" if packed is not None else ""),
                f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x),
            )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        _refuse(
            "dtypes of q, k, v",
            "one of float32, float16, bfloat16 (float64 for tests) for all three; cast them first",
            f"{q.dtype}, {k.dtype}, {v.dtype}",
        )
    if impl in ("triton", "fp4") and q.dtype == torch.float64:
        _refuse(f"dtype with impl={impl!r}", "float32, float16 or bfloat16; use impl='eager' for float64", q.dtype)
    if impl == "sageattn3" and q.dtype not in (torch.bfloat16, torch.float16):
        _refuse("dtype with impl='sageattn3'", "bfloat16 or float16; use impl='triton' or 'eager' for others", q.dtype)
    if not q.device == k.device == v.device:
        _refuse("devices of q, k, v", "one device", f"{q.device}, {k.device}, {v.device}")
    num_heads, num_heads_k, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    head_dim_v = v.shape[-1]
    if k.shape[:-1] != v.shape[:-1]:
        expected = "[B, Hk, Lk, D] and [B, Hk, Lk, Dv]" if packed is None else "[total_k, Hk, D] and [total_k, Hk, Dv]"
        _refuse("shapes of k and v", expected, f"{tuple(k.shape)} and {tuple(v.shape)}")
    if packed is not None:
        if k.shape[-1] != head_dim:
            _refuse("shape of k", f"[total_k, Hk, {head_dim}], head_dim as in q", tuple(k.shape))
        packed.check(len(q), len(k), q.device)
        if key_mask is not None:
            _refuse("key_mask with packed sequences", "None; pack the allowed tokens alone", "a mask")
    elif (k.shape[0], k.shape[-1]) != (q.shape[0], head_dim):
        _refuse("shape of k", f"[{q.shape[0]}, Hk, Lk, {head_dim}], batch and head_dim as in q", tuple(k.shape))
    if num_heads_k == 0 or num_heads % num_heads_k:
        _refuse("heads", "the query heads to be a multiple of the key heads", f"{num_heads} and {num_heads_k}")
    for name, each in (("head_dim", head_dim), ("head_dim of v", head_dim_v)):
        if each % GROUP_SIZE or not GROUP_SIZE <= each <= MAX_HEAD_DIM:
            expected = f"a multiple of {GROUP_SIZE} from {GROUP_SIZE} to {MAX_HEAD_DIM}; pad q, k and v and pass scale"
            _refuse(name, expected, each)
    if spec.rotate and head_dim & (head_dim - 1):
        _refuse("head_dim with QuantSpec(rotate=True)", "a power of two", head_dim)
    if scale is not None and not math.isfinite(scale):
        _refuse("scale", "a finite number, or None for head_dim ** -0.5", scale)
    _check("key_mask", key_mask, torch.bool, (k.shape[0], k.shape[-2]), q.device, ", True where a key may be seen")
    for name, shift in (("k_shift", k_shift), ("q_shift", q_shift)):
        _check(name, shift, torch.float32, (num_heads_k, head_dim), q.device)
    for problem in served_problems(
        spec,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=causal,
        masked=key_mask is not None or packed is not None,
        grouped=num_heads != num_heads_k,
    ):
        _refuse(*problem)
    if impl != "auto" and head_dim_v != head_dim and UNEQUAL_HEAD_DIMS not in COMPUTED[impl]:
        _refuse(f"head_dim of v with impl={impl!r}", f"{head_dim}, as of q and k, or impl='auto'", head_dim_v)
    _refuse_what_nobody_serves(spec, impl, head_dim, k_shift, q_shift, scale, return_lse)


class Features(NamedTuple):
    """The arguments of `attention` that are named in FEATURES, as the caller gave them."""

    window: int | None = None
    block_size: int = 1
    prefix: int = 0
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of those that are asked for."""
        window, block_size, prefix, *others = self
        on = (window is not None, block_size != 1, prefix != 0, *(x is not None for x in others))
        return tuple(name for name, is_on in zip(FEATURES, on, strict=True) if is_on)

    def checked(
        self,
        q: torch.Tensor,
        spec: QuantSpec,
        impl: str,
        *,
        causal: bool,
        packed: bool,
        k_shift: torch.Tensor | None,
    ) -> Mask:
        """Which keys are seen, after everything that can be checked without reading `bounds`, which on a GPU would wait for it.

        Args:
            q: the queries, already checked.
            packed: whether sequences are packed.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device, or does not go with another one.
        """
        window, block_size, prefix, bounds, softcap, sinks = self
        for name, value, least, what in (
            ("window", 1 if window is None else window, 1, "how many keys a query sees, its own among them, or None"),
            ("block_size", block_size, 1, "the tokens of a block (1: causal token by token)"),
            ("prefix", prefix, 0, "how many of the first keys every query sees"),
        ):
            if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < least:
                _refuse(name, f"an int from {least} on, {what}", repr(value))
        if bounds is not None:
            self._check_bounds(q, causal, packed)
        elif not causal:
            for name in self.asked:
                if name in ("window", "block_size", "prefix"):
                    _refuse(f"{name} without causal", "causal=True; without it every query sees every key", "causal=False")
        if softcap is not None and (
            not isinstance(softcap, int | float) or isinstance(softcap, bool) or not 0 < softcap < math.inf
        ):
            _refuse("softcap", "a positive number, the largest magnitude of a score, or None", repr(softcap))
        if sinks is not None:
            got = f"{sinks.dtype} {list(sinks.shape)} on {sinks.device}" if isinstance(sinks, torch.Tensor) else repr(sinks)
            if (
                not isinstance(sinks, torch.Tensor)
                or sinks.dtype not in (torch.float32, q.dtype)
                or (tuple(sinks.shape), sinks.device) != ((q.shape[1],), q.device)
            ):
                expected = f"torch.float32 or {q.dtype} [{q.shape[1]}] on {q.device}, one logit for each query head"
                _refuse("sinks", expected, got)
        for name in self.asked:
            if name not in spec.rules.features:
                _refuse(f"{name} with preset={spec.preset!r}", "it left out: its servers do not compute it", "one")
            if impl != "auto" and name not in COMPUTED[impl]:
                _refuse(
                    f"{name} with impl={impl!r}", "it left out, or impl='auto': this implementation does not compute it", "one"
                )
            if name in ("softcap", "sinks") and k_shift is not None:
                _refuse(
                    f"k_shift with {name}", f"None: {name} would see the constant that it adds to a row of scores", "a tensor"
                )
        window, causal = None if window is None else int(window), True if causal else False  # noqa: SIM210 (may be symbolic)
        return Mask(causal=causal, window=window, block_size=int(block_size), prefix=int(prefix), bounded=bounds is not None)

    def _check_bounds(self, q: torch.Tensor, causal: bool, packed: bool) -> None:
        bounds = self.bounds
        if packed:
            _refuse(
                "bounds with packed sequences", "None; use window, block_size and prefix, which hold in each document", "bounds"
            )
        for name, is_set in (("causal", causal), ("window", self.window is not None), ("block_size", self.block_size != 1)):
            if is_set:
                _refuse(f"{name} with bounds", "it left out: bounds alone say what is between them", "both")
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            _refuse("bounds", "(lower, upper), two tensors", repr(bounds))
        batch, seqlen = q.shape[0], q.shape[2]
        for name, x in zip(("lower", "upper"), bounds, strict=True):
            got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
            if (
                not isinstance(x, torch.Tensor)
                or x.ndim != 2
                or x.shape[0] not in (1, batch)
                or (x.dtype, x.shape[1], x.device) != (torch.int32, seqlen, q.device)
            ):
                _refuse(f"bounds: {name}", f"torch.int32 [{batch} or 1, {seqlen}] on {q.device}", got)


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a call is no tensor."""

    spec: QuantSpec
    mask: Mask
    scale: float
    softcap: float | None
    impl: str
    needs_gradient: bool = False

    @functools.cached_property
    def has_out_hp(self) -> bool:
        """Whether the forward returns O' beside O."""
        return self.needs_gradient and self.spec.quantizes_pv

    @functools.cached_property
    def reads_query(self) -> bool:
        """Whether the backward reads Q and K as they are; that of `triton` reads codes instead, if it can."""
        return self.impl != "triton" or self.spec.reads_query

    @functools.cached_property
    def reads_value(self) -> bool:
        """The same for V."""
        return self.impl != "triton" or self.spec.reads_value(self.mask.hides_keys)


class Checked(NamedTuple):
    """What there is to know about a call whose arguments go together, beside its tensors."""

    spec: QuantSpec
    mask: Mask
    scale: float
    softcap: float | None
    asked: tuple[str, ...]
    """Which of FEATURES it asks for, UNEQUAL_HEAD_DIMS and Q_SHIFT."""
    made: dict[tuple[str, bool], Options]

    def options(self, impl: str, needs_gradient: bool) -> Options:
        """Those of such a call, made once."""
        options = self.made.get((impl, needs_gradient))
        if options is None:
            options = Options(self.spec, self.mask, self.scale, self.softcap, impl, needs_gradient)
            self.made[impl, needs_gradient] = options
        return options


def asked_of(features: Features, q: torch.Tensor, v: torch.Tensor, q_shift: torch.Tensor | None) -> tuple[str, ...]:
    """What a call asks for of what COMPUTED lists."""
    unequal = () if q.shape[-1] == v.shape[-1] else (UNEQUAL_HEAD_DIMS,)
    return *features.asked, *unequal, *(() if q_shift is None else (Q_SHIFT,))


def not_computed(impl: str, asked: tuple[str, ...]) -> list[str]:
    """What of it an implementation does not compute."""
    return [name for name in asked if name not in COMPUTED[impl]]


_CHECKED: dict[tuple[Any, ...], Checked] = {}
_MOST_CHECKED = 4096


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: QuantSpec,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packed: PackingArguments | None,
    features: Features,
    impl: str,
    *,
    causal: bool,
    scale: float | None,
    return_lse: bool,
) -> Checked:
    """`validate` and `Features.checked`. They see no values of tensors, so what they found right once is not looked at again."""
    found, key = None, None
    if scale is not None and scale.__class__ is not float:
        scale = number("scale", scale)
    if not torch.compiler.is_compiling():
        window, block_size, prefix, bounds, softcap, sinks = features
        try:
            key = (
                q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device, spec, impl, causal, scale,
                return_lse, window, block_size, prefix, softcap,
                # True is 1, and is refused where 1 is not.
                window.__class__, block_size.__class__, prefix.__class__, softcap.__class__,
                None if key_mask is k_shift is q_shift is packed is bounds is sinks is None
                else tuple(map(_described, (key_mask, k_shift, q_shift, packed, bounds, sinks))),
            )  # fmt: skip
            found = _CHECKED.get(key)
        except (AttributeError, TypeError):  # no tensors, or something that has no hash: it will be refused
            key = None
    if found is None:
        validate(q, k, v, spec, key_mask, k_shift, q_shift, packed, impl, causal=causal, scale=scale, return_lse=return_lse)
        mask = features.checked(q, spec, impl, causal=causal, packed=packed is not None, k_shift=k_shift)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        softcap = None if features.softcap is None else float(features.softcap)
        found = Checked(spec, mask, scale, softcap, asked_of(features, q, v, q_shift), {})
        if key is not None:
            if len(_CHECKED) >= _MOST_CHECKED:
                _CHECKED.clear()
            _CHECKED[key] = found
    return found


def _described(x: object) -> object:
    """All of an argument that is checked."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.device
    if isinstance(x, tuple | list):
        return tuple(map(_described, x))
    return x, x.__class__


def served_problems(
    spec: QuantSpec, *, head_dim: int, head_dim_v: int, causal: bool, masked: bool, grouped: bool
) -> list[tuple[str, str, str]]:
    """What the servers of a spec cannot compute of such a call: for each, what, what is expected, and what was given."""
    rules, name = spec.rules, f"with preset={spec.preset!r}"
    problems = []
    if causal and not rules.causal:
        problems.append((f"causal {name}", "False: its servers run it without a causal mask", "True"))
    if masked and not rules.mask:
        problems.append(
            (f"key_mask and cu_seqlens {name}", "None: its servers take no mask and no packed sequences", "one of them")
        )
    if grouped and not rules.mask:
        problems.append((f"heads {name}", "as many key heads as query heads", "fewer"))
    if head_dim_v != head_dim and ("triton" not in rules.impls or rules.head_dims is not None):
        problems.append((f"head_dim of v {name}", f"{head_dim}, as of q and k", str(head_dim_v)))
    if rules.head_dims is not None and head_dim not in rules.head_dims:
        problems.append((f"head_dim {name}", " or ".join(map(str, rules.head_dims)), str(head_dim)))
    return problems


def _refuse_what_nobody_serves(
    spec: QuantSpec,
    impl: str,
    head_dim: int,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> None:
    rules, name = spec.rules, f"with preset={spec.preset!r}"
    if impl not in ("auto", "eager", *rules.impls):
        _refuse(f"impl {name}", f"one of auto, eager, {', '.join(rules.impls)}".rstrip(", "), repr(impl))
    for shift_name, shift in (("k_shift", k_shift), ("q_shift", q_shift)):
        if shift is not None and not rules.options:
            _refuse(f"{shift_name} {name}", "None: its servers subtract none", "a tensor")
    if not rules.own_scale and scale is not None and scale != head_dim**-0.5:
        _refuse(f"scale {name}", f"None or {head_dim**-0.5}: its servers take no other", scale)
    if return_lse and (not rules.own_scale or (spec.kv_only and impl != "eager")):
        _refuse(f"return_lse {name}", "False" + ("; or impl='eager'" if spec.kv_only else ""), "True")


def _check(
    name: str, x: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, int], device: torch.device, meaning: str = ""
) -> None:
    """That an argument which may be left out is what was asked for."""
    if x is None:
        return
    got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
    if not isinstance(x, torch.Tensor) or (x.dtype, tuple(x.shape), x.device) != (dtype, shape, device):
        _refuse(name, f"{dtype} {list(shape)} on {device}{meaning}", got)


def number(name: str, x: Any) -> float:
    """A number as a float."""
    if isinstance(x, torch.Tensor) and x.requires_grad:
        _refuse(name, "a number without a gradient, which would be lost; multiply q by it instead", "a tensor that requires one")
    if isinstance(x, str):
        _refuse(name, "a number", repr(x))
    try:
        return float(x)
    except (TypeError, ValueError, RuntimeError):
        _refuse(name, "a number", repr(x))


def _refuse(what: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"attention: {what}: expected {expected}, got {got}")
