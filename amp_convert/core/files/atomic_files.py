"""Writing a file so that a reader finds the old one or the new one, never a mixture.

What is new is written in a fresh hidden folder beside the file, synced, and renamed into its place
in one step. So whatever a library writes on its way (safetensors writes a file of its own first)
is in that folder too, which is deleted at the end. A run that is killed leaves the folder behind,
and the file as it was; the next one that writes the file deletes the folder (see
`hidden_folders`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from amp_convert.core.files import hidden_folders
from amp_convert.core.files.hidden_folders import Kind


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives where to write what becomes `path`, whose folder is made if need be. It takes the place
    of `path` when this is left without an error. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folders.fresh(path, Kind.PART) as folder:
        draft = folder / path.name
        yield draft
        sync_file(draft)
        os.replace(draft, path)
        sync_folder(path.parent)
    hidden_folders.sweep(path.parent, re.compile(re.escape(path.name)))


def write_file(path: Path, content: str | bytes) -> None:
    """Write `path` whole, text as UTF-8, or not at all. Raises OSError where it cannot."""
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def try_to_write(path: Path) -> None:
    """Find out whether `path` could be written now. Trying is the only test that root, read-only
    mounts and access lists all agree with. Raises OSError where it could not."""
    with hidden_folders.fresh(existing_folder(path.absolute()) / path.name, Kind.PART):
        pass


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    ancestor = path.parent
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    return ancestor


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, where the system can (Windows cannot)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a folder; the files themselves are synced.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
