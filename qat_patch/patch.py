"""patch_model: find the models to patch, plan, check and apply the patch, return the receipt. `plan.py` handles one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qat_kernels.arguments import Impl

from .config import AttnQATConfig
from .handle import PatchHandle
from .hosts import ADAPTERS
from .implementation import choose_impl
from .plan import HANDLE, make_plan, restore, set_shifts


def patch_model(
    model: Any,
    config: AttnQATConfig | None = None,
    *,
    k_shift: Mapping[str, torch.Tensor] | None = None,
    q_shift: Mapping[str, torch.Tensor] | None = None,
    impl: Impl = "auto",
) -> PatchHandle:
    """Switch a model to 4-bit attention, in place. Parameters and state_dict keys stay as they are.

    Args:
        model: a Transformers causal language model, a Diffusers transformer or ControlNet, a module around one model (such as
            a PEFT model), or a Diffusers pipeline (ordinary or modular). Of a pipeline only the transformers are patched
            (`transformer`, `transformer_2` of Wan 2.2, `transformer_ref` of MiniMax-H3, ...); the receipt names other models
            that could be. Module names start inside each model, without `transformer.`.
        config: which modules to patch, and what to quantize. Default: the config that an export of this package stored in the
            model's config, or beside it for a server; else `AttnQATConfig()`, every attention module in NVFP4 on this package's
            own grid. `AttnQATConfig(spec=QuantSpec(preset=...))` computes what a server computes (docs/SERVERS.md).
        k_shift: vectors that are subtracted from keys before quantization, float32 [key heads, head_dim], by the names of
            patched modules (docs/NUMERICS.md, section 6). `calibrate` measures them; `handle.k_shift` has them. Without
            `config`, a model from an export with K shifts needs them, or `{}` to run without.
        q_shift: the same for queries: one vector for the query heads that share a key head. What it takes from the scores is
            added back from the unquantized keys, so no exact score changes.
        impl: the implementation of 4-bit attention, as for `qat_kernels.attention`. It changes the speed (and, with
            `sageattn3`, how P is scaled: docs/NUMERICS.md, section 9); checkpoints do not store it. `auto` takes the fastest
            that is known to be right on this machine: FP4 units, with `fp4` or `sageattn3`, for calls without a gradient, if
            `handle.check()` or `qat-patch doctor --check` has checked them.

    Returns:
        The handle; the model also keeps it (see `get_handle`).

    Raises:
        ValueError: the model is patched already, has no attention that can be patched, needs something that 4-bit attention
            cannot do, or the shifts of its export are missing; a module holds several models; `impl` cannot run here; or
            this version of the host library is not supported. Then nothing was changed.
    """
    if taken := _handles(model):
        which = " and ".join(name for name in taken if name) or "this model"
        raise ValueError(f"patch_model: {which} is patched already; call unpatch_model first to patch it differently")
    if not isinstance(config, AttnQATConfig | None):
        raise ValueError(
            f"patch_model: config: expected an AttnQATConfig, got {config!r}; for a preset AttnQATConfig(spec=QuantSpec(...))"
        )
    shifts = {which: given for which, given in (("k_shift", k_shift), ("q_shift", q_shift)) if given is not None}
    plans = {prefix: make_plan(host, part, config, given=shifts) for prefix, host, part in _parts(model)}
    skipped = [f"{name}: {reason}" for plan in plans.values() for name, reason in plan.skipped.items()]
    if not any(plan.patched for plan in plans.values()):
        reasons = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        raise ValueError(f"patch_model: nothing to patch in {type(model).__name__} ({reasons})")
    for which, given in shifts.items():
        set_shifts(plans, which, given)
    choose_impl(plans.values(), impl)
    try:
        for plan in plans.values():
            setattr(plan.model, HANDLE, PatchHandle({"": plan}))
            plan.apply()
    except BaseException:
        restore(plans.values())
        raise
    return require_handle(model)


def unpatch_model(model: Any) -> None:
    """Restore a model's original attention. Its outputs are then bit-equal to those before the patch.

    Raises:
        ValueError: the model is not patched.
    """
    handle = get_handle(model)
    if handle is None:
        raise ValueError("unpatch_model: this model is not patched; patch_model patches it")
    restore(handle.plans.values())


def get_handle(model: Any) -> PatchHandle | None:
    """The handle of a patched model (also through a wrapper such as DDP or PEFT), or None.

    For a pipeline, or a module around several models, this is one handle for all patched models; each also has its own handle.
    """
    handles = _handles(model)
    if not handles or "" in handles:
        return handles.get("")
    others = next((models for adapter in ADAPTERS.values() if (models := adapter.other_models(model))), {})
    untouched = {name: type(other).__name__ for name, other in others.items() if not _handles(other)}
    return PatchHandle({f"{name}.": handle.plans[""] for name, handle in handles.items()}, untouched)


def require_handle(model: Any) -> PatchHandle:
    """The handle of a model that is known to be patched.

    Raises:
        ValueError: it is not patched.
    """
    handle = get_handle(model)
    if handle is None:
        raise ValueError(f"this {type(model).__name__} is not patched; call patch_model first")
    return handle


def _handles(model: Any) -> dict[str, PatchHandle]:
    """The handles of the patched models in a model or pipeline, by name; that of a single model under the empty name."""
    handles = {}
    for name, root in _roots(model).items():
        patched = _outermost(root, lambda module: HANDLE in vars(module))
        for path, module in patched.items():
            handles[".".join(filter(None, (name, path if len(patched) > 1 else "")))] = vars(module)[HANDLE]
    return handles


def _roots(model: Any) -> dict[str, torch.nn.Module]:
    """The modules to search for models: the transformers of a pipeline by component name, or one module under the empty name."""
    if isinstance(model, torch.nn.Module):
        return {"": model}
    return next((models for adapter in ADAPTERS.values() if (models := adapter.pipeline_models(model))), {})


def _parts(model: Any) -> list[tuple[str, str, torch.nn.Module]]:
    """The models to patch as (prefix of their module names, host, model)."""
    parts = []
    for name, root in _roots(model).items():
        found = _outermost(root, _host_of)
        if len(found) > 1:
            names = [f"{path} ({type(module).__name__})" for path, module in found.items()]
            raise ValueError(
                f"patch_model: expected a module around one model, got a {type(root).__name__} around {len(found)}: "
                f"{', '.join(names)}; patch those that you mean, one by one: patch_model(module.{next(iter(found))})"
            )
        parts += [(f"{name}." if name else "", host, module) for module in found.values() if (host := _host_of(module))]
    if not parts:
        got = f"{type(model).__module__}.{type(model).__name__}"
        if isinstance(model, (str, os.PathLike)):
            got = f"{str(model)!r}; load the model first (from_pretrained, or qat_patch.load_checkpoint for an export)"
        raise ValueError(
            f"patch_model: expected a model of {' or '.join(ADAPTERS)}, or a diffusers pipeline with a transformer, got {got}"
        )
    return parts


def _host_of(module: torch.nn.Module) -> str | None:
    return next((host for host, adapter in ADAPTERS.items() if adapter.owns(module)), None)


def _outermost(module: torch.nn.Module, wanted: Callable[[torch.nn.Module], Any]) -> dict[str, torch.nn.Module]:
    """The outermost matching modules by name, each once, even if it has several names."""
    found: dict[str, torch.nn.Module] = {}
    seen: set[torch.nn.Module] = set()

    def walk(inner: torch.nn.Module, path: str) -> None:
        if inner in seen:
            return
        seen.add(inner)
        if wanted(inner):
            found[path] = inner
            return
        for name, child in inner.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(module, "")
    return found
