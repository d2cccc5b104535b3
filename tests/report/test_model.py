"""The report as data: there and back, strict about what it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from amp_convert.capture.captured import Uncaptured
from amp_convert.capture.fidelity import Fidelity
from amp_convert.core.exponent_histogram import ExponentHistogram
from amp_convert.plan.plan import Decision
from amp_convert.report import RunReport, Unchecked
from amp_convert.report.records import NodeRecord
from amp_convert.report.writers.json_report import json_text
from amp_convert.validate.inference.results import (
    ArmCost,
    Divergence,
    MetricPair,
    NodeDivergence,
    OutputError,
)
from amp_convert.validate.training.gradient_results import (
    ActivationGradient,
    GradientParity,
    GradientRange,
    LayerGradient,
    ParameterGradient,
)
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import Look, Noninferiority
from amp_convert.validate.training.results import ArmRecord, PairedRun, SeedPair, TrainingParity
from amp_convert.verdict.verdict import Check, Verdict
from tests.report.builders import decision, fp32, plan_section
from tests.report.exported import node, output, parity, run, section

_FLOATS = st.floats()
st.register_type_strategy(float, _FLOATS)
_STAGES = {
    "verdict": st.builds(Verdict, checks=st.lists(st.builds(Check), max_size=3).map(tuple)),
    "fidelity": st.lists(st.builds(Fidelity), max_size=2).map(tuple),
    "inference": st.none()
    | st.builds(
        Divergence,
        nodes=st.lists(st.builds(NodeDivergence), max_size=3).map(tuple),
        outputs=st.lists(st.builds(OutputError), max_size=2).map(tuple),
        autocast_outputs=st.just(()),
        metrics=st.lists(st.builds(MetricPair), max_size=2).map(tuple),
        costs=st.lists(st.builds(ArmCost), max_size=2).map(tuple),
    ),
}
_COUNTS = st.dictionaries(st.integers(-1074, 1023), st.integers(1, 10**9), max_size=3)
_HISTOGRAM = st.builds(ExponentHistogram, counts=_COUNTS)
_RANGE = st.builds(GradientRange, histogram=_HISTOGRAM)
_GRADIENTS = st.builds(
    GradientParity,
    parameters=st.lists(st.builds(ParameterGradient), max_size=2).map(tuple),
    layers=st.lists(st.builds(LayerGradient), max_size=2).map(tuple),
    activations=st.lists(st.builds(ActivationGradient), max_size=2).map(tuple),
    weight_range=_RANGE,
    activation_range=_RANGE,
)
_ARMS = st.lists(st.builds(ArmRecord), max_size=2).map(tuple)
_MARGINS = st.builds(Margin, value=st.floats(1e-300, 1e300))
_TRAINING = st.builds(
    TrainingParity,
    gradients=_GRADIENTS,
    run=st.builds(PairedRun, arms=_ARMS),
    pairs=st.lists(st.builds(SeedPair), max_size=2).map(tuple),
    noninferiority=st.none()
    | st.builds(
        Noninferiority,
        margin=_MARGINS,
        looks=st.lists(st.builds(Look), max_size=2).map(tuple),
    ),
)
_DECISIONS = st.lists(st.builds(Decision), max_size=3).map(tuple)
_UNCAPTURED = st.lists(st.builds(Uncaptured), max_size=2).map(tuple)


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.fixed_dictionaries(_STAGES), _DECISIONS, _UNCAPTURED)
def test_a_report_survives_json(
    small_report: RunReport,
    stages: dict[str, object],
    decisions: tuple[Decision, ...],
    uncaptured: tuple[Uncaptured, ...],
) -> None:
    plan = small_report.plan.model_copy(
        update={"decisions": tuple(map(NodeRecord.of, decisions)), "uncaptured": uncaptured}
    )
    report = RunReport.model_validate(dict(small_report) | stages | {"plan": plan})
    text = json_text(report)
    again = RunReport.model_validate_json(text)
    assert json_text(again) == text
    if "NaN" not in text:
        assert again == report


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(_TRAINING)
def test_training_survives_json(small_report: RunReport, training: TrainingParity) -> None:
    report = small_report.model_copy(update={"training": training})
    text = json_text(report)
    again = RunReport.model_validate_json(text)
    assert isinstance(again.training, TrainingParity)
    assert json_text(again) == text
    if "NaN" not in text:
        assert again.training == training


def test_training_comes_back_as_what_it_was(trained_report: RunReport) -> None:
    again = RunReport.model_validate_json(json_text(trained_report))
    assert again.training == trained_report.training
    assert isinstance(again.training, TrainingParity)
    counts = again.training.gradients.activation_range.histogram.counts
    assert dict(counts) == {-27: 10, -20: 40, -10: 50}
    mixed = again.training.run.arm("mixed")
    assert mixed is not None
    assert mixed.gradient_norms[0] == math.inf
    assert mixed.skipped == (1,)


def test_onnx_comes_back_as_what_it_was(exported_report: RunReport) -> None:
    again = RunReport.model_validate_json(json_text(exported_report))
    assert again.onnx == section()


def test_numbers_of_onnx_that_json_lacks_come_back_as_numbers(small_report: RunReport) -> None:
    wild = run("optimised", output(math.nan, math.inf, agrees=False))
    rows = (node("a", "aten.exp", math.nan, -math.inf),)
    onnx = section(runs=(*parity().runs[:2], wild, parity().runs[3]), nodes=rows)
    text = json_text(small_report.model_copy(update={"onnx": onnx}))
    again = RunReport.model_validate_json(text)
    assert json_text(again) == text
    # NaN is not itself; its spelling is.
    assert repr(again.onnx) == repr(onnx)


def test_what_did_not_run_comes_back_unchecked(small_report: RunReport) -> None:
    again = RunReport.model_validate_json(json_text(small_report))
    assert again.training == Unchecked(reason="training parity is not in this version")
    assert again.onnx == Unchecked(reason="no ONNX model was asked for")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.surprise", 1),
        ("training.run.arms.0.surprise", 1),
        ("training.gradients", None),
        ("training.run.arms.0.losses", "many"),
        ("training.gradients.weight_range.histogram.counts", {"half": 1}),
    ],
)
def test_what_training_does_not_have_is_refused(
    trained_report: RunReport, path: str, value: object
) -> None:
    document = json.loads(json_text(trained_report))
    RunReport.model_validate(document)
    _set(document, path, value)
    with pytest.raises(ValidationError):
        RunReport.model_validate(document)


def test_numbers_that_json_lacks_come_back_as_numbers(small_report: RunReport) -> None:
    inference = small_report.inference
    assert inference is not None
    rows = [replace(inference.nodes[0], sqnr_db=v) for v in (math.nan, math.inf, -math.inf)]
    check = Check("outputs.rel_l2", "fail", math.nan, math.inf, "")
    report = small_report.model_copy(
        update={
            "inference": replace(inference, nodes=tuple(rows)),
            "verdict": Verdict("fail", (check, Check("text", "pass", "identical", None, ""))),
        }
    )
    again = RunReport.model_validate_json(json_text(report))
    assert again.inference is not None
    read = [row.sqnr_db for row in again.inference.nodes]
    assert str(read) == "[nan, inf, -inf]"
    assert str(again.verdict.checks[0].value) == "nan"
    assert again.verdict.checks[0].threshold == math.inf
    assert again.verdict.checks[1].value == "identical"


def _set(document: dict[str, object], path: str, value: object) -> None:
    *parents, last = path.split(".")
    at: object = document
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]  # type: ignore[index]
    at[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("surprise", 1),
        ("plan.surprise", 1),
        ("plan.decisions.0.surprise", 1),
        ("inference.nodes.0.surprise", 1),
        ("schema_version", 2),
        ("verdict.status", "passed"),
        ("verdict.checks.0.status", "ok"),
        ("plan.nodes", "many"),
        ("inference.nodes.0.sqnr_db", "large"),
    ],
)
def test_what_a_report_does_not_have_is_refused(
    small_report: RunReport, path: str, value: object
) -> None:
    document = json.loads(json_text(small_report))
    RunReport.model_validate(document)
    _set(document, path, value)
    with pytest.raises(ValidationError):
        RunReport.model_validate(document)


def test_a_report_cannot_be_changed(small_report: RunReport) -> None:
    with pytest.raises(ValidationError):
        small_report.created = "now"


def test_the_plan_section_adds_up_the_plan() -> None:
    section = plan_section(
        (
            decision("a", macs=300),
            fp32("b", "aten.exp", macs=100),
            fp32("c", "aten.new", category="unknown"),
            fp32("d", "aten.argmax", category="none"),
        )
    )
    assert (section.nodes, section.low_nodes) == (3, 1)
    assert section.share_nodes_low == pytest.approx(1 / 3)
    assert section.share_macs_low == 0.75
    assert (section.casts, section.borders) == (3, 4)
    assert section.unknown_ops == {"aten.new": 1}


def test_a_large_report_survives_json(make_report: Callable[[int], RunReport]) -> None:
    report = make_report(300)
    assert RunReport.model_validate_json(json_text(report)) == report
