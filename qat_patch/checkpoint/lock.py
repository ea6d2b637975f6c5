"""One process at a time in a folder: a lock that ends with its process and says who holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .trust.system import check_system

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_RETRIES = 100

# These are POSIX locks: the system releases them when a process ends, and forked children do not inherit them. But they do not
# keep out the process that holds them, and closing the file anywhere in it releases them. So a process tracks its own locks.
_held: dict[str, int] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Lock a folder for this process. It is created if needed, and removed again if nothing was written to it.

    Args:
        folder: the folder to write to.
        setting: the setting that names it, for messages.

    Raises:
        ValueError: another process holds the lock, or the folder cannot be written.
    """
    check_system(setting)
    folder, key, process = folder.absolute(), os.path.realpath(folder), os.getpid()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _guard:
        _refuse_own(folder, key, setting)
        _held[key] = process
    try:
        descriptor = _acquire(folder, setting)
        try:
            yield
        finally:
            # A forked child must not release its parent's lock.
            if os.getpid() == process:
                with contextlib.suppress(FileNotFoundError):
                    (folder / LOCK).unlink()
                os.close(descriptor)
    finally:
        if os.getpid() == process:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            with _guard:
                del _held[key]


def refuse_if_locked(folder: Path, setting: str) -> None:
    """Raise a ValueError if a process holds this folder now. This only reads."""
    check_system(setting)
    import fcntl  # imported here: Windows does not have it

    with _guard:
        _refuse_own(folder, os.path.realpath(folder), setting)
        file = folder / LOCK
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _in_use(folder, setting, _owner(file)) from None
        except OSError:
            return
        finally:
            os.close(descriptor)


def _acquire(folder: Path, setting: str) -> int:
    """The descriptor of the locked file."""
    import fcntl

    file = folder / LOCK
    for _ in range(_RETRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                descriptor = None  # the last owner may just have removed the folder
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{setting}: nothing can be written to {folder} ({error}); choose another folder") from error
        if descriptor is None:
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise _in_use(folder, setting, _owner(file)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise ValueError(f"{setting}: {file} cannot be locked ({error}); choose another folder") from error
            warnings.warn(f"{setting}: the file system of {folder} has no locks; see that nothing else uses it", stacklevel=4)
        # The file that we locked may already be deleted by an owner that has just ended.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
        os.close(descriptor)
    raise ValueError(f"{setting}: {file} cannot be locked: it goes again and again; choose another folder")


def _refuse_own(folder: Path, key: str, setting: str) -> None:
    # A forked child sees its parent's entry here; it must find out as other processes do.
    if _held.get(key) == os.getpid():
        raise _in_use(folder, setting, _this_process())


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid()}


def _owner(file: Path) -> dict[str, Any]:
    """What the lock's owner wrote about itself."""
    for _ in range(_RETRIES):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            time.sleep(0.002)  # it was locked a moment ago, and nothing is written yet
    return {"host": "an unknown machine", "pid": "?"}


def _in_use(folder: Path, setting: str, owner: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{setting}: {folder} is in use by process {owner.get('pid')} on {owner.get('host')}; wait until it has ended, or choose "
        f"another folder. If that machine is gone, remove {folder / LOCK}"
    )
