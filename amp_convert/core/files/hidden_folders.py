"""Hidden folders beside what a run writes. A killed run's are deleted by the next run, at once.

A run holds the lock (`flock`) of its hidden folder for as long as it uses it, and the system lets
go of it when the process ends, however it ends. So a folder whose lock is free belongs to nobody.
Locks are seen on one machine only: the name tells on which. Folders of other machines, and all
where the system has no such locks (Windows), are deleted once they are `_STALE` seconds old.

The names are random, and no link is followed: in a folder that all may write to, nobody can lay
something in the way of the next run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Kind(StrEnum):
    """What a hidden folder is for."""

    PART = "part"
    """A file that is being written."""
    NEW = "new"
    """A folder that is being written."""
    WORK = "work"
    """What a run lays aside until its end."""


_STALE = {Kind.PART: 3600, Kind.NEW: 3600, Kind.WORK: 30 * 24 * 3600}
"""Seconds after which no run can still be using one."""
_HERE = hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]
_NAME = re.compile(
    rf"\.(?P<of>.+)\.amp-convert-(?P<kind>{'|'.join(Kind)})-(?P<host>[0-9a-f]{{8}})-[0-9a-f]{{16}}",
    re.DOTALL,
)
_held: set[int] = set()
"""The handles of the locks that this process holds."""


@contextlib.contextmanager
def fresh(target: Path, kind: Kind, mode: int = 0o700) -> Iterator[Path]:
    """A new hidden folder beside `target`, gone afterwards whatever happens. Raises OSError."""
    folder, handle = _made(target, kind, mode)
    owner = os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # and not a process that the user's code has forked
            shutil.rmtree(folder, ignore_errors=True)
            _let_go(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is there, where the system has such locks. Raises
    BlockingIOError where another run holds it, OSError where it is a link or no folder."""
    handle = _lock(folder)
    try:
        yield
    finally:
        _let_go(handle)


@contextlib.contextmanager
def in_turn(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Hold the lock of `folder` for a moment, after waiting for whoever has it; but not for ever,
    since what is done under it is only made safer by it."""
    with contextlib.ExitStack() as stack:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                stack.enter_context(locked(folder))
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield


def sweep(folder: Path, of: re.Pattern[str]) -> None:
    """Delete what killed runs left in `folder` of writing something whose name matches `of`."""
    for entry, found in _hidden(folder, of):
        with contextlib.suppress(OSError):  # another run may be deleting it at this very moment
            if found["host"] == _HERE and fcntl is not None:
                with locked(entry):
                    shutil.rmtree(entry, ignore_errors=True)
            elif time.time() - entry.lstat().st_mtime > _STALE[Kind(found["kind"])]:
                shutil.rmtree(entry, ignore_errors=True)


def is_used(target: Path, kind: Kind, besides: Path) -> bool:
    """Whether another run of this machine has such a folder beside `target` now, `besides` left
    out."""
    for entry, found in _hidden(target.parent, re.compile(re.escape(target.name))):
        if found["kind"] == kind and found["host"] == _HERE and entry != besides:
            try:
                with locked(entry):
                    pass
            except BlockingIOError:
                return True
            except OSError:
                continue
    return False


def is_hidden(entry: Path, of: re.Pattern[str]) -> bool:
    """Whether an entry of a folder is a hidden one, of something whose name matches `of`."""
    found = _NAME.fullmatch(entry.name)
    if found is None or not of.fullmatch(found["of"]):
        return False
    return stat.S_ISDIR(entry.lstat().st_mode)


def _hidden(folder: Path, of: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            found = _NAME.fullmatch(entry.name)
            if found is not None and of.fullmatch(found["of"]):
                yield entry, found


def _made(target: Path, kind: Kind, mode: int) -> tuple[Path, int | None]:
    for _ in range(10):
        token = secrets.token_hex(8)
        folder = target.with_name(f".{target.name}.amp-convert-{kind}-{_HERE}-{token}")
        folder.mkdir(mode)
        # Before it is locked, another run may take it for a dead one's.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            return folder, _lock(folder)
    raise FileNotFoundError(errno.ENOENT, "It is deleted again at once", str(target.parent))


def _lock(folder: Path) -> int | None:
    """A handle that holds the lock of `folder`; None where the system has no such locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_there(folder, handle)
    except (BlockingIOError, FileNotFoundError):
        _let_go(handle)
        raise
    except OSError:  # a file system without locks
        _let_go(handle)
        return None
    return handle


def _require_there(folder: Path, handle: int) -> None:
    if not os.path.samestat(os.fstat(handle), os.lstat(folder)):
        raise FileNotFoundError(errno.ENOENT, "It was deleted meanwhile", str(folder))


def _let_go(handle: int | None) -> None:
    if handle in _held:
        _held.discard(handle)
        os.close(handle)


def _forked() -> None:
    """In a process that the user's code has forked: only the run itself holds the locks, or they
    would outlive it with its workers."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
