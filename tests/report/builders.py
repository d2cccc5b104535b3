"""Parts of reports with chosen values, for the tests to put together."""

from __future__ import annotations

from typing import Any

from amp_convert.capture.captured import Uncaptured
from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Decision, Plan
from amp_convert.report import Environment, PlanSection
from amp_convert.validate.inference.results import NodeDivergence, OutputError
from tests import decisions

HOSTILE = (
    "<script>alert(1)</script>",
    "](x) | `tick` **bold** \\",
    "=cmd|' /C calc'!A0",
    "bell\x07 null\x00 escape\x1b[31m\nline",
    "\u202eright to left \ud7ff \ufffe",
    "x" * 2_000,
    "[red]markup[/red] & ]]> -->",
    '" onload="alert(1)',
)


def decision(layer: str, op: str = "aten.linear", **changes: Any) -> Decision:
    """A node that computes in float16 by the default rules, unless `changes` say otherwise."""
    said = {"op": op, "rule": f"op {op}", "reason": "matrix product: fast on tensor cores"}
    return decisions.decision(f"{layer}/{op}#0", **(said | {"layer": layer} | changes))


def fp32(layer: str, op: str, **changes: Any) -> Decision:
    """A node that stays FP32 because its op is denied."""
    said = {"op": op, "rule": f"op {op}", "reason": "its sum of squares overflows"}
    return decisions.in_fp32(f"{layer}/{op}#0", **(said | {"layer": layer} | changes))


def divergence_of(node: Decision, local: float | None, accumulated: float | None) -> NodeDivergence:
    """Errors of `node`; the other measures are fixed, so goldens can spell them."""
    return NodeDivergence(
        node=node.node,
        layer=node.layer,
        op=node.op,
        dtype=node.dtype,
        local_rel_l2=local,
        accumulated_rel_l2=accumulated,
        sqnr_db=-3.5 if accumulated is not None else None,
        cosine=0.999 if accumulated is not None else None,
        max_abs_err=0.25 if accumulated is not None else None,
        max_ulp=2.0 if accumulated is not None else None,
        nonfinite=0,
        overflow_fraction=0.0 if accumulated is not None else None,
        underflow_fraction=0.125 if accumulated is not None else None,
    )


def output_error(name: str, rel_l2: float, dtype: str = "float32") -> OutputError:
    """Error of one model output."""
    return OutputError(
        name=name,
        dtype=dtype,
        elements=640,
        rel_l2=rel_l2,
        cosine=0.999,
        max_abs_err=0.02,
        ref_abs_max=8.0,
        abs_err_p50=0.001,
        abs_err_p90=0.004,
        abs_err_p95=0.008,
        abs_err_p99=0.016,
        mismatches=0,
        nonfinite=0,
        ref_nonfinite=0,
    )


def environment() -> Environment:
    """A fixed machine."""
    return Environment(
        python="3.11.7",
        torch="2.13.0+cpu",
        platform="Linux-6.1-x86_64",
        processor="x86_64",
        threads=2,
        device="cpu",
        device_name="x86_64",
        device_reason="no CUDA device",
        tf32=None,
        dtype="float16",
    )


def plan_of(decisions: tuple[Decision, ...], uncaptured: tuple[Uncaptured, ...] = ()) -> Plan:
    """A plan with three casts, one of a weight, at four borders."""
    return Plan(
        dtype="float16",
        device="cpu",
        rules=("default",),
        painting="grappler",
        calibration_batches=4,
        eval=decisions,
        train=(),
        eval_casts=Casts(activations=2, weights=1, borders=4),
        train_casts=Casts(),
        uncaptured=uncaptured,
        unmatched_rules=(),
    )


def plan_section(
    decisions: tuple[Decision, ...], uncaptured: tuple[Uncaptured, ...] = ()
) -> PlanSection:
    """The report's section for `plan_of` the same."""
    return PlanSection.of(plan_of(decisions, uncaptured))


def transformer_block(layer: str) -> list[Decision]:
    """Ten nodes: eight in float16, two layer norms in float32."""
    heavy: dict[str, object] = {"macs": 600_000_000, "location": "modeling_bert.py:345"}
    norm: dict[str, object] = {
        "module": "torch.nn.modules.normalization.LayerNorm",
        "location": "modeling_bert.py:390",
    }
    return [
        *(
            decision(f"{layer}.attention.self.{part}", **heavy)
            for part in ("query", "key", "value")
        ),
        decision(f"{layer}.attention.self", "aten.scaled_dot_product_attention", **heavy),
        decision(f"{layer}.attention.output.dense", **heavy),
        fp32(f"{layer}.attention.output.LayerNorm", "aten.layer_norm", **norm),
        decision(f"{layer}.intermediate.dense", **heavy),
        decision(f"{layer}.intermediate.intermediate_act_fn", "aten.gelu", category="infer"),
        decision(f"{layer}.output.dense", **heavy),
        fp32(f"{layer}.output.LayerNorm", "aten.layer_norm", **norm),
    ]
