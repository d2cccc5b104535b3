"""Baselines and other things that the command refuses, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.refused_calls import refused
from tests.command import MLP, amp, net, write

GOOD = net("return self.a(x)")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("baseline")
    write(folder, MLP)
    assert amp(folder, "model.py").code == 0
    made = amp(folder, "gate", "reports/model/report.json", "--baseline", "b.json", "--update")
    assert made.code == 0
    document: dict[str, Any] = json.loads((folder / "b.json").read_text(encoding="utf-8"))
    return document


def test_no_baseline(tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('the model file was run')")
    error = refused(tmp_path, "model.py", "--baseline", "none.json")
    assert error.startswith("there is no baseline at none.json. ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema_version": 2},
            "b.json has schema version 2, this amp-convert reads version 1. "
            "Write the baseline anew with this version.",
        ),
        ({"schema_version": None}, "b.json is not a baseline: it has no schema_version."),
        (
            {"casts": "six"},
            "b.json is not a valid baseline: casts: Input should be a valid integer, unable to "
            "parse string as an integer. Write the baseline anew with this version.",
        ),
        ({"dtype": "bfloat16"}, "the report's dtype is float16, the baseline's is bfloat16. "),
        ({"device": "cuda"}, "the report's device is cpu, the baseline's is cuda. "),
        (
            {"model": {"name": "other", "model_class": "other.Net"}},
            "the report's model is model, the baseline's is other. ",
        ),
        (
            {"model": {"name": "model", "model_class": "other.Net"}},
            "the report's model class is torch.nn.modules.container.Sequential, the baseline's "
            "is other.Net. ",
        ),
    ],
)
def test_a_baseline_that_does_not_fit(
    change: dict[str, Any], message: str, baseline: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, MLP)
    write(tmp_path, json.dumps(baseline | change), "b.json")
    error = refused(tmp_path, "model.py", "--baseline", "b.json")
    assert error.startswith(message)
    if message.endswith(" "):
        mend = "Compare runs of the same kind, or write this baseline anew with --update."
        assert error == message + mend


def test_a_truncated_baseline(baseline: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('the model file was run')")
    text = json.dumps(baseline)
    write(tmp_path, text[: len(text) // 2], "b.json")
    error = refused(tmp_path, "model.py", "--baseline", "b.json")
    assert error.startswith("b.json is not a baseline: ")
    assert error.endswith("It may be truncated: restore it, or remove it and write it anew.")


def test_debug_shows_the_traceback_before_the_line(tmp_path: Path) -> None:
    write(tmp_path, "1 / 0\n")
    outcome = amp(tmp_path, "model.py", "--debug")
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert "ZeroDivisionError: division by zero" in lines
    assert lines[-1] == (
        "error: model.py raised ZeroDivisionError: division by zero (at model.py:1). "
        "Correct it there; --debug shows the traceback."
    )
    assert "Traceback" not in amp(tmp_path, "model.py").err


@pytest.mark.slow
def test_a_fault_of_our_own_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, GOOD)
    monkeypatch.setattr("amp_convert.report.assemble.judge", lambda *_, **__: 1 / 0)
    assert refused(tmp_path, "model.py", code=5) == (
        "a fault in amp-convert itself: ZeroDivisionError: division by zero. "
        "Please report it with what --debug shows."
    )
    assert "in <lambda>" in amp(tmp_path, "model.py", "--debug").err
