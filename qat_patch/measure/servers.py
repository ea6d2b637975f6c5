"""The presets that this machine can train, evaluate and serve: the output of `qat-patch servers`."""

from __future__ import annotations

from importlib import metadata
from typing import get_args

import torch

from qat_kernels import QuantSpec, sageattn3
from qat_kernels.dispatch import why_not
from qat_kernels.spec import Preset
from qat_patch.servers import OTHERS, SERVERS, gpu_names

PACKAGES = (
    *("transformers", "diffusers", "vllm", "sglang", "flashinfer-python", "kernels", "sageattn3", "sageattention"),
    *("nvidia-modelopt", "compressed-tensors", "lm-eval", "scikit-image"),
)
"""Packages of servers, and those that `qat-patch evaluate` needs."""
SAGE = "SageAttention3"
"""Found as a package or in the Hub's cache."""


def report() -> str:
    """The installed packages, and a line for each device and preset. No server package is imported."""
    versions = {name: installed(name) for name in PACKAGES} | {SAGE: _sage_attention()}
    lines = ["installed"]
    lines += [f"  {name:20} {version or 'not installed'}" for name, version in versions.items()]
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        name, major = "no server of others runs on it", None
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            name = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
        lines += ["", f"{device}: {name}", f"  {'preset':16} {'trains, evaluates in':21} served here by"]
        for preset in get_args(Preset):
            lines.append(f"  {preset:16} {implementation(preset, device):21} {served_by(preset, major, versions)}")
    lines += ["", "who serves what"]
    for preset in get_args(Preset):
        where = [
            f"{about.name} ({gpu_names(offer.gpus)}; server={server!r})"
            for server, about in SERVERS.items()
            for offer in about.offers
            if offer.preset == preset
        ]
        if preset in OTHERS:
            where.append(f"{OTHERS[preset][0]} ({gpu_names(OTHERS[preset][1])}; an ordinary export)")
        if where:
            lines.append(f"  {preset:16} {'; '.join(where)}")
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """The version of a package from pip's metadata, without an import."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sage_attention() -> str | None:
    """The SageAttention3 that a patched model would find."""
    found = sageattn3.installed()
    return None if found is None else found.name


def implementation(preset: Preset, device: torch.device) -> str:
    """The implementation that trains and evaluates a preset on a device, in 16 bits."""
    spec = QuantSpec(preset=preset)
    for name in spec.rules.impls:
        if why_not(name, device, torch.bfloat16, spec, True) is None:
            return name
    return "eager (slow)" if device.type == "cuda" else "eager"


def served_by(preset: str, major: int | None, versions: dict[str, str | None]) -> str:
    """The servers of a preset on a GPU of this compute capability, and what must be installed for them."""
    found = []
    if preset in ("nvfp4", "nvfp4_qk"):
        found.append("this package")
    elif preset == "kv_nvfp4":
        found.append("this package (generate)")
    elif preset == "sage3" and major is not None and major >= 10 and (found_here := versions.get(SAGE)):
        found.append(f"this package by {found_here}")
    for about in SERVERS.values():
        if any(offer.preset == preset and major in offer.gpus for offer in about.offers):
            missing = [name for name in about.packages if versions[name] is None]
            found.append(about.name + (f" (install {' and '.join(missing)})" if missing else f" {versions[about.packages[0]]}"))
    if preset in OTHERS and major in OTHERS[preset][1]:
        found.append(OTHERS[preset][0])
    return ", ".join(found) or "-"
