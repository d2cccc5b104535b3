"""One layer or node on a page: causes back to the seed, and the rule that turns it round."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from amp_convert.attribute.results import Budget
from amp_convert.core.errors import UsageError
from amp_convert.plan.plan import DecisionKind
from amp_convert.profile.calibrate import Range, RangeStats
from amp_convert.report.model import RunReport, Unchecked
from amp_convert.report.sections.explanation import Explanation, explanation
from amp_convert.report.writers.explain_terminal import explanation_json, render_explanation
from amp_convert.validate.inference.results import LayerTime
from tests.report.builders import HOSTILE, decision, fp32

STATS = RangeStats(4, {"body/aten.linear#0": Range(12.5, 12.5, probed=Range(900.0, 900.0))})
SEED = fp32("scores", "aten.exp", reason="its input is large", evidence="abs max 12", source="a:1")
CHAIN = (
    decision("body", "aten.linear", macs=640),
    SEED,
    replace(fp32("", "aten.sum"), follows=SEED.node, kind=DecisionKind.PROPAGATION),
    replace(
        fp32("", "aten.div"), follows="/aten.sum#0", kind=DecisionKind.PROPAGATION, evidence=""
    ),
)


def of(small_report: RunReport, times: tuple[LayerTime, ...] = (), **wanted: str) -> Explanation:
    plan: Any = SimpleNamespace(eval=CHAIN, dtype="float16")
    assert isinstance(small_report.attribution, Budget)
    share = replace(small_report.attribution.nodes[0], node="body/aten.linear#0")
    budget = replace(small_report.attribution, nodes=(share,))
    return explanation(plan, STATS, budget, times, **wanted)


def test_causes_lead_back_to_the_seed(small_report: RunReport) -> None:
    (node,) = of(small_report, node="/aten.div#0").nodes
    assert [link.node for link in node.causes] == ["/aten.sum#0", SEED.node]
    assert node.causes[-1].evidence == "abs max 12"
    assert tomllib.loads(node.rule)["rule"] == [
        {"node": "/aten.div#0", "category": "allow", "reason": "let it be low"}
    ]


def test_a_layer_has_its_nodes_ranges_share_and_time(small_report: RunReport) -> None:
    times = (LayerTime("body", "Linear", 2.0, 1.5, 1.25, 1.0),)
    found = of(small_report, times, layer="body")
    (node,) = found.nodes
    assert (node.abs_max, node.probed, node.macs) == (12.5, 900.0, 640)
    assert node.share is not None
    assert found.time == times[0]
    assert 'category = "deny"' in node.rule
    assert len(of(small_report, layer="").nodes) == 2


@pytest.mark.parametrize(
    ("wanted", "mend"),
    [({"layer": "bodies"}, "Did you mean body"), ({"node": "body/aten.linear#1"}, "Did you mean")],
)
def test_what_there_is_not(small_report: RunReport, wanted: dict[str, str], mend: str) -> None:
    with pytest.raises(UsageError, match=mend):
        of(small_report, **wanted)


def _shown(found: Explanation) -> str:
    console = Console(file=StringIO(), width=80, force_terminal=False)
    render_explanation(console, found)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_the_page_and_the_json(small_report: RunReport) -> None:
    text = _shown(of(small_report, node="/aten.div#0"))
    assert "abs max 12" in text
    assert "scores/aten.exp#0" in text
    read = json.loads(explanation_json(of(small_report, layer="body")))
    assert read["explanation"]["nodes"][0]["node"] == "body/aten.linear#0"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_drive_no_terminal(
    small_report: RunReport, name: str, make_report: Callable[..., RunReport]
) -> None:
    hostile = fp32(name, name, reason=name, evidence=name, source=name, location=name)
    plan: Any = SimpleNamespace(eval=(hostile,), dtype="float16")
    found = explanation(plan, STATS, Unchecked(reason=name), (), layer=name)
    text = _shown(found)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
