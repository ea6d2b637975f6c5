"""The supported versions of other packages. setup.cfg has the same; a test compares them."""

from __future__ import annotations

import re
from types import ModuleType

SUPPORTED = {
    "torch": (">=2.11",),
    "transformers": (">=5.17", "<6"),
    "diffusers": (">=0.42", "<0.43"),
    "accelerate": (">=1.15", "<2"),
    "peft": (">=0.21", "<1"),
}
"""By import name; bounds in pip's notation."""


def is_supported(package: str, version: str) -> bool:
    """Whether a `package.__version__` is in the range. A package without a range always is."""
    return all(
        (_numbers(version) >= _numbers(bound[2:])) if bound.startswith(">=") else (_numbers(version) < _numbers(bound[1:]))
        for bound in SUPPORTED.get(package, ())
    )


def check_version(what: str, module: ModuleType) -> None:
    """Raise a ValueError if an imported package has an unsupported version; `what` names the request."""
    package, version = module.__name__, module.__version__
    if not is_supported(package, version):
        oldest, *newest = SUPPORTED[package]
        expected = oldest[2:] + "".join(f" or later, below {bound[1:]}" for bound in newest)
        raise ValueError(
            f"{what}: expected {package} {expected}, got {version}; install one of those: "
            f"pip install '{package}{','.join(SUPPORTED[package])}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version without trailing zeros: (0, 42, 1) for 0.42.1, (5, 25) for 5.25.0.dev0+cpu."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else [0]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
