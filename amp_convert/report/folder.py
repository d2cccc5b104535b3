"""Writing a folder of files so that a reader finds the old one or the new one, never a mixture.

1. The files are written and synced in a fresh hidden folder beside the target.
2. The two folders change places. Linux does that in one step (`renameat2`, RENAME_EXCHANGE): at no
   moment is the target missing or incomplete. Elsewhere it takes two renames, the old folder aside
   and the new one in; a run killed between them leaves no target, but the old folder whole beside
   it, and the next `check_writable` or `write_folder` puts it back.
3. The old folder is deleted. A killed run's hidden folders are deleted by the next run an hour
   later, when no run can still be writing them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from amp_convert.core.atomic_files import sync_file, sync_folder
from amp_convert.core.errors import UsageError

# Every file a report folder may hold: a folder with any other is not replaced. The last three are
# left behind by file browsers.
REPORT_FILES = frozenset(
    {"report.json", "layers.csv", "plan.toml", "report.md", "report.html", "junit.xml"}
    | {"audit.json", "audit.csv", "audit.md", "model.onnx", "model.onnx.data"}
    | {".DS_Store", "Thumbs.db", "desktop.ini"}
)
_MARKS = ("report.json", "audit.json")
# Hidden folders, and the seconds after which no run can still be using them. Files wait in a
# workspace for as long as a training takes.
_STALE_SECONDS = {"new": 3600, "work": 30 * 24 * 3600}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_writable(out: Path) -> None:
    """Find out before any work that `write_folder(out, ...)` will be able to write.

    Raises UsageError when `out` holds something else than a report or its place is not writable.
    """
    with _usage_errors(out):
        target = out.resolve()
        _refuse_foreign(target, out)
        if target.is_mount():
            raise _unwritable(out, "it is a mount point")
        _restore(target)
        # Trying is the only test that root, read-only mounts and access lists all agree with.
        _fresh(_existing_parent(target) / target.name).rmdir()


def _existing_parent(target: Path) -> Path:
    ancestor = target.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    return ancestor


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A fresh folder near `out`, for files that are too large to hold; gone afterwards.

    Raises UsageError where there is no room for it.
    """
    target = out.resolve()
    with _usage_errors(out):
        folder = _fresh(_existing_parent(target) / target.name, "work")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_folder(out: Path, files: Mapping[str, str | bytes | Path]) -> None:
    """Replace the folder `out` by one that holds exactly `files`: text, written as UTF-8, bytes, or
    a file of a `workspace`, which is moved there.

    Raises UsageError as `check_writable` does; then `out` is as it was and nothing is left beside.
    """
    with _usage_errors(out):
        target = out.resolve()
        _refuse_foreign(target, out)
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        _clean(target)
        with _staging(target) as staged:
            for name, content in files.items():
                _write(staged / name, content)
            sync_folder(staged)
            _exchange(staged, target)
            sync_folder(target.parent)


@contextlib.contextmanager
def _usage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise _unwritable(out, problem.strerror or str(problem)) from problem


def _refuse_foreign(target: Path, shown: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{shown} is a file, not a folder", mend="Give another folder with --out.")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in names if name not in REPORT_FILES or (target / name).is_dir()]
    if not names or (not foreign and any(mark in names for mark in _MARKS)):
        return
    found = f" (it holds {foreign[0]})" if foreign else ""
    raise UsageError(
        f"{shown} is not an amp-convert report folder{found}, so it is not replaced",
        mend="Give a new or empty folder with --out, or move what is in this one elsewhere.",
    )


def _unwritable(out: Path, problem: str) -> UsageError:
    return UsageError(
        f"The report folder {out} cannot be written: {problem}",
        mend="The folder is replaced as a whole, so the one above it must be writable too;"
        " give another with --out.",
    )


def _hidden(target: Path, kind: str) -> str:
    return f".{target.name}.amp-convert-{kind}"


def _fresh(target: Path, kind: str = "new") -> Path:
    folder = target.with_name(f"{_hidden(target, kind)}-{secrets.token_hex(4)}")
    folder.mkdir()
    return folder


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, gone afterwards whatever happens."""
    folder = _fresh(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: str | bytes | Path) -> None:
    if isinstance(content, Path):
        shutil.move(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    sync_file(path)


def _exchange(staged: Path, target: Path) -> None:
    """Put `staged` in the place of `target`; the old folder may end up in the place of `staged`."""
    if not target.exists():
        staged.rename(target)
    elif not _exchange_in_one_step(staged, target):
        aside = target.with_name(_hidden(target, "old"))
        target.rename(aside)
        try:
            staged.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange_in_one_step(staged: Path, target: Path) -> bool:
    """Linux's `renameat2`; False where the kernel, the C library or the file system lacks it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    paths = os.fsencode(staged), os.fsencode(target)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _restore(target: Path) -> None:
    """Put back the old folder of a run that was killed between its two renames."""
    aside = target.with_name(_hidden(target, "old"))
    if aside.is_dir() and not target.exists():
        aside.rename(target)


def _clean(target: Path) -> None:
    """Delete what killed runs left beside `target`."""
    shutil.rmtree(target.with_name(_hidden(target, "old")), ignore_errors=True)
    for left in target.parent.iterdir():
        # Another run may be deleting its own folder at this very moment.
        with contextlib.suppress(FileNotFoundError):
            for kind, seconds in _STALE_SECONDS.items():
                if left.name.startswith(_hidden(target, kind)) and _age(left) > seconds:
                    shutil.rmtree(left, ignore_errors=True)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
