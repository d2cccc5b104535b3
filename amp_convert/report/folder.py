"""Writing a folder of files so that a reader finds the old one or the new one, never a mixture.

1. The files are written and synced in a fresh hidden folder beside the target.
2. The two folders change places. Linux does that in one step (`renameat2`, RENAME_EXCHANGE): at no
   moment is the target missing or incomplete. Elsewhere it takes two renames, the old folder aside
   and the new one in; a run killed between them leaves no target, but the old folder whole beside
   it, and the next `check_writable` or `write_folder` puts it back.
3. The old folder is deleted. What killed runs left is deleted by the next run (`hidden_folders`).

Only what proves to be a report of amp-convert's is replaced: its report.json or audit.json is read,
and says so. While a run is at work on a folder, a second one is refused before it begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from amp_convert.core.errors import UsageError
from amp_convert.core.files import hidden_folders
from amp_convert.core.files.atomic_files import existing_folder, sync_file, sync_folder
from amp_convert.core.files.hidden_folders import Kind
from amp_convert.core.files.reading import parse_json, read_file

# Every file a report folder may hold: a folder with any other is not replaced. The last three are
# left behind by file browsers.
REPORT_FILES = frozenset(
    {"report.json", "layers.csv", "plan.toml", "report.md", "report.html", "junit.xml"}
    | {"audit.json", "audit.csv", "audit.md", "model.onnx", "model.onnx.data"}
    | {"model.pt2", "tuned.toml", "frontier.csv", "frontier.svg", "tune.json"}
    | {".DS_Store", "Thumbs.db", "desktop.ini"}
)
_MARKS = {
    "report.json": {"model", "verdict"},
    "audit.json": {"model", "totals"},
    "tune.json": {"tuned"},
}
"""What shows whose a folder is, and the keys that it has besides those of `_KEYS`."""
_KEYS = frozenset({"schema_version", "amp_convert"})
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_writable(out: Path) -> None:
    """Find out before any work that `write_folder(out, ...)` will be able to write.

    Raises UsageError when `out` holds something else than a report or its place is not writable.
    """
    with _usage_errors(out):
        target = _target(out)
        if target.is_mount():
            raise _unwritable(out, "it is a mount point")
        # Trying is the only test that root, read-only mounts and access lists all agree with.
        with hidden_folders.fresh(existing_folder(target) / target.name, Kind.NEW):
            pass


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A fresh folder near `out`, for files that are too large to hold; gone afterwards. While it is
    there, no other run of this machine gets one for `out`.

    Raises UsageError where another one has, and where there is no room for it.
    """
    with contextlib.ExitStack() as stack:
        with _usage_errors(out):
            target = _target(out)
            stack.enter_context(_made_for_now(target.parent))
            hidden_folders.sweep(target.parent, _named(target))
            folder = stack.enter_context(hidden_folders.fresh(target, Kind.WORK))
            if hidden_folders.is_used(target, Kind.WORK, besides=folder):
                raise UsageError(
                    f"another run of amp-convert is at work on the report folder {out}",
                    mend="Wait for its end, or give another folder with --out.",
                )
        yield folder


@contextlib.contextmanager
def _made_for_now(folder: Path) -> Iterator[None]:
    """`folder` is there while this is open, and as it was before where nothing is written to it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def write_folder(out: Path, files: Mapping[str, str | bytes | Path]) -> None:
    """Replace the folder `out` by one that holds exactly `files`: text, written as UTF-8, bytes, or
    a file of a `workspace`, which is moved there.

    Raises UsageError as `check_writable` does; then `out` is as it was and nothing is left beside.
    """
    with _usage_errors(out):
        target = _target(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folders.in_turn(target.parent):
            target = _target(out)  # once more: whoever was waited for may have written
            with hidden_folders.fresh(target, Kind.NEW, 0o777) as staged:
                for name, content in files.items():
                    _write(staged / name, content)
                sync_folder(staged)
                _exchange(staged, target)
                sync_folder(target.parent)
            hidden_folders.sweep(target.parent, _named(target))


@contextlib.contextmanager
def _usage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise _unwritable(out, problem.strerror or str(problem)) from problem
    except ValueError as problem:  # a character that no path may have
        raise _unwritable(out, str(problem)) from problem


def _target(out: Path) -> Path:
    """Where `out` leads, put back if a killed run left it aside. Raises UsageError where something
    is there that is not to be replaced."""
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise _unwritable(out, "its links lead round in a circle")
    if out.is_symlink() and hasattr(os, "geteuid"):
        owner = out.lstat().st_uid
        if owner not in (0, os.geteuid()):  # who else would lead us where only we may write?
            raise _unwritable(out, "it is a link that another user made")
    _restore(target)
    _refuse_foreign(target, out)
    return target


def _refuse_foreign(target: Path, shown: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{shown} is a file, not a folder", mend="Give another folder with --out.")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in names if name not in REPORT_FILES or not _is_file(target / name)]
    marks = [name for name in _MARKS if name in names]
    if not names or (not foreign and any(_is_ours(target / mark) for mark in marks)):
        return
    found = f" (it holds {foreign[0]})" if foreign else ""
    if marks and not foreign:
        found = f" (its {marks[0]} does not say so)"
    raise UsageError(
        f"{shown} is not an amp-convert report folder{found}, so it is not replaced",
        mend="Give a new or empty folder with --out, or move what is in this one elsewhere.",
    )


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_ours(mark: Path) -> bool:
    """Whether a report.json or audit.json is what amp-convert writes, of whatever version."""
    try:
        document = parse_json(read_file(mark, follow=False))
    except (OSError, ValueError):
        return False
    if not isinstance(document, dict) or not isinstance(document.get("schema_version"), int):
        return False
    return {*_KEYS, *_MARKS[mark.name]} <= document.keys()


def _unwritable(out: Path, problem: str) -> UsageError:
    return UsageError(
        f"The report folder {out} cannot be written: {problem}",
        mend="The folder is replaced as a whole, so the one above it must be writable too;"
        " give another with --out.",
    )


def _named(target: Path) -> re.Pattern[str]:
    return re.compile(re.escape(target.name))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.amp-convert-old")


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
        aside = _aside(target)
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
    """Put back, or delete, the old folder of a run that was killed after the first rename."""
    aside = _aside(target)
    if aside.is_symlink() or not aside.is_dir():
        return
    _refuse_foreign(aside, aside)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)
