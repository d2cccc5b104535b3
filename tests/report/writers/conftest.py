"""Fixtures of the tests in this folder."""

from __future__ import annotations

import pytest

from amp_convert.report import RunReport
from amp_convert.report.writers.html_report import html_text
from tests.report.writers.html_page import Page


@pytest.fixture
def page(trained_report: RunReport) -> Page:
    return Page(html_text(trained_report))
