"""Writing a report folder: whole or not at all, and never over something else."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.core.files import hidden_folders
from amp_convert.report import folder
from amp_convert.report.folder import check_writable, workspace, write_folder

REPORT = '{"schema_version": 1, "amp_convert": "0.1", "model": {}, "verdict": "%s"}'
OLD = {"report.json": REPORT % "old", "layers.csv": "old", "junit.xml": "old"}
NEW = {"report.json": REPORT % "new", "layers.csv": "new", "report.md": "neü"}


def _content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in out.iterdir()}


def _swap_in_one_step(tmp_path: Path) -> bool:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    works = folder._exchange_in_one_step(first, second)
    first.rmdir()
    second.rmdir()
    return works


@pytest.fixture(params=["one step", "two renames"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target, with the kernel's exchange and without."""
    if request.param == "two renames":
        monkeypatch.setattr(folder, "_exchange_in_one_step", lambda *paths: False)
    elif not _swap_in_one_step(tmp_path):
        pytest.skip("this system has no RENAME_EXCHANGE")
    return tmp_path / "reports" / "model[1]"


def test_a_new_folder_and_its_parents_are_made(out: Path) -> None:
    write_folder(out, NEW | {"plan.toml": b"\x00\xff"})
    assert (out / "plan.toml").read_bytes() == b"\x00\xff"
    (out / "plan.toml").unlink()
    assert _content(out) == NEW
    assert os.listdir(out.parent) == [out.name]


def test_an_old_report_is_replaced_as_a_whole(out: Path) -> None:
    write_folder(out, OLD)
    write_folder(out, NEW)
    assert _content(out) == NEW
    assert os.listdir(out.parent) == [out.name]


def test_an_empty_folder_may_be_given(out: Path) -> None:
    out.mkdir(parents=True)
    write_folder(out, NEW)
    assert _content(out) == NEW


def test_a_link_to_a_folder_stays_a_link(out: Path, tmp_path: Path) -> None:
    write_folder(out, OLD)
    link = tmp_path / "link"
    link.symlink_to(out)
    write_folder(link, NEW)
    assert link.is_symlink()
    assert _content(out) == NEW


def test_the_folder_has_the_permissions_of_any_new_folder(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_folder(out, NEW)
    assert out.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("call", [check_writable, lambda out: write_folder(out, NEW)])
@pytest.mark.parametrize(
    "present",
    [
        {"thesis.tex": "years of work"},
        {"report.json": "{}", "thesis.tex": "years of work"},
        {"layers.csv": "no report.json or audit.json beside it"},
        {"report.json": "{}"},
        {"report.json": "of another tool", "audit.json": '{"schema_version": 1}'},
        {"report.json": REPORT.replace("1", '"1"')},
        {"audit.json": REPORT % "an audit has totals"},
        {"report.json": "[" * 100_000},
    ],
)
def test_a_folder_of_something_else_is_not_replaced(
    out: Path, call: Callable[[Path], None], present: dict[str, str]
) -> None:
    out.mkdir(parents=True)
    for name, text in present.items():
        (out / name).write_text(text)
    with pytest.raises(UsageError, match="is not an amp-convert report folder") as caught:
        call(out)
    assert caught.value.exit_code == 2
    assert "--out" in caught.value.mend
    assert _content(out) == present
    assert os.listdir(out.parent) == [out.name]


def test_a_folder_inside_counts_as_something_else(out: Path) -> None:
    write_folder(out, OLD)
    (out / "report.md").mkdir()
    with pytest.raises(UsageError, match=r"it holds report\.md"):
        check_writable(out)


@pytest.mark.parametrize("call", [check_writable, lambda out: write_folder(out, NEW)])
def test_a_file_in_the_way_is_an_error(tmp_path: Path, call: Callable[[Path], None]) -> None:
    file = tmp_path / "report"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        call(file)
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        call(file / "deep" / "er")
    assert file.read_text() == "mine"


def test_checking_leaves_nothing_behind(out: Path, tmp_path: Path) -> None:
    check_writable(out)
    assert os.listdir(tmp_path) == []
    write_folder(out, OLD)
    check_writable(out)
    assert _content(out) == OLD
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_place_without_permission_is_found_early(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="cannot be written: Permission denied"):
            check_writable(tmp_path / "deep" / "report")
    finally:
        tmp_path.chmod(0o755)


def test_a_read_only_place_is_found_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="cannot be written: Read-only file system"):
        check_writable(tmp_path / "report")


def test_a_mount_point_is_found_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "report")
    check_writable(tmp_path / "report" / "inside")
    with pytest.raises(UsageError, match="cannot be written: it is a mount point"):
        check_writable(tmp_path / "report")


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
    assert _content(out) == OLD
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
    assert _content(out) == OLD
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
        assert _content(out) in (OLD, NEW), line
        write_folder(out, OLD)
        assert os.listdir(out.parent) == [out.name], line
        line += 1
        assert line < 500
    assert line > 40
    assert _content(out) == NEW
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
    assert _content(out) == NEW | {"model.onnx": "large"}
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
    assert _content(mine) == OLD


def test_a_report_that_is_a_link_proves_nothing(tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    write_folder(real, OLD)
    out.mkdir()
    (out / "report.json").symlink_to(real / "report.json")
    with pytest.raises(UsageError, match=r"it holds report\.json"):
        write_folder(out, NEW)
    assert (_content(real), _content(out)) == (OLD, {"report.json": OLD["report.json"]})


def test_a_folder_in_the_place_of_the_old_one_is_not_deleted(out: Path) -> None:
    aside = out.with_name(f".{out.name}.amp-convert-old")
    aside.mkdir(parents=True)
    (aside / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"it holds thesis\.tex"):
        write_folder(out, NEW)
    assert (aside / "thesis.tex").exists()
