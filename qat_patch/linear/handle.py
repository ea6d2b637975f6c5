"""quantize_linears: switch linear layers to NVFP4, in place; the receipt, and unquantize_linears."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from qat_patch.config import block_of
from qat_patch.hosts import ADAPTERS

from .compressed import GROUP_SIZE, check_installed, global_scale
from .config import LinearQATConfig
from .module import LinearLayer, QuantizedLinear

_HANDLE = "_qat_linear_handle"
"""The attribute of a model that holds its handle."""
_SWITCHING = threading.RLock()
_ROOM = 2.0
"""Trained weights may double before they saturate. Inputs get none: a few of theirs are so large that E4M3 has no bit to
spare."""


class GlobalScales(NamedTuple):
    """Of one layer."""

    weight: float
    input: float | None
    """None if inputs are not rounded."""


class LinearHandle:
    """The quantized linear layers of a model: what was done, and how to switch it off.

    `print(handle)` is the receipt. It is independent of the handle of 4-bit attention: each switches off only its own.
    """

    def __init__(
        self, model: torch.nn.Module, config: LinearQATConfig, layers: dict[str, LinearLayer], skipped: dict[str, str]
    ) -> None:
        self.model = model
        """The model of the host library."""
        self.config = config
        """As it was applied."""
        self.layers = layers
        """The quantized layers by name."""
        self.skipped = skipped
        """The linear layers and experts that are not quantized, and why."""

    @property
    def modules(self) -> dict[str, QuantizedLinear]:
        """The modules of the quantized layers that still exist, by name."""
        known = set(self.layers.values())
        found = (x for x in self.model.modules() if isinstance(x, QuantizedLinear) and x.quantization in known)
        return {module.quantization.name: module for module in found}

    @property
    def merged(self) -> dict[str, torch.nn.Module]:
        """PEFT layers whose adapters are rounded together with the weight, by name. Other adapters stay beside it,
        unrounded."""
        wrappers = _peft_layers(self.model)
        if not wrappers:
            return {}
        from .merged_lora import MergedLora

        return {x.get_base_layer().quantization.name: x for x in wrappers if isinstance(x, MergedLora)}

    @property
    def scales(self) -> dict[str, GlobalScales]:
        """The active global scales. `quantize_linears(model, handle.config, scales=handle.scales)` restores the quantization.

        Raises:
            ValueError: inputs are rounded, and their range has not been measured.
        """
        for layer in self.layers.values():
            if layer.rounds_inputs and layer.input_scale is None:
                raise ValueError(
                    f"the range of the input of {layer.name} has not been measured: expected a calibrated model; run a few "
                    "batches inside `with get_linear_handle(model).calibration():`"
                )
        return {name: GlobalScales(layer.weight_scale, layer.input_scale) for name, layer in self.layers.items()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every layer computes as before, with its own weight and an unrounded input.

        Weights of a packed export stay on the 4-bit grid: the originals are not stored. As with `PatchHandle.disabled`, several
        contexts may be open at once and end in any order. With gradient checkpointing run the backward pass inside too.
        """
        self._hold(1)
        try:
            yield
        finally:
            self._hold(-1)

    @contextlib.contextmanager
    def calibration(self) -> Iterator[None]:
        """Inside, layers compute unquantized and their largest input is measured; at the end it sets `input_global_scale`.

        Run a few batches of real data inside, without gradients. With several processes (torch.distributed) all must take part;
        they get the maximum over all.

        Raises:
            ValueError: inputs are not rounded, a layer was never called, or an input was not finite. The scales do not change.
        """
        if not self.config.rounds_inputs:
            raise ValueError("calibration: expected format='nvfp4', got 'nvfp4a16', which rounds no inputs: leave it out")
        layers = list(self.layers.values())
        with self.disabled(), torch.compiler.set_stance("force_eager"):
            try:
                for layer in layers:
                    layer.is_measured, layer.largest = True, None
                yield
                largest = self._largest()
            finally:
                for layer in layers:
                    layer.is_measured, layer.largest = False, None
        for layer, amax in zip(layers, largest, strict=True):
            layer.input_scale = global_scale(amax, self.config.global_scale)

    def _largest(self) -> list[float]:
        if missing := [layer.name for layer in self.layers.values() if layer.largest is None]:
            raise ValueError(
                f"calibration: {missing[0]} was not called (of {len(missing)} layers): expected batches that reach every layer; "
                "leave it out: LinearQATConfig(exclude=...)"
            )
        found = [layer.largest for layer in self.layers.values() if layer.largest is not None]
        largest = torch.stack([x.to(found[0].device) for x in found])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        for name, x in zip(self.layers, largest.tolist(), strict=True):
            if not x < float("inf"):
                raise ValueError(f"calibration: the input of {name} is not finite ({x}); check the data and the model")
        return largest.tolist()

    def check_in_force(self, action: str) -> None:
        """Raise a ValueError unless every layer is quantized now; `action` names the request."""
        modules = self.modules
        for name, layer in self.layers.items():
            if name not in modules:
                raise ValueError(
                    f"{action}: {name}: expected a quantized linear layer, got a module that was put in its place; call "
                    "unquantize_linears and quantize_linears again"
                )
            if layer.off:
                raise ValueError(f"{action}: {name}: expected a quantized linear layer, got it inside disabled(); do it outside")

    @property
    def experts(self) -> list[str]:
        """The parameters that hold the weights of several experts; they are not quantized."""
        return [f"{name}.{key}" for name, module in self.model.named_modules() for key in _experts(module)]

    def _hold(self, by: int) -> None:
        with _SWITCHING:
            for layer in self.layers.values():
                layer.off += by

    def __str__(self) -> str:
        what = "weights and inputs" if self.config.rounds_inputs else "weights"
        number = len(self.layers) + len(self.skipped)
        lines = [
            f"{type(self.model).__name__}: {what} of {len(self.layers)} of {number} linear layers in NVFP4, by "
            f"compressed-tensors; global scales: {self.config.global_scale}"
        ]
        if vars(self.model).get(_HANDLE) is not self:
            lines.insert(0, "no longer in force: this is an earlier receipt")
        modules, merged = self.modules, self.merged
        for name, layer in self.layers.items():
            state = "" if name in modules else " - LOST: another module was put in its place"
            if layer.rounds_inputs and layer.input_scale is None:
                state += " - the range of its input has not been measured"
            how = " (packed)" if layer.is_packed else " with its adapters" if name in merged else ""
            lines.append(f"  quantized  {name}{how}{state}")
        return "\n".join(lines + [f"  left out  {name}: {reason}" for name, reason in self.skipped.items()])


def quantize_linears(
    model: torch.nn.Module,
    config: LinearQATConfig | None = None,
    *,
    scales: Mapping[str, GlobalScales] | None = None,
    merge_adapters: bool = True,
) -> LinearHandle:
    """Make the linear layers of a model round their weights and inputs to NVFP4, in place, for training and evaluation.

    Weights and names do not change: layers compute with a rounded copy, with straight-through gradients. This trains a model for
    servers whose linear layers are in NVFP4; `export_checkpoint` packs the weights for them. It works together with 4-bit
    attention (`patch_model`), in either order, and with LoRA.

    Global scales are chosen here and then stay. Layers of one module (`q_proj`, `k_proj` and `v_proj` of an attention) share the
    one of their weights, because servers merge these layers and keep one scale.

    Args:
        model: a model of Transformers or Diffusers, or a module around one.
        config: which layers to quantize, and how. Default: `LinearQATConfig()`, weights and inputs.
        scales: global scales by name, from `handle.scales`; default: measured. Those of inputs need `handle.calibration()`.
        merge_adapters: if the model has LoRA adapters, round the sum of a weight and its adapters, for an export of merged
            weights. False: adapters stay beside the quantized weight, unrounded, for an export of adapters alone. Adapters
            that are added later also stay beside it.

    Returns:
        The handle; the model also keeps it (`get_linear_handle`).

    Raises:
        ValueError: compressed-tensors is not installed; this is not one single model; its linear layers are quantized already; no
            layer is left; or a layer cannot be quantized. Then nothing was changed.
    """
    config = LinearQATConfig() if config is None else config
    if not isinstance(config, LinearQATConfig):
        raise ValueError(f"quantize_linears: config: expected a LinearQATConfig, got {config!r}")
    check_installed("quantize_linears")
    if get_linear_handle(model) is not None:
        raise ValueError("quantize_linears: this model is quantized already; call unquantize_linears first")
    host = _host_model(model)
    if (quantizer := getattr(host, "hf_quantizer", None)) is not None:
        method = quantizer.quantization_config.quant_method
        if getattr(method, "value", method) != "qat_patch":
            raise ValueError(
                f"quantize_linears: expected ordinary weights, got a {type(host).__name__} quantized by "
                f"{getattr(method, 'value', method)}; load the model without quantization"
            )
    chosen, skipped = _choose(host, config)
    to_merge = _to_merge(host, chosen) if merge_adapters else []
    if scales is not None and scales.keys() != chosen.keys():
        wrong = sorted(scales.keys() ^ chosen.keys())
        raise ValueError(
            f"quantize_linears: scales: expected those of the layers to quantize, got others: {', '.join(wrong[:3])}"
        )
    if scales is None:
        scales = _measured(chosen, config)
    layers = {
        name: LinearLayer(
            name=name, weight_scale=scales[name].weight, input_scale=scales[name].input, rounds_inputs=config.rounds_inputs
        )
        for name in chosen
    }
    for name, module in chosen.items():
        module.__class__ = QuantizedLinear
        module.quantization = layers[name]  # type: ignore[assignment]
    if to_merge:
        from .merged_lora import merge

        merge(to_merge)
    handle = LinearHandle(host, config, layers, skipped)
    setattr(host, _HANDLE, handle)
    return handle


def unquantize_linears(model: torch.nn.Module) -> None:
    """Make linear layers compute as before `quantize_linears`, bit for bit. Those of a packed export keep their rounded weights.

    Raises:
        ValueError: they are not quantized.
    """
    handle = get_linear_handle(model)
    if handle is None:
        raise ValueError("unquantize_linears: the linear layers of this model are not quantized; quantize_linears does that")
    if merged := handle.merged:
        from .merged_lora import undo

        undo(merged.values())
    for module in handle.modules.values():
        del module.quantization
        module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    delattr(handle.model, _HANDLE)


def get_linear_handle(model: Any) -> LinearHandle | None:
    """The handle of a model with quantized linear layers (also through a wrapper such as DDP or PEFT), or None."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((vars(module)[_HANDLE] for module in modules if _HANDLE in vars(module)), None)


def _host_model(model: Any) -> torch.nn.Module:
    """The one model of a host library in a module."""
    found = (
        [x for x in model.modules() if any(adapter.owns(x) for adapter in ADAPTERS.values())]
        if isinstance(model, torch.nn.Module)
        else []
    )
    if not found:
        raise ValueError(
            f"quantize_linears: expected a model of {' or '.join(ADAPTERS)}, got "
            f"{type(model).__module__}.{type(model).__name__}; "
            "of a pipeline pass the transformer"
        )
    inside = set(found[0].modules())
    if others := [x for x in found if x not in inside]:
        raise ValueError(
            f"quantize_linears: expected a module around one model, got one around {type(found[0]).__name__} and "
            f"{type(others[0]).__name__}; pass them one by one"
        )
    return found[0]


def _choose(model: torch.nn.Module, config: LinearQATConfig) -> tuple[dict[str, torch.nn.Linear], dict[str, str]]:
    """The layers to quantize, and those left out, with reasons."""
    # PEFT's own layers beside a layer do not count, and the layer itself has another name then.
    wrappers = _peft_layers(model)
    bases = {inner for wrapper in wrappers for inner in wrapper.get_base_layer().modules()}
    of_adapters = {inner for wrapper in wrappers for inner in wrapper.modules()} - bases
    chosen: dict[str, torch.nn.Linear] = {}
    skipped: dict[str, str] = {}
    in_blocks, refused = [], []
    for path, module in model.named_modules():
        if module in of_adapters:
            continue
        name = path.replace(".base_layer", "")
        skipped |= {f"{name}.{key}": f"experts in one parameter of shape {shape}" for key, shape in _experts(module).items()}
        if not isinstance(module, torch.nn.Linear):
            continue
        if block_of(name) is None:
            skipped[name] = "outside of the numbered blocks"
            continue
        in_blocks.append(name)
        if (pattern := config.excluded_by(name)) is not None:
            skipped[name] = f"excluded by {pattern!r}"
        elif type(module) is not torch.nn.Linear:
            skipped[name] = f"a {type(module).__name__}, whose weights are another's to quantize"
        elif module.in_features % GROUP_SIZE:
            refused.append(f"{name} has {module.in_features} inputs")
        else:
            chosen[name] = module
    config.check_patterns(in_blocks)
    if refused:
        raise ValueError(
            f"quantize_linears: expected numbers of inputs that are multiples of {GROUP_SIZE}, got {len(refused)} others: "
            f"{', '.join(refused[:3])}; leave them out: LinearQATConfig(exclude=...)"
        )
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"quantize_linears: nothing to quantize in {type(model).__name__} ({reasons})")
    return chosen, skipped


def _peft_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's wrappers around the layers of a model."""
    return [x for x in model.modules() if hasattr(x, "get_base_layer")]


def _to_merge(model: torch.nn.Module, chosen: dict[str, torch.nn.Linear]) -> list[Any]:
    """PEFT's wrappers around the layers to quantize."""
    names = {module: name for name, module in chosen.items()}
    found = [x for x in _peft_layers(model) if x.get_base_layer() in names]
    if not found:
        return []
    from .merged_lora import problem

    for layer in found:
        if (reason := problem(layer)) is not None:
            raise ValueError(
                f"quantize_linears: {names[layer.get_base_layer()]}: expected plain LoRA, whose sum with the weight can be "
                f"rounded, got {reason}; merge_adapters=False leaves adapters beside the quantized weight"
            )
    return found


def _experts(module: torch.nn.Module) -> dict[str, list[int]]:
    """The shapes of parameters [experts, out, in] of a module, by name."""
    if type(module).__module__.startswith("torch."):
        return {}
    parameters = module.named_parameters(recurse=False)
    return {key: list(x.shape) for key, x in parameters if x.ndim == 3 and x.shape[0] > 1}


def _measured(chosen: dict[str, torch.nn.Linear], config: LinearQATConfig) -> dict[str, GlobalScales]:
    """Global scales of weights: one for all layers of a module."""
    largest: dict[str, float] = {}
    for name, module in chosen.items():
        if module.weight.is_meta:
            raise ValueError(
                f"quantize_linears: the weight of {name} is not in memory; load the model without offloading to disk"
            )
        amax = module.weight.detach().abs().amax().item() if module.weight.numel() else 0.0
        if not amax < float("inf"):
            raise ValueError(f"quantize_linears: the weight of {name} is not finite")
        parent = name.rpartition(".")[0]
        largest[parent] = max(largest.get(parent, 0.0), amax)
    return {
        name: GlobalScales(global_scale(largest[name.rpartition(".")[0]], config.global_scale, room=_ROOM), None)
        for name in chosen
    }
