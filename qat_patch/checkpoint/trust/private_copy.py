"""We load what we checked: every file of an export is opened once, hashed, and read through that descriptor.

The host libraries get a private folder. Small files in it are copies of the hashed bytes. Weights are too large to copy: on
systems with /proc they are links to descriptors that stay open, so no other file can take their place, and after loading we
check that they were not written to. On other systems weights are copied too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .file_names import LEFT_BY_DOWNLOADS, is_weights
from .system import check_system

_CHUNK = 1 << 22
_LARGEST_SMALL_FILE = 1 << 28
_MOST_FILES = 4096
_DEEPEST = 3
_BY_DESCRIPTOR = Path("/proc/self/fd").is_dir()


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A file that stays open while an export is loaded."""

    name: str
    """Within the folder."""
    descriptor: int
    state: tuple[int, ...]
    """File attributes that change when the file is written to."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.state[0]

    def chunks(self) -> Iterator[bytes]:
        """Its content, from the start."""
        offset = 0
        while chunk := os.pread(self.descriptor, min(_CHUNK, self.size - offset), offset):
            yield chunk
            offset += len(chunk)


class PrivateCopy:
    """The open files of a folder, and a private folder for those that were taken over."""

    def __init__(self, source: Path, folder: Path, files: dict[str, OpenFile]) -> None:
        self.source, self.folder, self.files = source, folder, files

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            ValueError: it is too large to be one.
        """
        file = self.files[name]
        if file.size > _LARGEST_SMALL_FILE:
            raise ValueError(
                f"load_checkpoint: {self.source / name}: expected at most {_LARGEST_SMALL_FILE} bytes, got {file.size}; the "
                "export is damaged, or hostile"
            )
        return b"".join(file.chunks())

    def take(self, names: list[str]) -> dict[str, tuple[int, str]]:
        """Take files over into the private folder. Returns size and SHA-256 of the bytes that will be read there."""
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        # Hashing releases the GIL, and large models have many large files.
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(self._take, names), strict=True))

    def put(self, name: str, content: bytes) -> None:
        """Replace a file with one of our own."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def check_unchanged(self) -> None:
        """Raise a ValueError if a file has changed since it was opened."""
        for file in self.files.values() if _BY_DESCRIPTOR else ():
            if is_weights(file.name) and _state(file.descriptor) != file.state:
                raise ValueError(
                    f"load_checkpoint: {self.source / file.name} changed while it was loaded; load it when nothing writes there"
                )

    def _take(self, name: str) -> tuple[int, str]:
        file, target = self.files[name], self.folder / name
        if not is_weights(name):
            content = self.read(name)
            target.write_bytes(content)
            return len(content), hashlib.sha256(content).hexdigest()
        digest, size = hashlib.sha256(), 0
        if _BY_DESCRIPTOR:
            target.symlink_to(f"/proc/self/fd/{file.descriptor}")
        with contextlib.nullcontext() if _BY_DESCRIPTOR else target.open("wb") as copy:
            for chunk in file.chunks():
                digest.update(chunk)
                size += len(chunk)
                if copy is not None:
                    copy.write(chunk)
        return size, digest.hexdigest()


@contextlib.contextmanager
def private_copy(source: Path, *, wanted: Callable[[str], bool] | None = None) -> Iterator[PrivateCopy]:
    """Open the files of a folder. All must be regular files, none of them a link.

    In a snapshot of the Hub's cache, files are links to its blobs; only these links are followed.

    Args:
        source: the folder.
        wanted: whether to open a file, by its name; the others are not checked. Default: all.

    Raises:
        ValueError: the folder holds anything else, or the system is Windows.
    """
    check_system("load_checkpoint")
    with contextlib.ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        try:
            _open_all(source, files, stack, wanted)
        except OSError as error:
            raise ValueError(f"load_checkpoint: {source} cannot be read: {error}") from error
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qat_patch-", ignore_cleanup_errors=True)))
        yield PrivateCopy(source, folder.resolve(), files)


def _open_all(
    source: Path, files: dict[str, OpenFile], stack: contextlib.ExitStack, wanted: Callable[[str], bool] | None
) -> None:
    blobs = source.parent.parent / "blobs" if source.parent.name == "snapshots" else None

    def walk(directory: int, prefix: str, depth: int) -> None:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            status, path = os.stat(name, dir_fd=directory, follow_symlinks=False), prefix + name
            if stat.S_ISDIR(status.st_mode):
                if (depth == 0 and name in LEFT_BY_DOWNLOADS) or (wanted is not None and not wanted(f"{path}/config.json")):
                    continue
                if depth < _DEEPEST:
                    walk(open_(name, os.O_DIRECTORY, directory), f"{path}/", depth + 1)
                    continue
            elif wanted is not None and not wanted(path):
                continue
            elif stat.S_ISREG(status.st_mode):
                opened(path, open_(name, 0, directory))
                continue
            elif stat.S_ISLNK(status.st_mode) and blobs is not None:
                target = os.path.normpath(os.path.join(source, prefix, os.readlink(name, dir_fd=directory)))
                if os.path.dirname(target) == os.path.normpath(blobs) and re.fullmatch(
                    "[0-9a-f]{40,64}", os.path.basename(target)
                ):
                    opened(path, open_(target, 0, None))
                    continue
            raise ValueError(
                f"load_checkpoint: {source} holds {path}, which is a link, or no regular file: expected plain files; copy what a "
                "link points to into its place, or get the folder from someone you trust"
            )

    def open_(name: str, flags: int, directory: int | None) -> int:
        # O_NONBLOCK: do not wait if the file has become a pipe meanwhile.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=directory)
        stack.callback(os.close, descriptor)
        return descriptor

    def opened(path: str, descriptor: int) -> None:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"load_checkpoint: {source} holds {path}, which is no regular file, and no export does; remove it")
        files[path] = OpenFile(path, descriptor, _state(descriptor))
        if len(files) > _MOST_FILES:
            raise ValueError(f"load_checkpoint: {source} holds more than {_MOST_FILES} files, and no export does")

    if not source.is_dir():
        return  # no files: the caller reports what is missing
    top = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, top)
    walk(top, "", 0)


def _state(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
