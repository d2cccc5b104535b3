"""Report folders when a run fails, is killed, or meets another."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.core.files import hidden_folders
from amp_convert.report import folder
from amp_convert.report.folder import check_writable, workspace, write_folder
from tests.report.folders import NEW, OLD, content


@pytest.mark.parametrize("step", ["_write", "sync_folder", "_exchange"])
def test_a_failure_leaves_the_old_report_and_nothing_else(
    out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_folder(out, OLD)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, step, full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_folder(out, NEW)
    assert content(out) == OLD
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_a_failed_second_rename_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "report"
    write_folder(out, OLD)
    monkeypatch.setattr(folder, "_exchange_in_one_step", lambda *paths: False)
    rename = Path.rename

    def fail_on_the_way_in(self: Path, target: Path) -> Path:
        if "-new-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_way_in)
    with pytest.raises((UsageError, KeyboardInterrupt)):
        write_folder(out, NEW)
    assert content(out) == OLD
    assert os.listdir(tmp_path) == ["report"]


def _killed_at(line: int, out: Path) -> bool:
    """Write NEW in a child that kills itself before its `line`-th line of folder.py."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal seen
            if frame.f_code.co_filename != folder.__file__:
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            write_folder(out, NEW)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_run_killed_at_any_line_leaves_a_whole_report(out: Path) -> None:
    in_one_step = folder._exchange_in_one_step.__module__ == folder.__name__
    write_folder(out, OLD)
    line, restored = 1, 0
    while _killed_at(line, out):
        if not out.exists():
            assert not in_one_step
            restored += 1
            check_writable(out)
        assert content(out) in (OLD, NEW), line
        write_folder(out, OLD)
        assert os.listdir(out.parent) == [out.name], line
        line += 1
        assert line < 500
    assert line > 40
    assert content(out) == NEW
    assert restored <= 3
    assert in_one_step or restored > 0


def _left(out: Path, host: str) -> Path:
    left = out.with_name(f".{out.name}.amp-convert-new-{host}-0123456789abcdef")
    left.mkdir()
    (left / "report.json").write_text("half")
    return left


def test_what_killed_runs_left_is_deleted_at_once(out: Path) -> None:
    write_folder(out, OLD)
    _left(out, hidden_folders._HERE)
    write_folder(out, NEW)
    assert os.listdir(out.parent) == [out.name]


def test_what_another_machines_run_left_is_deleted_an_hour_later(out: Path) -> None:
    write_folder(out, OLD)
    left = _left(out, "01234567")
    write_folder(out, NEW)
    assert left.exists()
    long_ago = time.time() - 4_000
    os.utime(left, (long_ago, long_ago))
    write_folder(out, NEW)
    assert os.listdir(out.parent) == [out.name]


def test_a_second_run_is_refused_and_the_first_one_goes_on(out: Path) -> None:
    write_folder(out, OLD)
    with workspace(out) as work:
        (work / "model.onnx").write_text("large")
        with pytest.raises(UsageError, match="another run of amp-convert is at work on"):
            workspace(out).__enter__()
        with workspace(out.with_name("other")):
            pass
        write_folder(out, NEW | {"model.onnx": work / "model.onnx"})
    assert content(out) == NEW | {"model.onnx": "large"}
    assert os.listdir(out.parent) == [out.name]
    with workspace(out):
        pass


def test_a_workspace_leaves_nothing_where_nothing_was(out: Path, tmp_path: Path) -> None:
    with workspace(out) as work:
        assert work.is_dir()
    assert os.listdir(tmp_path) == []


def test_links_that_lead_nowhere_or_are_another_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, theirs, mine = tmp_path / "loop", tmp_path / "link", tmp_path / "mine"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="its links lead round in a circle"):
        check_writable(loop)
    with pytest.raises(UsageError, match="cannot be written"):
        check_writable(loop / "below")
    with pytest.raises(UsageError, match="cannot be written: embedded null"):
        check_writable(tmp_path / "a\0b")
    write_folder(mine, OLD)
    theirs.symlink_to(mine)
    real = os.geteuid()
    if real == 0:
        os.lchown(theirs, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(UsageError, match="it is a link that another user made"):
        write_folder(theirs, NEW)
    monkeypatch.undo()
    assert content(mine) == OLD


def test_a_report_that_is_a_link_proves_nothing(tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    write_folder(real, OLD)
    out.mkdir()
    (out / "report.json").symlink_to(real / "report.json")
    with pytest.raises(UsageError, match=r"it holds report\.json"):
        write_folder(out, NEW)
    assert (content(real), content(out)) == (OLD, {"report.json": OLD["report.json"]})


def test_a_folder_in_the_place_of_the_old_one_is_not_deleted(out: Path) -> None:
    aside = out.with_name(f".{out.name}.amp-convert-old")
    aside.mkdir(parents=True)
    (aside / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"it holds thesis\.tex"):
        write_folder(out, NEW)
    assert (aside / "thesis.tex").exists()
