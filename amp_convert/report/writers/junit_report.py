"""junit.xml: one test case a check of the verdict, for the test tab of a CI system."""

from __future__ import annotations

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite
from junitparser.junitparser import FinalResult

from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.verdict.verdict import Check


def junit_text(report: RunReport) -> str:
    """The text of junit.xml. Names hold no character that XML forbids."""
    suite = TestSuite("amp-convert")
    suite.timestamp = report.created
    # All at once: after each that is added singly, the whole suite is counted anew.
    suite.add_testcases([_case(check, report.model.name) for check in report.verdict.checks])
    document = JUnitXml("amp-convert")
    document.add_testsuite(suite)
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return text.decode() + "\n"


def _case(check: Check, model: str) -> TestCase:
    case = TestCase(fmt.printable(check.name), classname=fmt.printable(model))
    case.result = _result(check)
    return case


def _result(check: Check) -> list[FinalResult]:
    reason = fmt.printable(check.reason)
    if check.status == "fail":
        measured = f"{fmt.quantity(check.value)} against {fmt.quantity(check.threshold)}"
        return [Failure(f"{reason} ({measured})", "parity")]
    return [Skipped(reason)] if check.status == "unchecked" else []
