"""The block that an export carries in its config and in its safetensors headers: what inference must do, and how to read it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from .config import AttnQATConfig, check_keys

METHOD = "qat_patch"
"""`quant_method` in a Transformers config, and the key of the block in a safetensors header."""
CONFIG_KEYS = {"transformers": "quantization_config", "diffusers": "attention_quantization"}
"""Where the block stands in a model's config, by host library."""
ADAPTER_FILE = "qat_patch.json"
"""Holds the block of an export of adapters alone, which has no model config."""
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """What an exported checkpoint says about its attention."""

    config: AttnQATConfig
    """What was patched, and what is quantized."""
    modules: tuple[str, ...]
    """The names of the patched modules; loading checks that the same ones are patched again."""
    package_version: str
    """The version of qat_patch that wrote the export."""
    training: dict[str, Any] | None = None
    """How the weights were trained, as the recipe put it; for people, not for programs."""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the config file; `from_dict` is the inverse."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "package_version": self.package_version,
            "attention": self.config.to_dict(),
            "modules": list(self.modules),
            "training": self.training,
        }

    def to_json(self) -> str:
        """`to_dict` on one line, for a safetensors header."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Any) -> AttentionBlock:
        """Read a block.

        Raises:
            ValueError: another format version, an unknown or missing key, or a wrong value.
        """
        if not cls.is_ours(values):
            raise ValueError(f"attention block: expected a mapping with quant_method {METHOD!r}, got {values!r}")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"attention block: this version of qat_patch reads format_version {FORMAT_VERSION}, got "
                f"{values.get('format_version')!r}; install the version that wrote it ({values.get('package_version')})"
            )
        known = ["quant_method", "format_version", "package_version", "attention", "modules", "training"]
        check_keys("attention block", values, known)
        for key in known:
            if key not in values:
                raise ValueError(f"attention block: the key {key!r} is missing; the export is damaged")
        modules = values["modules"]
        if not isinstance(modules, list | tuple) or not all(isinstance(name, str) for name in modules):
            raise ValueError(f"attention block: modules: expected a list of module names, got {modules!r}")
        return cls(
            config=AttnQATConfig.from_dict(values["attention"]),
            modules=tuple(modules),
            package_version=values["package_version"],
            training=values["training"],
        )

    @staticmethod
    def is_ours(values: Any) -> bool:
        """Whether this is a block of this package at all, of whatever version."""
        return isinstance(values, dict) and values.get("quant_method") == METHOD

    def check_modules(self, patched: list[str]) -> None:
        """Raise a ValueError unless exactly the modules of the export were patched."""
        if set(patched) != set(self.modules):
            missing, extra = sorted(set(self.modules) - set(patched)), sorted(set(patched) - set(self.modules))
            raise ValueError(
                f"attention block: the export names {len(self.modules)} modules, {len(patched)} can be patched here; "
                f"missing: {missing[:3]}, not in the export: {extra[:3]}; the config does not belong to these weights"
            )
