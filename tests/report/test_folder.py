"""Writing a report folder: whole or not at all, and never over something else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.report.folder import check_writable, write_folder
from tests.report.folders import NEW, OLD, content

REPORT = '{"schema_version": 1, "amp_convert": "0.1", "model": {}, "verdict": "%s"}'


def test_a_new_folder_and_its_parents_are_made(out: Path) -> None:
    write_folder(out, NEW | {"plan.toml": b"\x00\xff"})
    assert (out / "plan.toml").read_bytes() == b"\x00\xff"
    (out / "plan.toml").unlink()
    assert content(out) == NEW
    assert os.listdir(out.parent) == [out.name]


def test_an_old_report_is_replaced_as_a_whole(out: Path) -> None:
    write_folder(out, OLD)
    write_folder(out, NEW)
    assert content(out) == NEW
    assert os.listdir(out.parent) == [out.name]


def test_an_empty_folder_may_be_given(out: Path) -> None:
    out.mkdir(parents=True)
    write_folder(out, NEW)
    assert content(out) == NEW


def test_a_link_to_a_folder_stays_a_link(out: Path, tmp_path: Path) -> None:
    write_folder(out, OLD)
    link = tmp_path / "link"
    link.symlink_to(out)
    write_folder(link, NEW)
    assert link.is_symlink()
    assert content(out) == NEW


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
    assert content(out) == present
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
    assert content(out) == OLD
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
