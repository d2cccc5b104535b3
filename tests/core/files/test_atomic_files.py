"""A file is the old one or the new one, whatever happens while it is written."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amp_convert.core.files.atomic_files import replacing, try_to_write, write_file
from amp_convert.core.files.hidden_folders import is_hidden


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_file(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    write_file(path, b"\r\n")
    assert path.read_bytes() == b"\r\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def half_way() -> None:
        with replacing(path) as draft:
            draft.write_text("new")
            (draft.parent / "a library's own").write_text("more")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        half_way()
    for step in ("os.replace", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            with pytest.raises(OSError, match="No space"):
                write_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_run_leaves_is_deleted_by_the_next(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from amp_convert.core.files.atomic_files import replacing
with replacing(Path({str(tmp_path / "a.txt")!r})) as draft:
    draft.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    (entry,) = tmp_path.iterdir()
    assert is_hidden(entry, re.compile(r"a\.txt"))
    assert not is_hidden(entry, re.compile(r"b\.txt"))
    (tmp_path / ".a.txt.swp").touch()
    assert not is_hidden(tmp_path / ".a.txt.swp", re.compile(r"a\.txt"))
    write_file(tmp_path / "b.txt", "mine")
    assert entry.exists()
    write_file(tmp_path / "a.txt", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.txt.swp", "a.txt", "b.txt"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "a.txt"
    other.write_text("of somebody else")
    path.symlink_to(other)
    write_file(path, "mine")
    assert (other.read_text(), path.read_text(), path.is_symlink()) == (
        "of somebody else",
        "mine",
        False,
    )


def test_trying_leaves_no_trace(tmp_path: Path) -> None:
    try_to_write(tmp_path / "not" / "there" / "a.txt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        try_to_write(tmp_path / "file" / "a.txt")
