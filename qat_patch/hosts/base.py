"""What this package needs to know of a host library: the contract of an adapter, one for each library."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

from qat_kernels import QuantSpec
from qat_patch.layer import AttentionLayer
from qat_patch.metadata import AttentionMetadata


class HostAdapter(Protocol):
    """A module with these functions. None of them imports the host library before a model of it is there."""

    MECHANISM: str
    """What attention has to go through to be patched, in words."""
    REPLACED_BY: str
    """The method of a model, or of its attention modules, that puts other attention in the place of what runs there."""
    CAUSAL: bool
    """Whether attention in its models is causal, as far as one can say before a call."""

    def owns(self, model: object) -> bool:
        """Whether this is a model of the host library."""

    def pipeline_models(self, pipeline: object) -> dict[str, torch.nn.Module]:
        """The models to patch in a pipeline of the host library, by component name; empty for anything else."""

    def other_models(self, pipeline: object) -> dict[str, torch.nn.Module]:
        """The models in a pipeline that could be patched too, and are not unless they are asked for, by component name."""

    def stored_metadata(self, model: Any) -> AttentionMetadata | None:
        """The metadata that an export left in the model's config."""

    def attention_modules(self, model: Any) -> dict[str, torch.nn.Module]:
        """What can be patched, by name."""

    def original(self, model: Any, module: Any) -> Any:
        """What runs there now, in the form that `restore` needs.

        Raises:
            ValueError: 4-bit attention runs there already.
        """

    def reason_to_skip(self, module: Any) -> str | None:
        """Why a module keeps its original attention although that is no mistake of the user's."""

    def problem(self, module: Any, spec: QuantSpec) -> str | None:
        """Why 4-bit attention cannot compute what this module asks for."""

    def prepare(self, original: Any) -> object:
        """Make this process know 4-bit attention in place of what ran before: for a patched model that is unpickled."""

    def key_shape(self, module: Any) -> tuple[int, int] | None:
        """Key heads and head dim, as far as the module tells."""

    def apply(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Point the model at 4-bit attention."""

    def switch(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Make the model run what its layers ask for now: 4-bit attention, or the original."""

    def restore(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Undo `apply`, also a half-finished one."""

    def replaced(self, module: Any, layer: AttentionLayer) -> str | None:
        """What somebody put in the place of a module's 4-bit attention since the patch, or None."""

    def skipping_hook(self, module: Any) -> str | None:
        """The name of a hook of the host library on this module that may skip what is in it on purpose, or None."""

    def why_not_reached(self, module: Any) -> str:
        """Why a call of a patched module may end without 4-bit attention, in words."""

    def new_cache(self, model: Any, layers: list[AttentionLayer]) -> Any:
        """An empty cache for generation that keeps K and V of the patched layers in NVFP4.

        Raises:
            ValueError: there can be none for this model.
        """

    def generating(self, model: Any, layers: list[AttentionLayer]) -> contextlib.AbstractContextManager[None]:
        """Inside, whoever lets the model generate and passes no cache gets a new one from `new_cache`.

        Raises:
            ValueError: there can be none for this model, or it generates so already.
        """
