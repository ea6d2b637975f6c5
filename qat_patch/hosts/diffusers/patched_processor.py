"""The class of processors in patched modules: a subclass of the stock class, with an `AttentionLayer` as its backend."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from qat_patch.layer import AttentionLayer

PREFIX = "Patched"
"""The prefix of the names of these classes."""


@dataclasses.dataclass
class Refusal:
    """Replaces the methods of a patched model that set the backend of all processors and the default of the process."""

    name: str

    def __call__(self, backend: str | None = None) -> None:
        _refuse_backend(self.name, backend)


def _refuse_backend(name: str, backend: Any) -> None:
    got = "a reset" if backend is None else repr(backend)
    raise ValueError(
        f"{name} runs the 4-bit attention of patch_model: expected no other attention backend, got {got}; call unpatch_model "
        "first, or exclude this module from the patch"
    )


class Patched:
    """The common base of all patched processor classes."""

    _attention_backend: Any
    _parallel_config: Any


@functools.cache
def patched_class(stock: Any, rebuild: Any) -> Any:
    """A subclass of a stock processor with a layer as backend. `rebuild(stock, state)` restores a copied or pickled one.

    Code that looks processors up by their class, such as the layer skip of diffusers, must find the entry of the stock class.
    """

    class LikeStock(type(stock)):  # type: ignore[misc]
        def __hash__(cls) -> int:
            return hash(stock)

        def __eq__(cls, other: object) -> bool:
            return cls is other or stock is other

    class PatchedStock(stock, Patched, metaclass=LikeStock):
        @functools.wraps(stock.__call__)  # attention modules look at the signature
        def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(attn, "fused_projections", False) and torch.is_grad_enabled():
                _refuse_fused(self._qat_layer.name, attn)
            return stock.__call__(self, attn, *args, **kwargs)

        @property
        def _attention_backend(self) -> AttentionLayer:
            return self._qat_layer

        @_attention_backend.setter
        def _attention_backend(self, backend: Any) -> None:
            _refuse_backend(self._qat_layer.name, backend)

        @property
        def _parallel_config(self) -> AttentionLayer:
            return self._qat_layer

        @_parallel_config.setter
        def _parallel_config(self, config: Any) -> None:
            raise ValueError(
                f"{self._qat_layer.name} runs the 4-bit attention of patch_model: expected enable_parallelism before the patch, "
                "got it afterwards; call unpatch_model first"
            )

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            raise ValueError(
                f"expected the class of a processor to build another, got that of a {stock.__name__} whose module runs the 4-bit "
                "attention of patch_model; call unpatch_model, load the adapter or set the processors, and patch again"
            )

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return rebuild, (stock, dict(self.__dict__))

    PatchedStock.__name__ = PatchedStock.__qualname__ = f"{PREFIX}{stock.__name__}"
    return PatchedStock


def _refuse_fused(name: str, attn: torch.nn.Module) -> None:
    """Refuse to train fused projections: they are copies, and the original projections, which are saved, would not change."""
    if any(parameter.requires_grad for parameter in attn.parameters()):
        raise ValueError(
            f"4-bit attention ({name}): expected separate projections for training, got those of fuse_qkv_projections, which "
            "adapters do not reach and which leave to_q, to_k and to_v untrained; call model.unfuse_qkv_projections(), or use "
            "torch.no_grad() if this is no training"
        )
