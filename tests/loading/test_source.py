from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.core.errors import UsageError
from amp_convert.loading.source import output_folder, split_source


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [
        ("model.py", None, "reports/model"),
        ("nets/model.v2.py", None, "reports/model.v2"),
        ("nets/model.py:Net", None, "reports/model"),
        ("package.nets:Net", None, "reports/nets"),
        ("nets:Net", None, "reports/nets"),
        ("model.py", "elsewhere/here", "elsewhere/here"),
    ],
)
def test_where_the_report_goes(source: str, out: str | None, expected: str) -> None:
    assert output_folder(source, out) == Path(expected)


@pytest.mark.parametrize("source", ["", ".", "..", "/", "nets/.."])
def test_a_source_without_a_name_has_no_folder(source: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a model file"):
        output_folder(source, None)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("model.py", ("model.py", "")),
        ("model.py:make", ("model.py", "make")),
        ("a/b.py:Nets.small", ("a/b.py", "Nets.small")),
        ("pkg.mod:make", ("pkg.mod", "make")),
        ("pkg:make", ("pkg", "make")),
        ("model", ("model", "")),
        ("model.py:12", ("model.py:12", "")),
        ("pkg.mod:", ("pkg.mod:", "")),
        (":make", (":make", "")),
        ("a/b:make", ("a/b:make", "")),
        ("C:\\nets\\model.py", ("C:\\nets\\model.py", "")),
        ("C:\\nets\\model.py:make", ("C:\\nets\\model.py", "make")),
        ("", ("", "")),
    ],
)
def test_split_source(source: str, parts: tuple[str, str]) -> None:
    assert split_source(source) == parts


def test_an_existing_file_with_a_colon_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a:b").write_text("")
    monkeypatch.chdir(tmp_path)
    assert split_source("a:b") == ("a:b", "")


@given(st.text(alphabet="ab.:/\\y p1"))
def test_split_source_loses_nothing(source: str) -> None:
    place, attribute = split_source(source)
    assert source == (f"{place}:{attribute}" if attribute else place)
