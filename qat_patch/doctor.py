"""`python -m qat_patch doctor`: the machine, the versions, and what runs how."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from qat_kernels import explain
from qat_kernels.explain import why_not

PACKAGES = ("qat-patch", "torch", "triton", "transformers", "diffusers", "accelerate", "peft")
HEAD_DIM = 128


def main(arguments: list[str]) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="python -m qat_patch doctor", description=__doc__).parse_args(arguments)
    print(f"machine    {platform.system()} {platform.machine()}, Python {platform.python_version()}")
    for name in PACKAGES:
        print(f"{name:10} {_version(name)}")
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        print(f"\n{device}: {_describe(device)}")
        q = torch.empty(1, 2, 16, HEAD_DIM, dtype=torch.bfloat16, device=device)
        for what, needs_gradient in (("training", True), ("inference", False)):
            print(f"  {what} (bfloat16, head_dim {HEAD_DIM})")
            print("".join(f"    {line}\n" for line in explain(q, q, q, needs_gradient=needs_gradient).splitlines()), end="")
        kernels = device.type == "cuda" and why_not("triton", device, q.dtype, False) is None
        print(f"  generation with handle.cache()\n    {'decode kernels of its own' if kernels else 'eager, in PyTorch'}")


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
