"""A folder belongs to one process at a time, and is free again when that process is dead."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat_patch.checkpoint import lock
from qat_patch.checkpoint.lock import LOCK, locked, refuse_if_locked

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from qat_patch.checkpoint.lock import locked
with locked(Path(sys.argv[1]), "output_dir"):
    if os.fork() == 0:
        time.sleep(100)  # a child that outlives its parent
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_another_process_is_kept_out_until_it_is_dead(owner, tmp_path):
    folder = tmp_path / "run"
    for keep_out in (lambda: locked(folder, "output_dir").__enter__(), lambda: refuse_if_locked(folder, "output_dir")):
        with pytest.raises(ValueError, match=f"output_dir: .*run is in use by process {owner.pid} on {platform.node()}; wait"):
            keep_out()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    refuse_if_locked(folder, "output_dir")
    with locked(folder, "output_dir"):
        assert json.loads((folder / LOCK).read_text()) == {"host": platform.node(), "pid": os.getpid()}
    # The folder was that process's.
    assert list(folder.iterdir()) == []


def test_the_same_process_is_kept_out_too(tmp_path):
    with locked(tmp_path / "a", "output_dir"):
        (tmp_path / "link").symlink_to(tmp_path / "a")
        for name in ("a", "b/../a", "link"):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), locked(tmp_path / name, "output_dir"):
                pass
        with locked(tmp_path / "b", "output_dir"):
            pass
        # Looking at it did not open it to others.
        other = f"import sys; from pathlib import Path; from {lock.__name__} import refuse_if_locked\n"
        other += f"refuse_if_locked(Path({str(tmp_path / 'a')!r}), 'x')"
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in done.stderr
    refuse_if_locked(tmp_path / "a", "output_dir")


def test_nothing_is_left_unless_something_was_written(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a/b/c", "output_dir"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a/b", "output_dir"):
        (tmp_path / "a/b/file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "file"]


def test_a_forked_child_does_not_give_the_lock_away(tmp_path):
    with locked(tmp_path, "output_dir"):
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path, "output_dir"):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / LOCK).exists()


def test_of_many_at_once_each_gets_it_alone(tmp_path):
    """Taking and removing the file at the same time: never two inside."""
    folder, children = tmp_path / "run", []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            taken, until = 0, time.monotonic() + 20
            while taken < 15 and time.monotonic() < until:
                try:
                    with locked(folder, "output_dir"):
                        (tmp_path / "inside").mkdir()
                        taken += 1
                        (tmp_path / "inside").rmdir()
                except ValueError:
                    time.sleep(0.001)
                except OSError:
                    os._exit(2)
            os._exit(0 if taken == 15 else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(ValueError, match="output_dir: nothing can be written to .*; choose another folder"):
            locked(folder, "output_dir").__enter__()
    # A disk that is mounted read-only.
    opened = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ValueError, match="nothing can be written to .*Read-only file system"):
            locked(tmp_path, "output_dir").__enter__()
    with locked(tmp_path, "output_dir"):
        pass


def test_file_systems_without_locks_are_named(tmp_path, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="the file system of .* has no locks"), locked(tmp_path, "output_dir"):
        pass
