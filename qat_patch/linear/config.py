"""Which linear layers are rounded to NVFP4, and how: LinearQATConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from qat_patch.config_reader import from_dict

Format = Literal["nvfp4", "nvfp4a16"]
GlobalScale = Literal["power_of_two", "compressed_tensors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearQATConfig:
    """Which linear layers compute in NVFP4, and how. docs/NUMERICS.md, section 10.

    Only linear layers in numbered blocks are quantized, such as `model.layers.7.mlp.up_proj`. Layers outside the blocks
    (embeddings, the output head, the conditioning of a diffusion model) stay as they are.

    Raises:
        ValueError: a field has a wrong value.
    """

    format: Format = "nvfp4"
    """`nvfp4`: weights and inputs in 4 bits (w4a4). `nvfp4a16`: only weights (w4a16)."""
    exclude: tuple[str, ...] = ()
    """Patterns of linear layers in blocks that are not quantized, such as ["*.down_proj"]."""
    global_scale: GlobalScale = "power_of_two"
    """The factor that brings a tensor's scales into the range of E4M3. `power_of_two`: quantized values are exact in bfloat16,
    and weights may double before they saturate. `compressed_tensors`: 448 * 6 / amax, as compressed-tensors computes it."""

    def __post_init__(self) -> None:
        for name, allowed in (("format", get_args(Format)), ("global_scale", get_args(GlobalScale))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"LinearQATConfig.{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f"LinearQATConfig.exclude: expected a sequence of module name patterns, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded too."""
        return self.format == "nvfp4"

    def excluded_by(self, name: str) -> str | None:
        """The pattern that excludes a layer, or None."""
        return next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise a ValueError if a pattern matches none of these layers: a setting without effect is a mistake."""
        names = list(names)
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                raise ValueError(
                    f"LinearQATConfig.exclude: the pattern {pattern!r} matches no linear layer in a block; there are {some}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` is the inverse."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LinearQATConfig)} | {
            "exclude": list(self.exclude)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearQATConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: an unknown key, or a wrong value.
        """
        return from_dict(cls, values, "LinearQATConfig", checks_itself=True)
