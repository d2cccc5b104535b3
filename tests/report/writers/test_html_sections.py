"""The sections of report.html."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amp_convert.report import RunReport
from amp_convert.report.sections.onnx_summary import onnx_summary
from amp_convert.report.writers.html_report import html_text
from tests.report.exported import clean_parity, fp32_run, output, run, section
from tests.report.trained import (
    arm_of,
    four_arms,
    gradients,
    over_seeds,
    parity,
    run_of,
)
from tests.report.writers.html_page import Page


def _headings(page: Page) -> list[str]:
    return [str(tag["id"]) for tag in page.named("h2")]


_TRAINING = ["training", "loss", "scale", "gradients"]


def test_training_has_its_charts(page: Page) -> None:
    assert [name for name in _headings(page) if name in (*_TRAINING, "seeds")] == _TRAINING
    charts = [svg for svg in page.named("svg") if svg.get("class") == "chart"]
    assert [str(svg["aria-labelledby"]).split()[0] for svg in charts] == [
        "chart-title",
        "loss-chart-title",
        "distance-chart-title",
        "scale-chart-title",
        "gradient-title",
    ]
    titles = [
        attributes["id"]
        for name, attributes in page.tags
        if name in ("title", "desc") and "id" in attributes
    ]
    for svg in charts:
        assert set(str(svg["aria-labelledby"]).split()) <= set(titles)
    curves = [path["class"] for path in page.named("path") if "curve" in str(path.get("class"))]
    assert curves == [
        "curve fp32", "curve mixed", "curve autocast",
        "curve mixed", "curve autocast",
        "curve mixed", "curve autocast",
    ]  # fmt: skip


def test_without_scaling_there_is_no_chart_of_it(trained_report: RunReport) -> None:
    arms = tuple(replace(arm, scales=(), skipped=()) for arm in four_arms().arms)
    training = parity(run=replace(four_arms(), arms=arms), gradients=gradients(scale=1.0))
    page = Page(html_text(trained_report.model_copy(update={"training": training})))
    assert "scale" not in _headings(page)
    assert not any("scaled" in text for text in page.text)


def test_training_over_seeds_shows_pairs_and_looks(trained_report: RunReport) -> None:
    training = parity(**over_seeds([0.9] * 5, [0.9, 0.91, 0.88, 0.9, 0.92]))
    page = Page(html_text(trained_report.model_copy(update={"training": training})))
    assert "seeds" in _headings(page)
    tables = [str(table.get("class")) for table in page.named("table")]
    assert {"stack looks", "stack pairs"} <= set(tables)
    assert "-0.01914" in page.text
    assert "+0.02314" in page.text


def test_training_that_did_not_run_says_why(small_report: RunReport) -> None:
    page = Page(html_text(small_report))
    assert "Not checked: training parity is not in this version." in page.text
    assert not {"loss", "scale", "gradients", "seeds"} & set(_headings(page))


def test_training_that_made_no_step_can_be_shown(trained_report: RunReport) -> None:
    training = parity(run=run_of(arm_of("fp32", []), arm_of("mixed", [])), ended="interrupted")
    page = Page(html_text(trained_report.model_copy(update={"training": training})))
    assert "interrupted" in page.text
    assert [name for name in _headings(page) if name in _TRAINING] == ["training", "gradients"]


def test_onnx_has_its_section(exported_report: RunReport) -> None:
    page = Page(html_text(exported_report))
    headings = _headings(page)
    assert headings[headings.index("onnx") - 1 :][:3] == ["training", "onnx", "stays"]
    summary = onnx_summary(exported_report)
    assert summary is not None
    shown = {text.strip() for text in page.text}
    facts = {text for fact in summary.facts for text in (fact.name, fact.value)}
    firsts = {first.title for first in summary.firsts}
    rows = {note for row in summary.runs for note in (row.arm, row.limit or row.arm, *row.notes)}
    places = {node.location for node in summary.worst} | {node.onnx_ops for node in summary.worst}
    assert facts | firsts | rows | places | {"4.00e-02", "0.95", "no", "yes"} <= shown


@pytest.mark.parametrize(
    ("known", "status"),
    [({}, "unchecked"), ({"parting": "", "drifting": "", "nodes": ()}, "fail")],
    ids=["with a node to blame", "without"],
)
def test_a_run_beyond_its_limit_is_coloured_as_the_verdict_takes_it(
    small_report: RunReport, known: dict[str, object], status: str
) -> None:
    apart = run("optimised", output(0.04, agrees=False))
    by_hand = run("node by node", output(0.0), batches=1)
    onnx = section(runs=(fp32_run(), apart, by_hand), metrics=(), metrics_arm=None, **known)
    text = html_text(small_report.model_copy(update={"onnx": onnx}))
    assert f'<span class="pill {status}">no</span>' in text


def test_a_file_that_is_right_has_no_table_of_nodes(small_report: RunReport) -> None:
    onnx = section(**clean_parity())
    page = Page(html_text(small_report.model_copy(update={"onnx": onnx, "inference": None})))
    tables = [str(table.get("class")) for table in page.named("table")]
    assert "stack runs" in tables
    assert "stack worst" not in tables
    assert page.text.count("none") == 3


def test_without_an_export_there_is_no_section(small_report: RunReport) -> None:
    assert "onnx" not in _headings(Page(html_text(small_report)))
