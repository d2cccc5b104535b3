"""Hidden folders: gone at their end, kept while a run uses them, deleted once it is dead."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amp_convert.core.files import hidden_folders
from amp_convert.core.files.hidden_folders import Kind, fresh, in_turn, is_used, locked, sweep

ANY = re.compile(r"a\.txt")
USER = """
import sys, os, time
from pathlib import Path
from amp_convert.core.files.hidden_folders import Kind, fresh
with fresh(Path(sys.argv[1]), Kind.WORK) as folder:
    if os.fork() == 0:
        print(folder.name, flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with fresh(tmp_path / "a.txt", Kind.PART) as one, fresh(tmp_path / "a.txt", Kind.PART) as two:
        assert one != two
        assert one.stat().st_mode & 0o777 == 0o700
        sweep(tmp_path, ANY)
        assert one.is_dir()
        assert two.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_neither_used_nor_followed(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "thesis.tex").touch()
    with fresh(tmp_path / "a.txt", Kind.WORK) as folder:
        name = folder.name
    (tmp_path / name).symlink_to(treasure)
    sweep(tmp_path, ANY)
    assert not is_used(tmp_path / "a.txt", Kind.WORK, besides=tmp_path)
    assert (treasure / "thesis.tex").exists()
    with pytest.raises(OSError, match=r"directory|links"), locked(tmp_path / name):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_dead_runs_folder_is_known_at_once_though_its_workers_live(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(target)], stdout=subprocess.PIPE, start_new_session=True
    ) as user:
        assert user.stdout is not None
        folder = tmp_path / user.stdout.readline().decode().strip()
        try:
            assert is_used(target, Kind.WORK, besides=tmp_path)
            assert not is_used(target, Kind.NEW, besides=tmp_path)
            sweep(tmp_path, ANY)
            assert folder.is_dir()
            user.send_signal(signal.SIGKILL)
            user.wait()
            assert not is_used(target, Kind.WORK, besides=tmp_path)
            sweep(tmp_path, re.compile("other"))
            assert folder.is_dir()
            sweep(tmp_path, ANY)
            assert not folder.exists()
        finally:
            os.killpg(user.pid, signal.SIGKILL)  # its worker


def test_waiting_for_a_turn_ends(tmp_path: Path) -> None:
    with locked(tmp_path), in_turn(tmp_path, seconds=0.05):
        pass
    with locked(tmp_path):
        pass


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_folders, "fcntl", None)
    with fresh(tmp_path / "a.txt", Kind.PART) as folder:
        sweep(tmp_path, ANY)
        assert folder.is_dir()
        os.utime(folder, (0, 0))
        sweep(tmp_path, ANY)
        assert not folder.exists()
