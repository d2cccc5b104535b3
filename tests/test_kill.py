"""A sample of `make kill`: one killed run, and its checks on what it would find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import kill as program
from tests.benchmarks.kill import Outcome, kill


@pytest.mark.slow
@pytest.mark.skipif(program.os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_run_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    outcome = kill(1, seed=3, folder=tmp_path)
    assert outcome.faults == []
    assert sum(outcome.ended.values()) == 1


def test_faults_are_seen(tmp_path: Path) -> None:
    outcome = Outcome()
    program._check(outcome, 1, {"arms": []}, {"arms": []})
    assert outcome.faults == []
    program._check(outcome, 1, {"arms": []}, {"arms": [1]})
    program._check(outcome, 2, {"arms": []}, program._report(tmp_path))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_text('{"created": "now"')
    program._check(outcome, 3, {"arms": []}, program._report(tmp_path))
    (tmp_path / "r" / "report.json").write_text('{"created": "now"}')
    (tmp_path / "r" / "junit.xml").write_text('<a><b timestamp="then"/></a>')
    program._check(outcome, 4, {"arms": []}, program._report(tmp_path))
    assert [fault.partition(":")[0] for fault in outcome.faults] == [
        "after kill 1 training has other numbers",
        *(f"after kill {number} the report is not whole" for number in (2, 3, 4)),
    ]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".left").mkdir()
    assert sorted(program._entries(tmp_path)) == [".left", "kept", "r"]
