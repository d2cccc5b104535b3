"""report.html: self-contained, safe against names from a model, small, readable."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amp_convert.report import RunReport
from amp_convert.report.text import printable
from amp_convert.report.writers.html_report import TEMPLATES, html_text
from amp_convert.verdict.verdict import Check, Verdict
from tests.report.builders import HOSTILE, decision, fp32, plan_section
from tests.report.trained import (
    long_parity,
)
from tests.report.writers.html_page import Page


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
