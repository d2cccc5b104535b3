"""junit.xml: one case a check, well-formed whatever the names."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junitparser import JUnitXml

from amp_convert.report import RunReport
from amp_convert.report.text import printable
from amp_convert.report.writers.junit_report import junit_text
from amp_convert.verdict.verdict import Check, Verdict
from tests.report.builders import HOSTILE


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    golden("junit.xml", junit_text(small_report))


def test_junitparser_reads_the_same_counts(small_report: RunReport) -> None:
    read = JUnitXml.fromstring(junit_text(small_report))
    assert (read.tests, read.failures, read.skipped, read.errors) == (4, 1, 2, 0)


def test_hostile_names_are_attributes_and_nothing_else(hostile_report: RunReport) -> None:
    root = ElementTree.fromstring(junit_text(hostile_report))
    assert [case.get("name") for case in root.iter("testcase")] == [printable(n) for n in HOSTILE]
    assert {element.tag for element in root.iter()} == {
        "testsuites",
        "testsuite",
        "testcase",
        "failure",
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_gives_well_formed_xml(small_report: RunReport, text: str) -> None:
    verdict = Verdict("fail", (Check(text, "fail", text, None, text),))
    report = small_report.model_copy(update={"verdict": verdict})
    case = ElementTree.fromstring(junit_text(report)).find(".//testcase")
    assert case is not None
    assert case.get("name") == printable(text)
