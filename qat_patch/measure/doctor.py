"""The machine, the versions, and what runs how: what `qat-patch doctor` prints."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from qat_kernels import explain
from qat_kernels.dispatch import why_not

PACKAGES = ("qat-patch", "torch", "triton", "transformers", "diffusers", "accelerate", "peft")
HEAD_DIM = 128


def report() -> str:
    """The report, a few lines for each device."""
    lines = [f"machine    {platform.system()} {platform.machine()}, Python {platform.python_version()}"]
    lines += [f"{name:10} {_version(name)}" for name in PACKAGES]
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        lines += ["", f"{device}: {_describe(device)}"]
        q = torch.empty(1, 2, 16, HEAD_DIM, dtype=torch.bfloat16, device=device)
        for what, needs_gradient in (("training", True), ("inference", False)):
            lines.append(f"  {what} (bfloat16, head_dim {HEAD_DIM})")
            lines += [f"    {line}" for line in explain(q, q, q, needs_gradient=needs_gradient).splitlines()]
        kernels = device.type == "cuda" and why_not("triton", device, q.dtype, False) is None
        lines += ["  generation with handle.cache()", f"    {'decode kernels of its own' if kernels else 'eager, in PyTorch'}"]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
