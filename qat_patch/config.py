"""What to patch and how: AttnQATConfig, and its JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qat_kernels import NVFP4, QuantSpec
from qat_kernels.arguments import served_problems
from qat_kernels.spec import GROUP_SIZE, MAX_HEAD_DIM

from .config_reader import from_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttnQATConfig:
    """Which attention modules run 4-bit attention, and what it quantizes.

    Train a model for the server that will run it: `AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4"))` is for the NVFP4 KV caches
    of vLLM and SGLang, `preset="sage3"` for SageAttention3 in Diffusers; docs/SERVERS.md lists all.

    Patterns are shell patterns of module names, as `model.named_modules()` spells them: `*.attn1`, `blocks.[0-3].*`.

    Raises:
        ValueError: a field has a wrong type.
    """

    spec: QuantSpec = NVFP4
    """What is quantized, and on which grid; docs/NUMERICS.md, sections 6 and 9."""
    overrides: dict[str, QuantSpec] = dataclasses.field(default_factory=dict)
    """A different QuantSpec for some modules, by pattern; the first matching pattern counts."""
    include: tuple[str, ...] = ("*",)
    """Patterns of modules to patch; a module must match one."""
    exclude: tuple[str, ...] = ()
    """Patterns of modules that keep their original attention."""
    exclude_first_blocks: int = 0
    """How many blocks at the start of the model keep their original attention. A block is a numbered module such as `blocks.7` or
    `model.layers.7`; only blocks with attention that can be patched count, in the order of `model.named_modules()`."""
    exclude_last_blocks: int = 0
    """The same at the end of the model."""

    def __post_init__(self) -> None:
        if not isinstance(self.spec, QuantSpec):
            raise ValueError(f"AttnQATConfig.spec: expected a QuantSpec, got {self.spec!r}")
        if not isinstance(self.overrides, Mapping) or not all(
            isinstance(pattern, str) and isinstance(spec, QuantSpec) for pattern, spec in self.overrides.items()
        ):
            raise ValueError(f"AttnQATConfig.overrides: expected a mapping of patterns to QuantSpecs, got {self.overrides!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for name in ("exclude_first_blocks", "exclude_last_blocks"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"AttnQATConfig.{name}: expected a number of blocks from 0 up, got {number!r}")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"AttnQATConfig.{name}: expected a sequence of module name patterns, got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))

    def reasons_to_skip(self, names: Iterable[str]) -> dict[str, str]:
        """The attention modules that keep their original attention, and why. `names` must be in the model's order."""
        names = list(names)
        blocks = list(dict.fromkeys(block for name in names if (block := block_of(name)) is not None))
        first, last = blocks[: self.exclude_first_blocks], blocks[max(0, len(blocks) - self.exclude_last_blocks) :]
        reasons = {}
        for name in names:
            excluded = next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)
            if excluded is not None:
                reasons[name] = f"excluded by {excluded!r}"
            elif not any(fnmatchcase(name, pattern) for pattern in self.include):
                reasons[name] = "matches no include pattern"
            elif block_of(name) in first:
                reasons[name] = f"in one of the first {self.exclude_first_blocks} blocks"
            elif block_of(name) in last:
                reasons[name] = f"in one of the last {self.exclude_last_blocks} blocks"
        return reasons

    def spec_of(self, name: str) -> QuantSpec:
        """The QuantSpec of the module with this name, if it is patched."""
        pattern = self._override_of(name)
        return self.spec if pattern is None else self.overrides[pattern]

    def _override_of(self, name: str) -> str | None:
        return next((pattern for pattern in self.overrides if fnmatchcase(name, pattern)), None)

    def check_overrides(self, patched: Iterable[str]) -> None:
        """Raise a ValueError if an override applies to none of the patched modules."""
        used = {self._override_of(name) for name in patched}
        for pattern in self.overrides:
            if pattern not in used:
                raise ValueError(
                    f"AttnQATConfig.overrides: the pattern {pattern!r} applies to no patched module: what it matches "
                    "is left out, or matched by a pattern before it; remove it, or put it first"
                )

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise a ValueError if a setting matches none of these modules: a setting without effect is a mistake."""
        names = list(names)
        some = f"there are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for field in ("include", "exclude", "overrides"):
            for pattern in getattr(self, field):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"AttnQATConfig.{field}: the pattern {pattern!r} matches no attention module; {some}")
        if (self.exclude_first_blocks or self.exclude_last_blocks) and not any(block_of(name) for name in names):
            raise ValueError(
                "AttnQATConfig.exclude_first_blocks and exclude_last_blocks: expected attention modules in numbered blocks; "
                f"{some}; use exclude"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; `from_dict` is the inverse."""
        return dataclasses.asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttnQATConfig:
        """The config that `to_dict` wrote; missing keys take their defaults.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a wrong value.
        """
        return from_dict(cls, values, "AttnQATConfig", checks_itself=True)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> AttnQATConfig:
        """The config that `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def block_of(name: str) -> str | None:
    """The numbered block that a module is in: `blocks.7` of `blocks.7.attn1`."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def spec_problem(
    spec: QuantSpec, head_dim: int | None, *, causal: bool, grouped: bool, head_dim_v: int | None = None
) -> str | None:
    """Why `spec` cannot be computed for a module, judged by its head dims and its kind of attention; None if nothing is known.

    `head_dim_v`: that of V; None: the same as that of Q and K.
    """
    if head_dim_v not in (None, head_dim) and (head_dim_v % GROUP_SIZE or head_dim_v > MAX_HEAD_DIM):
        return f"values of {head_dim_v} elements; expected a multiple of {GROUP_SIZE} up to {MAX_HEAD_DIM}"
    if head_dim is not None:
        expected = None
        if head_dim % GROUP_SIZE or head_dim > MAX_HEAD_DIM:
            expected = f"a multiple of {GROUP_SIZE} up to {MAX_HEAD_DIM}"
        elif spec.rotate and head_dim & (head_dim - 1):
            expected = "a power of two, for QuantSpec(rotate=True)"
        if expected is not None:
            return f"head_dim {head_dim}; expected {expected}"
    head_dims = spec.rules.head_dims
    known = (head_dim if head_dim is not None or head_dims is None else head_dims[0]) or 0
    known_v = head_dim_v if head_dim_v is not None and head_dim is not None else known
    kind = {"causal": causal, "masked": False, "grouped": grouped}
    for what, expected, got in served_problems(spec, head_dim=known, head_dim_v=known_v, **kind):
        return f"{what} is {got}; expected {expected}"
    return None
