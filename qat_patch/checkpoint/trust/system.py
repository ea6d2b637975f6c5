"""Exports and runs need functions that Windows does not have, so they refuse Windows with a message first."""

import platform


def check_system(what: str) -> None:
    """Raises ValueError on Windows. `what`: the function or setting, for the message."""
    if platform.system() == "Windows":
        raise ValueError(f"{what}: expected Linux or macOS, whose file locks and links this needs, got Windows; use WSL 2")
