"""Packed linear layers in an export: the layout of compressed-tensors that vLLM, SGLang and Transformers read, and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from qat_patch.config_reader import check_keys

from .compressed import GROUP_SIZE, pack, unpack
from .config import LinearQATConfig
from .handle import GlobalScales, LinearHandle, quantize_linears

FORMAT = "nvfp4-pack-quantized"
"""The name of the layout."""
_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}
_MOST_PATTERNS, _LONGEST_TEXT = 4096, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """The entry of an export's `qat_patch.json` about its quantized linear layers."""

    config: LinearQATConfig
    """The applied config."""
    scales: dict[str, GlobalScales]
    """The global scales of the quantized layers, by name."""
    left_out: tuple[str, ...]
    """The linear layers that are not quantized."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` is the inverse."""
        layers = {
            name: {"weight_global_scale": scales.weight, "input_global_scale": scales.input}
            for name, scales in self.scales.items()
        }
        return {"config": self.config.to_dict(), "layers": layers, "left_out": list(self.left_out)}

    @classmethod
    def from_dict(cls, values: Any) -> LinearRecord:
        """The record that `to_dict` wrote.

        Raises:
            ValueError: an unknown or missing key, or a wrong value.
        """
        _check_exactly("linear", values, ["config", "layers", "left_out"])
        config, layers, left_out = values["config"], values["layers"], values["left_out"]
        _check_exactly("linear: config", config, [field.name for field in dataclasses.fields(LinearQATConfig)])
        config = LinearQATConfig.from_dict(config)
        if len(config.exclude) > _MOST_PATTERNS or not _are_texts([*config.exclude]):
            raise ValueError(
                f"linear: config: exclude: expected at most {_MOST_PATTERNS} patterns of {_LONGEST_TEXT} characters; the export "
                "is damaged, or hostile"
            )
        if not isinstance(layers, dict) or not layers or not _are_texts([*layers]):
            raise ValueError(f"linear: layers: expected a mapping of layers, got {layers!r}")
        if not isinstance(left_out, list) or not _are_texts(left_out):
            raise ValueError(f"linear: left_out: expected names of layers, got {left_out!r}")
        for name, layer in layers.items():
            _check_exactly(f"linear: layers: {name}", layer, ["weight_global_scale", "input_global_scale"])
            weight, of_input = layer["weight_global_scale"], layer["input_global_scale"]
            if not _is_scale(weight) or not (_is_scale(of_input) if config.rounds_inputs else of_input is None):
                raise ValueError(f"linear: layers: {name}: expected the global scales of {config.format}, got {layer!r}")
        scales = {name: GlobalScales(x["weight_global_scale"], x["input_global_scale"]) for name, x in layers.items()}
        return cls(config=config, scales=scales, left_out=tuple(left_out))

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The entry of config.json, as compressed-tensors writes it."""
        inputs = _NVFP4 | {"dynamic": "local", "observer": "static_minmax"}
        group = {
            "targets": ["Linear"],
            "weights": _NVFP4 | {"dynamic": False},
            "input_activations": inputs if self.config.rounds_inputs else None,
            "output_activations": None,
            "format": FORMAT,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.left_out),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def record_of(handle: LinearHandle) -> LinearRecord:
    """The record of a model.

    Raises:
        ValueError: the range of inputs was not measured.
    """
    linears = [name for name in handle.skipped if name not in handle.experts]
    return LinearRecord(config=handle.config, scales=handle.scales, left_out=tuple(linears))


def packed_state(state: dict[str, torch.Tensor], handle: LinearHandle) -> dict[str, torch.Tensor]:
    """A state_dict with packed weights of quantized layers, exactly as they compute. They must not have been cast before.

    `NAME.weight` becomes `NAME.weight_packed`, `NAME.weight_scale` and `NAME.weight_global_scale` (see `pack`), and if inputs
    are rounded `NAME.input_global_scale`, float32 [1].

    Raises:
        ValueError: a weight comes from a packed export and has been changed since.
    """
    packed = dict(state)
    for name, scales in handle.scales.items():
        weight = packed.pop(f"{name}.weight")
        tensors = pack(weight, scales.weight)
        if handle.layers[name].is_packed and not torch.equal(unpack(tensors).to(weight.dtype), weight):
            raise ValueError(
                f"{name}: expected the weight of the packed export that it comes from, got one that is not on its grid; copy "
                "the folder of that export"
            )
        if scales.input is not None:
            tensors["input_global_scale"] = torch.tensor([scales.input])
        packed |= {f"{name}.{key}": x.detach().cpu().contiguous() for key, x in tensors.items()}
    return packed


def unpacked_state(state: dict[str, torch.Tensor], record: LinearRecord) -> dict[str, torch.Tensor]:
    """The inverse of `packed_state`, with weights in float32.

    Raises:
        ValueError: the tensors do not fit the record.
    """
    state = dict(state)
    for name, scales in record.scales.items():
        parts = ["weight_packed", "weight_scale", "weight_global_scale"] + (
            [] if scales.input is None else ["input_global_scale"]
        )
        tensors = {part: state.pop(f"{name}.{part}", None) for part in parts}
        if missing := [part for part, x in tensors.items() if x is None]:
            raise ValueError(f"{name}: {missing[0]} is missing; the export is damaged")
        found = {part: x for part, x in tensors.items() if x is not None}
        codes, of_groups = found["weight_packed"], found["weight_scale"]
        is_right = (
            codes.dtype == torch.uint8
            and codes.ndim == 2
            and of_groups.dtype == torch.float8_e4m3fn
            and of_groups.shape == (codes.shape[0], codes.shape[1] * 2 // GROUP_SIZE)
            and not codes.shape[1] * 2 % GROUP_SIZE
        )
        expected = {"weight_global_scale": scales.weight, "input_global_scale": scales.input}
        for part in parts[2:]:
            x = found[part]
            is_right = is_right and x.dtype == torch.float32 and x.shape == (1,) and x.item() == expected[part]
        if not is_right:
            raise ValueError(
                f"{name}: expected uint8 codes [out, in / 2], E4M3 scales [out, in / 16] and the global scales of "
                "qat_patch.json; the export is damaged, or parts of several"
            )
        state[f"{name}.weight"] = unpack(found)
    return state


def restore_packed(model: torch.nn.Module, record: LinearRecord) -> LinearHandle:
    """Quantize the linear layers of a model with unpacked weights: these are on the grid, and are not trained."""
    handle = quantize_linears(model, record.config, scales=record.scales)
    for name, module in handle.modules.items():
        handle.layers[name].is_packed = True
        module.weight.requires_grad_(False)
    return handle


def _check_exactly(what: str, values: Any, known: list[str]) -> None:
    check_keys(what, values, known)
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{what}: the key {missing[0]!r} is missing; the export is damaged")


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(x, str) and len(x) <= _LONGEST_TEXT for x in values)


def _is_scale(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
