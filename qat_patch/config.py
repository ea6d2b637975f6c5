"""What to patch and how: AttnQATConfig, and its JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from qat_kernels import NVFP4, QuantSpec
from qat_kernels.spec import GROUP_SIZE, MAX_HEAD_DIM


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttnQATConfig:
    """Which attention modules run 4-bit attention, and what it quantizes.

    Raises:
        ValueError: a field has a wrong type.
    """

    spec: QuantSpec = NVFP4
    """What is quantized; docs/NUMERICS.md."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of module names, as `model.named_modules()` spells them; a module needs to match one."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of module names that keep their original attention."""

    def __post_init__(self) -> None:
        if not isinstance(self.spec, QuantSpec):
            raise ValueError(f"AttnQATConfig.spec: expected a QuantSpec, got {self.spec!r}")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"AttnQATConfig.{name}: expected a sequence of module name patterns, got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))

    def reason_to_skip(self, name: str) -> str | None:
        """Why the module of this name keeps its original attention, or None if it is to be patched."""
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "matches no include pattern"
        return None

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise a ValueError if a pattern matches none of these modules: a setting without effect is a mistake."""
        names = list(names)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"AttnQATConfig.{field}: the pattern {pattern!r} matches no attention module; "
                        f"there are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; `from_dict` is the inverse."""
        return {"spec": dataclasses.asdict(self.spec), "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttnQATConfig:
        """The config that `to_dict` wrote; missing keys take their defaults.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a wrong value.
        """
        check_keys("AttnQATConfig", values, [field.name for field in dataclasses.fields(cls)])
        values = dict(values)
        if isinstance(values.get("spec"), dict):
            check_keys("AttnQATConfig.spec", values["spec"], [field.name for field in dataclasses.fields(QuantSpec)])
            values["spec"] = QuantSpec(**values["spec"])
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> AttnQATConfig:
        """The config that `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def check_head_dim(name: str, head_dim: int | None, spec: QuantSpec) -> None:
    """Raise a ValueError if a module's head dim, as far as the module tells it, is none that `spec` can quantize."""
    if head_dim is None:
        return
    expected = None
    if head_dim % GROUP_SIZE or head_dim > MAX_HEAD_DIM:
        expected = f"a multiple of {GROUP_SIZE} up to {MAX_HEAD_DIM}"
    elif spec.rotate and head_dim & (head_dim - 1):
        expected = "a power of two, for QuantSpec(rotate=True)"
    if expected is not None:
        raise ValueError(
            f"patch_model: {name} has head_dim {head_dim}; expected {expected}; exclude it with AttnQATConfig(exclude=[...])"
        )


def check_keys(what: str, values: Any, known: list[str]) -> None:
    """Raise a ValueError if `values` is no dict or has a key that is not `known`, naming the nearest known key."""
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected a mapping with the keys {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what}: unknown key {key!r}; expected one of {', '.join(known)}{hint}")
