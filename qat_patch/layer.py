"""The settings that a patched attention module reads at every call, and the record of a call for measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_kernels.arguments import Impl
from qat_kernels.verdicts import Verdicts

SHIFTS = {"k_shift": "K shift", "q_shift": "Q shift"}
"""What may be subtracted before quantization: the argument of `qat_kernels.attention` and `patch_model`, and in words."""
Shifts = dict[str, Any]
"""Arguments of `patch_model`: by kind (`SHIFTS`), then by module name, float32 [key heads, head_dim]."""


@dataclasses.dataclass(eq=False, repr=False)
class AttentionLayer:
    """One attention module of a patched model. The handle owns it."""

    name: str
    """The module's name in its model."""
    spec: QuantSpec
    """What 4-bit attention quantizes in this module."""
    original: Any
    """The original attention, for `restore`: an implementation's name, or a processor object."""
    is_patched: bool = True
    """False if the module keeps its original attention, and is listed only because the model around it is patched."""
    prepare: Callable[[Any], object] | None = None
    """Registers the host's 4-bit attention for `original`. Called when the layer is unpickled, perhaps in a new process."""
    k_shift: torch.Tensor | None = None
    """float32 [key heads, head_dim], subtracted from the keys before they are quantized (docs/NUMERICS.md, section 6)."""
    q_shift: torch.Tensor | None = None
    """float32 [key heads, head_dim], subtracted from the queries that share a key head, before they are quantized."""
    impl: Impl | Verdicts = "auto"
    """The implementation that its calls run, as for `qat_kernels.attention`. Not a part of the numerics."""
    off: int = 0
    """How many `handle.disabled()` are open; the module runs its original attention if any is."""
    observer: Callable[[AttentionLayer, AttentionCall], None] | None = None
    """Inside `handle.observed(...)`: called with every call. The module runs its original attention then."""
    probed: bool = False
    """A call is running that must show whether it reaches 4-bit attention. Never true inside torch.compile."""
    reached: bool = False
    """An uncompiled call of the module has reached 4-bit attention."""
    traced: bool = False
    """torch.compile has traced a call of the module up to 4-bit attention."""
    skipped_by: str | None = None
    """The hook of the host library that skipped attention, if no call of the module has reached it yet."""

    @property
    def enabled(self) -> bool:
        """False inside `handle.disabled()`."""
        return not self.off

    @property
    def quantizes(self) -> bool:
        """Whether a call runs 4-bit attention now."""
        return self.enabled and self.is_patched

    @property
    def shifts(self) -> dict[str, Any]:
        """The shifts that the module has, by argument."""
        return {which: shift for which in SHIFTS if (shift := getattr(self, which)) is not None}

    def shifts_on(self, device: torch.device) -> dict[str, Any]:
        """`shifts` on a device. They do not move with the model: buffers would, but would add keys to the state_dict."""
        shifts = self.shifts
        for which, shift in shifts.items():
            if shift.device != device:
                shifts[which] = shift.to(device)
                if not torch.compiler.is_compiling():  # torch.compile allows no side effects inside a checkpointed block
                    setattr(self, which, shifts[which])
        return shifts

    def note_call(self) -> None:
        """Note that a call has reached 4-bit attention. Called only if `probed`, so that other calls cost nothing."""
        self.reached, self.skipped_by = True, None

    def __getstate__(self) -> dict[str, Any]:
        if self.off or self.observer is not None:
            raise ValueError(
                f"{self.name}: expected to be copied or pickled with 4-bit attention in force, got it inside handle.disabled(), "
                "original_steps() or a measurement, which the copy would never leave; copy the model outside"
            )
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.prepare is not None:
            self.prepare(self.original)

    def __repr__(self) -> str:
        return f"<4-bit attention of {self.name}, by qat_patch: set backends and enable parallelism before patch_model>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of a module's attention, with the arguments of `qat_kernels.attention`, and the output of original attention."""

    query: torch.Tensor
    """[batch, heads, queries, head_dim]"""
    key: torch.Tensor
    """[batch, key heads, keys, head_dim]"""
    value: torch.Tensor
    """The shape of `key`."""
    out: torch.Tensor
    """The shape of `query`."""
    causal: bool
    scale: float | None
    key_mask: torch.Tensor | None
    """bool [batch, keys], True where a key may be seen."""
    window: int | None = None
    """How many keys a query sees, including its own; None: all before it."""
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    """Replaces causality and window: the first and the last key that each query sees, int32 [batch or 1, queries]."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """[heads]"""

    @property
    def query_mask(self) -> torch.Tensor | None:
        """bool [batch, queries], False where a query is padding; None where that is not known. Where a sequence attends to
        itself, the mask of its last keys is that of its queries. It is taken to do so if it is causal, or has as many keys as
        queries."""
        queries = self.query.shape[2]
        is_self_attention = self.causal or self.bounds is not None or queries == self.key.shape[2]
        return self.key_mask[:, -queries:] if self.key_mask is not None and is_self_attention else None


def under_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype, if it is on.

    On CUDA autocast runs RMSNorm in float32, so queries and keys arrive in float32 and values in bfloat16.
    """
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) for x in tensors)
