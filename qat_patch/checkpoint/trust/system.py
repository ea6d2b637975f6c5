"""Exports and runs need functions that Windows does not have; it is said before one of them is missed."""

import platform


def check_system(what: str) -> None:
    """Raises ValueError on Windows. `what`: the function or setting, for the message."""
    if platform.system() == "Windows":
        raise ValueError(f"{what}: expected Linux or macOS, whose file locks and links this needs, got Windows; use WSL 2")
