"""Servers that compute 4-bit attention: what each computes on which GPU, what it cannot, and its options."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

from qat_kernels import QuantSpec

from .handle import PatchHandle
from .layer import SHIFTS
from .linear.handle import LinearHandle

_log = logging.getLogger(__name__)
Server = Literal["vllm", "sglang", "diffusers-sage3"]
"""The servers that an export can be made for."""


class Offer(NamedTuple):
    """A preset that a server computes."""

    preset: str
    gpus: tuple[int, ...]
    """Major numbers of the compute capabilities."""
    option: str
    """The value of its option, or the name of its backend."""
    likeness: str
    """How close its results are to the preset."""


class _About(NamedTuple):
    name: str
    host: str
    """The host library whose models it serves."""
    packages: tuple[str, ...]
    """The packages to install, by their names for pip."""
    version: str
    """The version of the first package from which this table was read."""
    offers: tuple[Offer, ...]


SERVERS: dict[str, _About] = {
    "vllm": _About(
        "vLLM",
        "transformers",
        ("vllm", "flashinfer-python"),
        "0.33.0",
        (
            Offer("kv_nvfp4", (8, 9, 12), "nvfp4", "equal except for ties in rounding"),
            Offer("kv_nvfp4_fp8", (10,), "nvfp4", "alike: P and the output are rounded inside a closed kernel"),
            Offer("kv_nvfp4_4over6", (10,), "nvfp4_4over6", "alike: P and the output are rounded inside a closed kernel"),
        ),
    ),
    "sglang": _About(
        "SGLang",
        "transformers",
        ("sglang", "flashinfer-python"),
        "0.5.23",
        (
            Offer("kv_nvfp4", (12,), "nvfp4", "alike: a prompt reads its own tokens unquantized, and older ones through E4M3"),
            Offer("kv_nvfp4_fp8", (10,), "nvfp4", "alike: P and the output are rounded inside a closed kernel"),
        ),
    ),
    "diffusers-sage3": _About(
        "Diffusers with SageAttention3",
        "diffusers",
        ("diffusers", "kernels"),
        "0.42.1",
        (Offer("sage3", (10, 12), "sage_blackwell_hub", "alike: P is scaled against the running maximum of a row"),),
    ),
}
OTHERS = {"fa4_fp4": ("FastVideo or xDiT", (10,)), "fastvideo_sm120": ("FastVideo", (12,))}
"""By preset: other servers and their GPUs. They take an ordinary export."""

SERVING = "SERVING.md"
AUTO_CONFIG = "hf_quant_config.json"
"""A file beside config.json. vLLM reads it if config.json has no `quantization_config`; Transformers does not."""
AUTO_ENABLE: dict[str, Any] = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["*"]},
}
"""Its content: no weights are quantized ("*" is excluded); the KV cache is NVFP4, with scales of 1, because none are stored."""

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that vLLM and SGLang merge into one (their `packed_modules_mapping`), with one global scale."""

_LORA_FIELDS = {
    *(
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
    ),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_type", "peft_version"),
}
_LORA_INITS = (True, False, "gaussian", "orthogonal", "eva")


def head_sizes(handle: PatchHandle) -> set[int]:
    """The head sizes of the patched modules, as far as they say."""
    sizes = {getattr(handle.models[0].get_submodule(name), "head_dim", None) for name in handle.patched}
    return {size for size in sizes if isinstance(size, int)}


def check_spec(server: str, spec: QuantSpec, where: str = "the preset in force") -> None:
    """Raise a ValueError unless a server computes a spec on some GPU."""
    if server not in get_args(Server):
        raise ValueError(f"server: expected one of {', '.join(get_args(Server))} or None, got {server!r}")
    about = SERVERS[server]
    if spec.preset not in {offer.preset for offer in about.offers}:
        offers = ", ".join(f"{offer.preset} ({gpu_names(offer.gpus)})" for offer in about.offers)
        raise ValueError(
            f"server={server!r}: {about.name} computes {offers}; {where} is {spec.preset!r}. A model trained for another grid "
            "is no better there than an untrained one: train through QuantSpec(preset=...) of what will serve it, or leave "
            "server out"
        )


def check_servable(
    server: str, handle: PatchHandle, *, adapters: Any = None, auto_enable: bool = False, linears: LinearHandle | None = None
) -> None:
    """Raise a ValueError unless a server can run a patched model.

    Args:
        server: its name.
        handle: the patch.
        adapters: the config of the adapters, if they are exported alone.
        auto_enable: the server must switch the cache on by itself.
        linears: the model's quantized linear layers, if any.
    """
    for name, spec in handle.specs.items():
        check_spec(server, spec, f"that of {name}")
    about, specs = SERVERS[server], {*handle.specs.values()}
    if handle.host != about.host:
        raise ValueError(f"server={server!r}: expected a model of {about.host}, got one of {handle.host}")
    if len(specs) > 1:
        found = ", ".join(sorted(spec.preset for spec in specs))
        raise ValueError(f"server={server!r}: expected one preset for all modules, got {found}; a server has one for a model")
    for which, shifts in handle.shifts.items():
        if shifts:
            raise ValueError(
                f"server={server!r}: expected no {SHIFTS[which]}s, which {about.name} does not subtract, got {len(shifts)}"
            )
    if server != "diffusers-sage3":
        _check_language_model(server, handle)
    if server == "vllm" and next(iter(specs)).preset == "kv_nvfp4" and 64 in head_sizes(handle):
        _log.warning(
            "server='vllm': vLLM serves no head size 64 on GPUs that compute kv_nvfp4, and on sm_100 it computes another grid. "
            "Train for kv_nvfp4_fp8 to serve it there, or for server='sglang'"
        )
    if auto_enable and (server != "vllm" or adapters is not None or left_out(handle) or _option(server, handle) != "nvfp4"):
        raise ValueError(
            f"auto_enable: expected server='vllm' with kv_nvfp4 or kv_nvfp4_fp8 in all layers of a whole model, got {server!r} "
            f"with {next(iter(specs)).preset}{', adapters alone' if adapters is not None else ''}"
            f"{', layers that are left out' if left_out(handle) else ''}; no config switches that on: leave auto_enable out, and "
            f"use the command in {SERVING}"
        )
    if adapters is not None and server != "diffusers-sage3":
        _check_lora(server, adapters)
    if linears is not None:
        _check_merged(server, linears)
        if auto_enable:
            raise ValueError(
                "auto_enable: expected ordinary linear layers: with packed ones config.json says how the model is quantized, "
                f"and vLLM does not look at {AUTO_CONFIG}; leave auto_enable out, and use the command in {SERVING}"
            )


def _check_merged(server: str, linears: LinearHandle) -> None:
    """Raise a ValueError unless layers that a server merges into one are all quantized or all not."""
    names = {*linears.layers, *linears.skipped}
    for name in linears.layers:
        parent, _, last = name.rpartition(".")
        for merged in (together for together in _MERGED if last in together):
            for other in (f"{parent}.{each}" for each in merged):
                if other in names and other not in linears.layers:
                    raise ValueError(
                        f"server={server!r}: {SERVERS[server].name} merges {', '.join(merged)} into one layer: expected all of "
                        f"them quantized, or none, got {name} without {other}"
                    )


def left_out(handle: PatchHandle) -> list[str]:
    """The modules that keep their original attention, without those that a language model server never quantizes."""
    modules = {name: handle.models[0].get_submodule(name) for name in handle.skipped} if handle.host == "transformers" else {}
    # Modules of an image encoder have no cache.
    return [name for name in handle.skipped if name not in modules or _has_cache(modules[name])]


def _has_cache(module: Any) -> bool:
    return getattr(module, "is_causal", True) and not getattr(module, "is_cross_attention", False)


def _check_language_model(server: str, handle: PatchHandle) -> None:
    about, model = SERVERS[server], handle.models[0]
    for name in handle.patched:
        if not _has_cache(model.get_submodule(name)):
            raise ValueError(
                f"server={server!r}: expected causal attention, which has a KV cache, got {name}, which has none; exclude it"
            )
    if not (kept := left_out(handle)):
        return
    if server == "sglang":
        raise ValueError(
            f"server='sglang': SGLang has one KV cache for all layers: expected 4-bit attention in every attention module, got "
            f"original attention in {kept[0]}; train without exclude, or serve with vLLM"
        )
    for name in kept:
        if number_of(name) is None:
            raise ValueError(f"server={server!r}: {about.name} leaves out layers by number, and {name} has none; patch it too")


def _check_lora(server: str, config: Any) -> None:
    """Raise a ValueError unless the adapters are plain LoRA: servers read only that part of the config."""
    free = _LORA_FIELDS if server == "sglang" else _LORA_FIELDS | {"rank_pattern", "alpha_pattern"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        is_plain = field.name in free or value in (default, None) or (field.name == "init_lora_weights" and value in _LORA_INITS)
        if not is_plain or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ValueError(
                f"server={server!r}: expected plain LoRA, got {type(config).__name__} with {field.name}={value!r}; export merged "
                "weights (merge_adapters=True)"
            )


def number_of(name: str) -> int | None:
    """The layer number of a language model's module, found as vLLM does: the only number in its name; else None."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def gpu_names(majors: Iterable[int]) -> str:
    """The architecture names of GPUs: `sm_80, sm_90` for 8 and 9."""
    return ", ".join(f"sm_{major}0" for major in majors)


def offer_of(server: str, preset: str) -> Offer:
    """A server's offer for a preset that it serves."""
    return next(offer for offer in SERVERS[server].offers if offer.preset == preset)


def _option(server: str, handle: PatchHandle) -> str:
    return offer_of(server, next(iter(handle.specs.values())).preset).option
