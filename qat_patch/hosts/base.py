"""What this package needs to know about a host library: the interface of an adapter. Each library has one."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

from qat_kernels import QuantSpec
from qat_patch.layer import AttentionLayer
from qat_patch.metadata import AttentionMetadata


class HostAdapter(Protocol):
    """A module with these functions. None of them imports the host library unless there is a model of it."""

    MECHANISM: str
    """What attention must go through to be patched, in words."""
    REPLACED_BY: str
    """The methods of a model or its attention modules that replace the attention that runs."""
    CAUSAL: bool
    """Whether attention in its models is causal, as far as known before a call."""

    def owns(self, model: object) -> bool:
        """Whether this is a model of the host library."""

    def pipeline_models(self, pipeline: object) -> dict[str, torch.nn.Module]:
        """The models to patch in a pipeline of the host library, by component name; empty for anything else."""

    def other_models(self, pipeline: object) -> dict[str, torch.nn.Module]:
        """Models in a pipeline that are patched only on request, by component name."""

    def stored_metadata(self, model: Any) -> AttentionMetadata | None:
        """The metadata that an export left in the model's config."""

    def attention_modules(self, model: Any) -> dict[str, torch.nn.Module]:
        """The modules that can be patched, by name."""

    def original(self, model: Any, module: Any) -> Any:
        """The attention that runs in a module now, in the form that `restore` needs.

        Raises:
            ValueError: it is 4-bit attention already.
        """

    def reason_to_skip(self, module: Any) -> str | None:
        """Why a module keeps its original attention, in cases that are not a mistake of the user."""

    def problem(self, module: Any, spec: QuantSpec) -> str | None:
        """Why 4-bit attention cannot compute what this module needs."""

    def prepare(self, original: Any) -> object:
        """Register 4-bit attention in this process, for a patched model that is unpickled."""

    def key_shape(self, module: Any) -> tuple[int, int] | None:
        """Key heads and head dim, as far as the module says."""

    def apply(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Switch the model to 4-bit attention."""

    def switch(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Make the model run the attention that its layers ask for now: 4-bit or original."""

    def restore(self, model: Any, layers: list[AttentionLayer]) -> None:
        """Undo `apply`, even an unfinished one."""

    def replaced(self, module: Any, layer: AttentionLayer) -> str | None:
        """What has replaced a module's 4-bit attention since the patch, or None."""

    def skipping_hook(self, module: Any) -> str | None:
        """The name of a hook of the host library that may skip this module's attention on purpose, or None."""

    def why_not_reached(self, module: Any) -> str:
        """Why a call of a patched module may not reach 4-bit attention, in words."""

    def new_cache(self, model: Any, layers: list[AttentionLayer]) -> Any:
        """An empty cache for generation that keeps K and V of the patched layers in NVFP4.

        Raises:
            ValueError: there can be none for this model.
        """

    def generating(self, model: Any, layers: list[AttentionLayer]) -> contextlib.AbstractContextManager[None]:
        """Inside, calls of the model's `generate` without a cache get a new one from `new_cache`.

        Raises:
            ValueError: there can be none for this model, or it generates so already.
        """
