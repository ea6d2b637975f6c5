"""What an export says about its attention, in its config and in its safetensors headers: all that inference needs to know."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qat_kernels import QuantSpec
from qat_kernels.spec import E2M1_MAX, GROUP_SIZE, HADAMARD_ENTRY, P_GLOBAL_SCALE, SCALE_MIN

from .config import AttnQATConfig
from .config_reader import check_keys

METHOD = "qat_patch"
"""`quant_method` in a Transformers config, and the key of the metadata in a safetensors header."""
CONFIG_KEYS = {"transformers": "quantization_config", "diffusers": "attention_quantization"}
"""Where the metadata stands in a model's config, by host library."""
RECORD = "_qat_patch_record"
"""The attribute of a model with the metadata that it was saved with, where its config has no place for them."""
FORMAT_VERSION = 2
"""Of the metadata and of the folder. Raised whenever an older version of this package could misread what this one writes."""

_MOST_PATTERNS, _LONGEST_PATTERN = 4096, 512


def numerics(spec: QuantSpec) -> dict[str, Any]:
    """What a spec means, tensor by tensor, in plain values that another engine can follow (docs/NUMERICS.md, 1 to 6)."""
    scale_rule = "amax/6"
    if spec.four_over_six:
        scale_rule = "amax/6 or amax/4, whichever has the smaller sum of squared errors in float32; a tie keeps amax/6"
    nvfp4 = {
        "format": "nvfp4",
        "element": "e2m1",
        "element_max": E2M1_MAX,
        "scale": "e4m3",
        "scale_min": SCALE_MIN,
        "group_size": GROUP_SIZE,
    }
    kept = {"format": "bf16"}
    queries = nvfp4 | {"axis": "head_dim", "global_scale": 1.0, "scale_rule": scale_rule}
    values = queries | {"axis": "key_tokens"}
    probabilities = nvfp4 | {
        "axis": "key_tokens",
        "global_scale": P_GLOBAL_SCALE,
        "scale_rule": "amax/6",
        "of": "exp2(score - m), with m the largest quantized score of the row, rounded up to an integer",
    }
    return {
        "query": queries,
        "key": queries,
        "value": values if spec.pv == "nvfp4" else kept,
        "probabilities": probabilities if spec.pv == "nvfp4" else kept,
        "kept_groups": {"causal": ["sink", "open"] if spec.pv == "nvfp4" else [], "not_causal": []},
        "rotation": {"matrix": "sylvester_hadamard", "entry": HADAMARD_ENTRY, "of": ["query", "key"]} if spec.rotate else None,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """What an exported checkpoint says about its attention."""

    config: AttnQATConfig
    """What was patched, and what is quantized."""
    specs: dict[str, QuantSpec]
    """What each patched module quantizes, by its name; loading checks that it comes out the same again."""
    k_shift: str | None = None
    """SHA-256 of the file of K shifts beside the weights; None if no module has one."""
    package_version: str
    """The version of qat_patch that wrote the export."""
    training: dict[str, Any] | None = None
    """How the weights were trained, as the recipe put it; for people, not for programs."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the patched modules."""
        return tuple(self.specs)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the config file; `from_dict` is the inverse."""
        groups: dict[QuantSpec, list[str]] = {}
        for name, spec in self.specs.items():
            groups.setdefault(spec, []).append(name)
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "package_version": self.package_version,
            "attention": self.config.to_dict(),
            "groups": [
                {"modules": modules, "spec": dataclasses.asdict(spec), "numerics": numerics(spec)}
                for spec, modules in groups.items()
            ],
            "k_shift": self.k_shift,
            "training": self.training,
        }

    def to_json(self) -> str:
        """`to_dict` on one line, for a safetensors header."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Any) -> AttentionMetadata:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: another format version, an unknown or missing key, a wrong value, or numerics that this version of
                the package does not compute.
        """
        if not cls.is_ours(values):
            raise ValueError(f"attention metadata: expected a mapping with quant_method {METHOD!r}, got {values!r}")
        check_format_version("attention metadata", values)
        known = ["quant_method", "format_version", "package_version", "attention", "groups", "k_shift", "training"]
        check_all_keys("attention metadata", values, known)
        groups, shift, version, training = (values[key] for key in ("groups", "k_shift", "package_version", "training"))
        if not isinstance(version, str):
            raise ValueError(f"attention metadata: package_version: expected text, got {version!r}")
        if not (shift is None or (isinstance(shift, str) and re.fullmatch("[0-9a-f]{64}", shift))):
            raise ValueError(f"attention metadata: k_shift: expected a SHA-256 or null, got {shift!r}")
        if not isinstance(training, dict | None):
            raise ValueError(f"attention metadata: training: expected a mapping or null, got {training!r}")
        if not isinstance(groups, list) or not groups:
            raise ValueError(f"attention metadata: groups: expected a list of groups of modules, got {groups!r}")
        _check_patterns(values["attention"])
        specs: dict[str, QuantSpec] = {}
        for group in groups:
            specs |= _read_group(group, specs)
        return cls(
            config=AttnQATConfig.from_dict(values["attention"]),
            specs=specs,
            k_shift=shift,
            package_version=version,
            training=training,
        )

    @staticmethod
    def is_ours(values: Any) -> bool:
        """Whether these are metadata of this package at all, of whatever version."""
        return isinstance(values, dict) and values.get("quant_method") == METHOD

    def renamed(self, rename: Callable[[str], str]) -> AttentionMetadata:
        """The same for a class in which modules have other names. Its config lists them: patterns cannot be renamed."""
        specs = {rename(name): spec for name, spec in self.specs.items()}
        spec = next(iter(specs.values()))
        others = {name: other for name, other in specs.items() if other != spec}
        config = AttnQATConfig(spec=spec, include=tuple(specs), overrides=others)
        return dataclasses.replace(self, config=config, specs=specs)

    def check_patched(self, patched: Mapping[str, QuantSpec]) -> None:
        """Raise a ValueError unless exactly the modules of the export were patched, each as it was. `patched`: specs by name."""
        if patched.keys() != self.specs.keys():
            missing, extra = sorted(self.specs.keys() - patched), sorted(patched.keys() - self.specs)
            raise ValueError(
                f"attention metadata: the export names {len(self.specs)} modules, {len(patched)} can be patched here; "
                f"missing: {missing[:3]}, not in the export: {extra[:3]}; the config does not belong to these weights"
            )
        for name, spec in self.specs.items():
            if patched[name] != spec:
                raise ValueError(
                    f"attention metadata: `groups` says {spec} for {name}, and its config `attention` makes it {patched[name]}; "
                    "the metadata were edited"
                )


def check_format_version(what: str, values: dict[str, Any]) -> None:
    """Raise a ValueError if something was written in another format than this version of the package reads."""
    version = values.get("format_version")
    if version == FORMAT_VERSION and not isinstance(version, bool | float):
        return
    writer = values.get("package_version")
    age = ""
    if isinstance(version, int):
        age = "newer: upgrade qat_patch" if version > FORMAT_VERSION else "older: export again, or"
    raise ValueError(
        f"{what}: this version of qat_patch reads format_version {FORMAT_VERSION}, got {version!r}; it is {age or 'damaged, or'} "
        f"install the version that wrote it ({writer})"
    )


def check_all_keys(what: str, values: Any, known: list[str]) -> None:
    """Raise a ValueError unless `values` is a dict with exactly these keys."""
    check_keys(what, values, known)
    for key in known:
        if key not in values:
            raise ValueError(f"{what}: the key {key!r} is missing; the export is damaged")


def _check_patterns(attention: Any) -> None:
    """Refuse patterns that would take long to match with a ValueError: they may come from strangers."""
    found = [attention.get(key) for key in ("include", "exclude", "overrides")] if isinstance(attention, dict) else []
    for patterns in found:
        if not isinstance(patterns, list | dict):
            continue
        longest = max((len(pattern) for pattern in patterns if isinstance(pattern, str)), default=0)
        if len(patterns) > _MOST_PATTERNS or longest > _LONGEST_PATTERN:
            raise ValueError(
                f"attention metadata: attention: expected at most {_MOST_PATTERNS} patterns of {_LONGEST_PATTERN} characters, "
                f"got {len(patterns)} with up to {longest}; the export is damaged, or hostile"
            )


def _read_group(group: Any, others: dict[str, QuantSpec]) -> dict[str, QuantSpec]:
    check_all_keys("attention metadata: groups", group, ["modules", "spec", "numerics"])
    names = group["modules"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"attention metadata: groups: modules: expected a list of module names, got {names!r}")
    twice = sorted(name for name in {*names} if names.count(name) > 1 or name in others)
    if twice:
        raise ValueError(f"attention metadata: groups: {twice[0]} occurs twice; the export is damaged")
    # By way of the config, which knows what a spec may hold.
    spec = AttnQATConfig.from_dict({"spec": group["spec"]}).spec
    missing = {field.name for field in dataclasses.fields(spec)} - group["spec"].keys()
    if missing:
        raise ValueError(f"attention metadata: groups: spec: the key {min(missing)!r} is missing; the export is damaged")
    expected = numerics(spec)
    if group["numerics"] != expected:
        stored = group["numerics"] if isinstance(group["numerics"], dict) else {}
        key = next((key for key in (*expected, *stored) if stored.get(key) != expected.get(key)), "numerics")
        raise ValueError(
            f"attention metadata: groups: this version of qat_patch computes {key} as {expected.get(key)!r}, and the export "
            f"expects {stored.get(key)!r}; install a version that computes it so"
        )
    return dict.fromkeys(names, spec)
