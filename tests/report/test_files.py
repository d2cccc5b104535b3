"""The report folder of a run."""

from __future__ import annotations

import tomllib
from pathlib import Path

from amp_convert.report import RunReport
from amp_convert.report.files import write_report
from amp_convert.report.folder import REPORT_FILES
from tests.report.builders import plan_of


def test_the_folder_holds_every_form_of_the_contract(
    small_report: RunReport, tmp_path: Path
) -> None:
    out = tmp_path / "reports" / "digits"
    plan = plan_of(small_report.plan.decisions)
    write_report(out, small_report, plan.to_toml())
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.json",
        "layers.csv",
        "plan.toml",
        "report.md",
        "report.html",
        "junit.xml",
    }
    assert names <= REPORT_FILES
    assert RunReport.model_validate_json((out / "report.json").read_text("utf-8")).verdict == (
        small_report.verdict
    )
    pinned = tomllib.loads((out / "plan.toml").read_text("utf-8"))["rule"]
    assert len(pinned) == small_report.plan.nodes
