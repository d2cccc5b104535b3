"""Evidence to judge, in the stages' own dataclasses: a small run that passes every check.

Two linears with a softmax between them; the softmax stays FP32. Tests replace the one field that
they are about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amp_convert.capture.captured import Uncaptured
from amp_convert.capture.fidelity import Fidelity
from amp_convert.core.slices import SliceError, SliceKind
from amp_convert.gate.baseline import baseline_of
from amp_convert.gate.compare import GateResult, compare
from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Decision, Plan
from amp_convert.report import Environment, ModelInfo, PlanSection, RunReport, Unchecked
from amp_convert.report.records import NodeRecord
from amp_convert.validate.inference.results import (
    Divergence,
    MetricPair,
    NodeDivergence,
    OutputError,
)
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.verdict import Check, Thresholds, Verdict, judge
from tests import decisions

FP16 = Thresholds.for_dtype("float16")

FIRST, SOFTMAX, LAST = (
    "encoder.0/aten.linear#0",
    "encoder.1/aten.softmax#0",
    "head/aten.linear#0",
)


def decision(node: str = FIRST, **changes: Any) -> Decision:
    """A node that the default rules allow in float16."""
    return decisions.decision(node, **changes)


def in_fp32(node: str = SOFTMAX, **changes: Any) -> Decision:
    """A node that stays FP32 because its op is denied."""
    return decisions.in_fp32(node, **({"rule": "op aten.softmax"} | changes))


DECISIONS = (decision(FIRST), in_fp32(SOFTMAX), decision(LAST))


def plan(*decisions: Decision, **changes: Any) -> Plan:
    """A plan of `decisions`, or of the three."""
    base = Plan(
        dtype="float16",
        device="cpu",
        rules=("default.toml",),
        painting="grappler",
        calibration_batches=4,
        eval=decisions or DECISIONS,
        train=(),
        eval_casts=Casts(3, 2, 4),
        train_casts=Casts(),
        uncaptured=(),
        unmatched_rules=(),
    )
    return replace(base, **changes)


def fidelity(mode: str = "eval", **changes: Any) -> Fidelity:
    """A captured graph that equals the eager model."""
    return replace(
        Fidelity(mode, "identical", True, True, None, 0.0, "agree bit for bit"), **changes
    )


BOTH_MODES = (fidelity("eval"), fidelity("train"))


def node_error(node: str = FIRST, **changes: Any) -> NodeDivergence:
    """Errors of a low node, above one rounding unit (4.9e-4) so that growth counts."""
    layer, _, op = node.partition("/")
    base = NodeDivergence(
        node=node,
        layer=layer,
        op=op.partition("#")[0],
        dtype="float16",
        local_rel_l2=1e-3,
        accumulated_rel_l2=2e-3,
        sqnr_db=54.0,
        cosine=0.9999,
        max_abs_err=0.01,
        max_ulp=2.0,
        nonfinite=0,
        overflow_fraction=0.0,
        underflow_fraction=0.0,
    )
    return replace(base, **changes)


NODES = (
    node_error(FIRST),
    node_error(SOFTMAX, dtype="float32", local_rel_l2=None),
    node_error(LAST),
)


def piece(kind: SliceKind = SliceKind.WHOLE, **changes: Any) -> SliceError:
    """A slice within every limit."""
    return replace(SliceError(kind, 3, 2e-3, 1e-7, 64), **changes)


def output(name: str = "logits", **changes: Any) -> OutputError:
    """A float output within every limit."""
    base = OutputError(
        name=name,
        dtype="float32",
        elements=640,
        rel_l2=1e-3,
        cosine=0.99999,
        max_abs_err=0.02,
        ref_abs_max=8.0,
        abs_err_p50=0.001,
        abs_err_p90=0.004,
        abs_err_p95=0.008,
        abs_err_p99=0.016,
        mismatches=0,
        nonfinite=0,
        ref_nonfinite=0,
        ref_deviation_max=8.0,
        slices=(piece(), piece(SliceKind.CHANNEL, dim=1), piece(SliceKind.SAMPLE, batch=0)),
        noise_rel_l2=1e-7,
        noise_max_abs=1e-6,
    )
    return replace(base, **changes)


def label(mismatches: int = 0, **changes: Any) -> OutputError:
    """An integer output; its float errors carry no meaning."""
    return output("label", **({"dtype": "int64", "mismatches": mismatches, "slices": ()} | changes))


def metric(name: str = "accuracy", **changes: Any) -> MetricPair:
    """A metric that holds."""
    return replace(MetricPair(name, 0.975, 0.97, 0.972, lower_is_better=False), **changes)


def divergence(**changes: Any) -> Divergence:
    """Two batches through both graphs, all within limits."""
    base = Divergence(
        batches=2,
        samples=64,
        nodes=NODES,
        outputs=(output(), label()),
        autocast_outputs=(output(rel_l2=9e-4), label()),
        autocast_reason="",
        metrics=(metric(),),
        metrics_reason="",
        costs=(),
        reference_rel_l2=0.0,
        frozen_identical=True,
        frozen_outputs=(output(), label()),
        batches_given=2,
        node_batches=2,
    )
    return replace(base, **changes)


def report(
    decisions: tuple[Decision, ...] = DECISIONS,
    inference: Divergence | None = None,
    uncaptured: tuple[Uncaptured, ...] = (),
    training: TrainingParity | None = None,
    **section: Any,
) -> RunReport:
    """A report of a run, judged by the real verdict. `section` changes fields of its plan."""
    inference = inference or divergence()
    planned = plan(*decisions, uncaptured=uncaptured, train=decisions)
    limits = Thresholds.for_dtype("float16")
    found = judge(BOTH_MODES, planned, inference, limits, metrics_supplied=True, training=training)
    low = sum(d.low for d in decisions)
    totals = {
        "dtype": "float16",
        "device": "cpu",
        "rules": planned.rules,
        "painting": "grappler",
        "calibration_batches": 4,
        "nodes": len(decisions),
        "low_nodes": low,
        "share_nodes_low": low / len(decisions),
        "share_macs_low": 1.0,
        "casts": 3,
        "borders": 4,
        "unknown_ops": {},
        "uncaptured": uncaptured,
        "unmatched_rules": (),
        "decisions": tuple(map(NodeRecord.of, decisions)),
    }
    return RunReport(
        amp_convert="0.1.0",
        model=ModelInfo(
            name="digits",
            source="/home/somebody/digits.py",
            digest="sha256:0123",
            model_class="digits.Net",
            parameters=12345,
        ),
        created="2026-01-02T03:04:05Z",
        verdict=found,
        environment=Environment(
            python="3.11.7",
            torch="2.13.0+cpu",
            platform="Linux",
            processor="x86_64",
            threads=2,
            device="cpu",
            device_name="x86_64",
            device_reason="no CUDA device",
            tf32=None,
            dtype="float16",
        ),
        fidelity=BOTH_MODES,
        plan=PlanSection.model_validate(totals | section),
        inference=inference,
        training=training or Unchecked(reason="not asked for"),
        onnx=Unchecked(reason="not asked for"),
    )


def verdict(
    inference: Divergence | None = None,
    *,
    rows: Any = BOTH_MODES,
    planned: Any = None,
    thresholds: Thresholds = FP16,
    metrics_supplied: bool = True,
    training: TrainingParity | None = None,
) -> Verdict:
    """The verdict over evidence that passes but for what is given."""
    return judge(
        rows,
        planned or plan(train=DECISIONS),
        inference or divergence(),
        thresholds,
        metrics_supplied=metrics_supplied,
        training=training,
    )


def check(name: str, found: Verdict) -> Check:
    """The one check of this name."""
    (wanted,) = [one for one in found.checks if one.name == name]
    return wanted


def with_output(**changes: Any) -> Divergence:
    """A run whose one float output is changed."""
    return divergence(outputs=(output(**changes), label()))


def kinds(result: GateResult) -> list[str]:
    """The kinds of all findings, in order."""
    return [str(finding.kind) for finding in result.findings]


def measured(*nodes: Any) -> RunReport:
    """A report with these node errors in place of the usual ones, by identity."""
    given_nodes = {node.node: node for node in nodes}
    return report(inference=divergence(nodes=tuple(given_nodes.get(n.node, n) for n in NODES)))


def gated(now: RunReport, before: RunReport | None = None, **options: float) -> GateResult:
    """`now` against the baseline of `before`, or of the report that passes."""
    return compare(now, baseline_of(before or report()), **options)
