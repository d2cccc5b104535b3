"""report.html: self-contained, safe against names from a model, small, readable."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amp_convert.report import RunReport
from amp_convert.report.sections.onnx_summary import onnx_summary
from amp_convert.report.text import printable
from amp_convert.report.writers.html_report import TEMPLATES, html_text
from amp_convert.verdict.verdict import Check, Verdict
from tests.report.builders import HOSTILE, decision, fp32, plan_section
from tests.report.exported import clean_parity, fp32_run, output, run, section
from tests.report.trained import (
    arm_of,
    four_arms,
    gradients,
    long_parity,
    over_seeds,
    parity,
    run_of,
)

_VOID = {"meta"}


class Page(HTMLParser):
    """What a page consists of; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(trained_report: RunReport) -> Page:
    return Page(html_text(trained_report))


def test_the_page_loads_nothing_and_runs_nothing(hostile_report: RunReport) -> None:
    page = Page(html_text(hostile_report))
    assert {tag for tag, _ in page.tags} & {
        "a", "base", "embed", "form", "iframe", "image", "img", "link", "object", "script", "use",
    } == set()  # fmt: skip
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert names & {"href", "src", "style", "xlink:href", "action", "srcset"} == set()
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_the_policy_allows_this_style_sheet_only(page: Page) -> None:
    policy = next(
        meta["content"]
        for meta in page.named("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert page.style == (TEMPLATES / "report.css").read_text(encoding="utf-8")


def test_hostile_names_are_shown_as_text(hostile_report: RunReport) -> None:
    shown = Page(html_text(hostile_report)).text
    for name in HOSTILE:
        if len(name) < 100:
            assert shown.count(printable(name)) >= 5


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(min_size=1, max_size=60))
def test_any_name_is_one_text(small_report: RunReport, name: str) -> None:
    verdict = Verdict("fail", (Check(name, "unchecked", name, name, name),))
    report = small_report.model_copy(update={"verdict": verdict})
    assert printable(name).strip() in [text.strip() for text in Page(html_text(report)).text]


@pytest.mark.slow
def test_a_thousand_nodes_and_ten_thousand_steps_stay_under_500_kilobytes(
    make_report: Callable[[int], RunReport],
) -> None:
    report = make_report(1_000).model_copy(update={"training": long_parity(10_000)})
    text = html_text(report)
    assert len(Page(text).named("tr")) > 1_000
    assert len(text.encode()) < 500_000


def test_the_page_stays_small_however_large_the_graph(
    make_report: Callable[[int], RunReport],
) -> None:
    text = html_text(make_report(4_000))
    assert "2,500 more nodes in layers.csv" in text
    assert len(text.encode()) < 700_000


def test_the_page_can_be_read_by_a_screen_reader(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert set(headings[1:]) == {2}
    assert all(cell.get("scope") in ("col", "row") for cell in page.named("th"))
    for graphic in page.named("svg"):
        assert graphic.get("aria-hidden") == "true" or graphic.get("role") == "img"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for label in (attributes.get("aria-labelledby") or "").split():
            assert label in ids


def _colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(first: str, second: str) -> float:
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_colours_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    colours = _colours(re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme])
    grounds = ["page", "soft", "pass-soft", "fail-soft", "open-soft"]
    text = [(ink, ground) for ink in ("ink", "quiet") for ground in grounds]
    text += [(status, f"{status}-soft") for status in ("pass", "fail", "open")]
    text += [("page", status) for status in ("pass", "fail", "open")] + [("low", "page")]
    for ink, ground in text:
        assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ink in ("low", "local", "limit", "reference", "fail"):
        for ground in ("page", "soft"):
            assert _contrast(colours[ink], colours[ground]) >= 3, (ink, ground)


def test_a_report_without_inference_or_fp32_nodes(small_report: RunReport) -> None:
    report = small_report.model_copy(
        update={"inference": None, "plan": plan_section((decision("a"),))}
    )
    page = Page(html_text(report))
    assert any("Nothing: every node computes in low precision." in text for text in page.text)
    assert "chart" not in {attributes.get("class") for attributes in page.named("svg")}


def test_the_bars_show_the_shares(small_report: RunReport) -> None:
    plan = plan_section((decision("a", macs=300), fp32("b", "aten.mm", macs=100)))
    page = Page(html_text(small_report.model_copy(update={"plan": plan})))
    bars = [rect for rect in page.named("rect") if rect.get("class") == "low"]
    assert [bar["width"] for bar in bars] == ["75.0", "50.0"]


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


_CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--window-size=1200,1600",
)  # fmt: skip


def _console(folder: Path, text: str) -> list[str]:
    """Render `text` in Chromium; what the page wrote to the console."""
    page, shot = folder / "page.html", folder / "page.png"
    page.write_text(text, encoding="utf-8")
    assert _CHROMIUM is not None
    command = [
        _CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}",
        page.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shot.stat().st_size > 10_000
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_renders_without_a_console_message(
    hostile_report: RunReport, tmp_path: Path
) -> None:
    text = html_text(hostile_report)
    assert _console(tmp_path, text) == []
    # The oracle itself: a script that slipped through would be refused, and be seen here.
    assert _console(tmp_path, text.replace("</main>", "<script>alert(1)</script></main>"))
