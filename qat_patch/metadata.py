"""The attention metadata of an export, in its config and its safetensors headers: all that inference needs to know."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qat_kernels import QuantSpec
from qat_kernels.spec import E2M1_MAX, GROUP_SIZE, HADAMARD_ENTRY, P_GLOBAL_SCALE, SCALE_MIN, SMOOTH_BLOCK, NVFP4Format

from .config import AttnQATConfig
from .config_reader import check_keys
from .layer import SHIFTS

METHOD = "qat_patch"
"""`quant_method` in a Transformers config, and the key of the metadata in a safetensors header."""
CONFIG_KEYS = {"transformers": "quantization_config", "diffusers": "_attention_quantization"}
"""The key of the metadata in a model's config, by host library."""
NOTICE_KEY = "attention_quantization"
"""A second key in a Diffusers config: Diffusers prints unknown keys with their values, except those that begin with an
underscore. Earlier exports have the metadata here."""
NOTICE = "4-bit by qat_patch; original attention without it"
LOADING_ADAPTERS = {
    "transformer": "pipe.load_lora_weights(FOLDER)",
    # In Wan 2.2, for low noise.
    "transformer_2": "pipe.load_lora_weights(FOLDER, load_into_transformer_2=True)",
    # In MiniMax-H3, for videos after references.
    "transformer_ref": "pipe.load_lora_weights(FOLDER, load_into_transformer_ref=True)",
    # In Ideogram 4. Its pipeline loads LoRA only into the other one.
    "unconditional_transformer": (
        'pipe.unconditional_transformer.load_lora_adapter(FOLDER, weight_name="pytorch_lora_weights.safetensors")'
    ),
}
"""For each transformer of a Diffusers pipeline: the code that loads adapters from a folder into it."""
RECORD = "_qat_patch_record"
"""The attribute of a model with the metadata that it was saved with, if its config has no place for it."""
FORMAT_VERSION = 3
"""The version of the metadata and of the folder. Raise it if an older version of this package could misread a new export."""
_READ_VERSIONS = (2, FORMAT_VERSION)

_MOST_PATTERNS, _LONGEST_PATTERN = 4096, 512


def config_entries(host: str, metadata: AttentionMetadata) -> dict[str, Any]:
    """The entries about attention for a model's config."""
    notice = {NOTICE_KEY: NOTICE} if host == "diffusers" else {}
    return notice | {CONFIG_KEYS[host]: metadata.to_dict()}


def in_config(host: str, config: Mapping[str, Any]) -> Any:
    """The metadata in a model's config, unchecked; None if there is none."""
    earlier = config.get(NOTICE_KEY) if host == "diffusers" else None
    return config.get(CONFIG_KEYS[host], None if earlier == NOTICE else earlier)


def without_entries(host: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the `config_entries`."""
    ours = {CONFIG_KEYS[host]} | ({NOTICE_KEY} if host == "diffusers" else set())
    return {key: value for key, value in config.items() if key not in ours}


def numerics(spec: QuantSpec) -> dict[str, Any]:
    """The meaning of a spec for each tensor, in plain values that another engine can follow (docs/NUMERICS.md, 1 to 6 and 9)."""
    formats = spec.formats
    kept_groups = {"causal": ["sink", "open"] if spec.keeps_groups(causal=True) else [], "not_causal": []}
    described = {
        "query": _tensor(formats.query),
        "key": _tensor(formats.key),
        "value": _tensor(formats.value),
        "probabilities": _probabilities(formats.probabilities),
        "kept_groups": kept_groups,
        "rotation": {"matrix": "sylvester_hadamard", "entry": HADAMARD_ENTRY, "of": ["query", "key"]} if spec.rotate else None,
    }
    if formats.smooth is not None:
        described["smoothing"] = {
            "dtype": "bfloat16, or float16 where that is what attention is given",
            "key": "minus its mean over the tokens",
            "query": f"minus its mean over each {SMOOTH_BLOCK} rows, in float32",
            "scores": "plus the mean of the query's rows times the smoothed key",
        }
    return described


_NVFP4 = {"format": "nvfp4", "element": "e2m1", "element_max": E2M1_MAX, "scale": "e4m3", "group_size": GROUP_SIZE}


def _tensor(how: NVFP4Format | str | None) -> dict[str, Any]:
    """The description of Q, K or V."""
    if not isinstance(how, NVFP4Format):
        return {"format": how or "bf16"}
    rule = "amax/6"
    if how.four_over_six:
        rule = "amax/6 or amax/4, whichever has the smaller sum of squared errors in float32; a tie keeps amax/6"
    described = _NVFP4 | {"axis": "key_tokens" if how.axis == "keys" else how.axis, "global_scale": 1.0, "scale_rule": rule}
    if how.scale == "divide":
        described["scale_min"] = SCALE_MIN
    else:
        described["code_rule"] = "e2m1(x * rn(1/scale)); zero where the scale is zero"
    if how.then_e4m3:
        described["value_rule"] = "e4m3(code * scale)"
    return described


def _probabilities(how: str | None) -> dict[str, Any]:
    """The description of P~."""
    if how is None:
        return {"format": "bf16"}
    described = _NVFP4 | {
        "axis": "key_tokens",
        "global_scale": 1.0 if how == "sage_one_level" else P_GLOBAL_SCALE,
        "scale_rule": "amax/6",
        "of": "exp2(score - m), with m the largest quantized score of the row, rounded up to an integer",
    }
    if how == "two_level":
        return described | {"scale_min": SCALE_MIN}
    return described | {"code_rule": "e2m1(6 * x / amax); zero where the scale is zero"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The attention metadata of an exported checkpoint."""

    config: AttnQATConfig
    """Which modules were patched, and what is quantized."""
    specs: dict[str, QuantSpec]
    """The QuantSpec of each patched module, by its name. Loading checks that it gets the same again."""
    k_shift: str | None = None
    """SHA-256 of the file of K shifts beside the weights; None if no module has one."""
    q_shift: str | None = None
    """The same for Q shifts."""
    package_version: str
    """The version of qat_patch that wrote the export."""
    training: dict[str, Any] | None = None
    """How the weights were trained, in the recipe's words; for people, not for programs."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the patched modules."""
        return tuple(self.specs)

    @property
    def shifts(self) -> dict[str, str]:
        """The SHA-256 of each file of shifts (`SHIFTS`) that is beside the weights."""
        return {which: digest for which in SHIFTS if (digest := getattr(self, which)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The entry of the config file; `from_dict` is the inverse."""
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
            # Earlier versions do not know the key, and refuse an export that has it.
            **({} if self.q_shift is None else {"q_shift": self.q_shift}),
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
        if values["format_version"] == 2:
            values = _from_format_2(values)
        values = {"q_shift": None} | values
        known = ["quant_method", "format_version", "package_version", "attention", "groups", *SHIFTS, "training"]
        check_all_keys("attention metadata", values, known)
        groups, version, training = (values[key] for key in ("groups", "package_version", "training"))
        if not isinstance(version, str):
            raise ValueError(f"attention metadata: package_version: expected text, got {version!r}")
        for which in SHIFTS:
            digest = values[which]
            if not (digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))):
                raise ValueError(f"attention metadata: {which}: expected a SHA-256 or null, got {digest!r}")
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
            **{which: values[which] for which in SHIFTS},
            package_version=version,
            training=training,
        )

    @staticmethod
    def is_ours(values: Any) -> bool:
        """Whether this is metadata of this package, of any version."""
        return isinstance(values, dict) and values.get("quant_method") == METHOD

    def renamed(self, rename: Callable[[str], str]) -> AttentionMetadata:
        """The same for a class in which modules have other names. Its config lists them: patterns cannot be renamed."""
        specs = {rename(name): spec for name, spec in self.specs.items()}
        spec = next(iter(specs.values()))
        others = {name: other for name, other in specs.items() if other != spec}
        config = AttnQATConfig(spec=spec, include=tuple(specs), overrides=others)
        return dataclasses.replace(self, config=config, specs=specs)

    def check_patched(self, patched: Mapping[str, QuantSpec]) -> None:
        """Raise a ValueError unless exactly the export's modules were patched, with the same specs. `patched`: specs by name."""
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
                    "the metadata was edited"
                )


def check_format_version(what: str, values: dict[str, Any]) -> None:
    """Raise a ValueError if this version of the package does not read the format version."""
    version = values.get("format_version")
    if version in _READ_VERSIONS and not isinstance(version, bool | float):
        return
    writer = values.get("package_version")
    age = ""
    if isinstance(version, int):
        age = "newer: upgrade qat_patch" if version > FORMAT_VERSION else "older: export again, or"
    raise ValueError(
        f"{what}: this version of qat_patch reads format_version {' and '.join(map(str, _READ_VERSIONS))}, got {version!r}; "
        f"it is {age or 'damaged, or'} "
        f"install the version that wrote it ({writer})"
    )


def _from_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """Metadata of format 2 in format 3: a spec had `pv` instead of `preset`, and there were no Q shifts."""

    def renewed(spec: Any) -> Any:
        if not isinstance(spec, dict):
            return spec
        if "preset" in spec:
            raise ValueError("attention metadata: spec: format 2 has no key 'preset'; the export is damaged")
        if "pv" not in spec:
            return spec
        pv = spec["pv"]
        if pv not in ("nvfp4", "bf16"):
            raise ValueError(f"attention metadata: spec: pv: expected nvfp4 or bf16, got {pv!r}; the export is damaged")
        rest = {key: value for key, value in spec.items() if key != "pv"}
        return rest | {"preset": "nvfp4" if pv == "nvfp4" else "nvfp4_qk"}

    if "q_shift" in values:
        raise ValueError("attention metadata: format 2 has no key 'q_shift'; the export is damaged")
    values = dict(values)
    if isinstance(attention := values.get("attention"), dict):
        attention = values["attention"] = attention | {"spec": renewed(attention.get("spec"))}
        if isinstance(overrides := attention.get("overrides"), dict):
            attention["overrides"] = {pattern: renewed(spec) for pattern, spec in overrides.items()}
    if isinstance(groups := values.get("groups"), list):
        values["groups"] = [
            group | {"spec": renewed(group["spec"])} if isinstance(group, dict) and "spec" in group else group for group in groups
        ]
    return values


def check_all_keys(what: str, values: Any, known: list[str]) -> None:
    """Raise a ValueError unless `values` is a dict with exactly these keys."""
    check_keys(what, values, known)
    for key in known:
        if key not in values:
            raise ValueError(f"{what}: the key {key!r} is missing; the export is damaged")


def _check_patterns(attention: Any) -> None:
    """Raise a ValueError for patterns that would take long to match: they may come from an untrusted file."""
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
    # Through the config, which checks what a spec may hold.
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
