"""report.md: the report for a pull request or a wiki, with nothing in it that needs a browser."""

from __future__ import annotations

from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.report.sections.archive import archive_text
from amp_convert.report.sections.attribution import attribution_summary
from amp_convert.report.sections.compiled_summary import compiled_summary
from amp_convert.report.sections.eager_plan import eager_plan_text
from amp_convert.report.sections.gaps import gaps
from amp_convert.report.sections.grouping import fp32_groups, layer_name, layers_text, ops_text
from amp_convert.report.sections.layer_times import LEAD, TIMED, time_rows
from amp_convert.report.sections.onnx_summary import onnx_summary
from amp_convert.report.sections.summary import (
    ARMS,
    casts_text,
    comparison,
    precision_text,
    verdict_sentence,
    worst_layers,
)
from amp_convert.report.writers.attribution_markdown import attribution_lines
from amp_convert.report.writers.islands_markdown import islands_lines
from amp_convert.report.writers.markdown import code, escape, table
from amp_convert.report.writers.onnx_markdown import onnx_lines
from amp_convert.report.writers.training_markdown import training_lines


def markdown_text(report: RunReport) -> str:
    """The text of report.md."""
    sections = (
        _verdict(report),
        _figures(report),
        _checks(report),
        _worst(report),
        attribution_lines(attribution_summary(report)),
        training_lines(report.training),
        onnx_lines(onnx_summary(report)),
        _compiled(report),
        _fp32(report),
        islands_lines(report.plan.islands, report.plan.stored_twice),
        _times(report),
        _gaps(report),
        _environment(report),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _verdict(report: RunReport) -> list[str]:
    plan = report.plan
    where = f"{plan.dtype} on {plan.device}"
    return [
        f"# {report.verdict.status.upper()}: {escape(report.model.name)} in {where}",
        "",
        f"{verdict_sentence(report)}. Rules: {', '.join(map(code, plan.rules))}.",
    ]


def _figures(report: RunReport) -> list[str]:
    rows = comparison(report)
    arms = [arm for arm in ARMS if any(getattr(row, arm) for row in rows)]
    cells = [[escape(row.quantity), *(getattr(row, arm) for arm in arms)] for row in rows]
    more = {
        "The plan on the eager model": eager_plan_text(report),
        "The saved archive": archive_text(report),
    }
    return [
        "## Against FP32",
        "",
        *(table(["", *arms], cells, numbers="12345") if rows else []),
        "",
        f"- Low precision: {precision_text(report)}",
        f"- Casts: {casts_text(report)}",
        *(f"- {what}: {escape(said)}" for what, said in more.items() if said),
    ]


def _compiled(report: RunReport) -> list[str]:
    found = compiled_summary(report.compiled)
    if found is None:
        return []
    cells = [[kind, *times] for kind, times in found.rows]
    return [
        "## Under torch.compile",
        "",
        *table(["", *found.arms], cells, numbers="12345"),
        "",
        *(f"- {name}: {escape(value)}" for name, value in found.facts),
    ]


def _times(report: RunReport) -> list[str]:
    rows = time_rows(report.inference.layer_times if report.inference else ())
    cells = [[escape(row.layer), *row.times, row.share] for row in rows]
    header = ["layer", *TIMED, "of frozen"]
    lines = ["## Time by layer", "", LEAD, "", *table(header, cells, numbers="12345")]
    return lines if rows else []


def _checks(report: RunReport) -> list[str]:
    rows = [
        [
            "**FAIL**" if check.status == "fail" else check.status,
            escape(check.name),
            escape(fmt.quantity(check.value)),
            escape(fmt.quantity(check.threshold)),
            escape(check.reason),
        ]
        for check in report.verdict.checks
    ]
    header = ["status", "check", "value", "threshold", "reason"]
    return ["## Checks", "", *table(header, rows, numbers="23")] if rows else []


def _worst(report: RunReport) -> list[str]:
    layers = worst_layers(report)
    if not layers:
        return []
    rows = [
        [
            fmt.error(layer.accumulated),
            fmt.error(layer.local),
            code(layer_name(layer.layer)),
            code(layer.op),
            code(layer.dtype),
            code(layer.location),
        ]
        for layer in layers
    ]
    header = ["accumulated", "local", "layer", "op", "dtype", "place"]
    return [
        "## Worst layers",
        "",
        "Relative L2 error against FP32 of each layer's worst node.",
        "Local: the node given the FP32 inputs; accumulated: given the mixed model's own.",
        "",
        *table(header, rows, numbers="01"),
    ]


def _fp32(report: RunReport) -> list[str]:
    groups = fp32_groups(report.plan.decisions)
    if not groups:
        return ["## Stays FP32", "", "Nothing: every node computes in low precision."]
    rows = [
        [
            f"{group.nodes:,}",
            fmt.percent(group.macs_share),
            escape(layers_text(group.layers)),
            escape(ops_text(group.ops)),
            escape(group.reason),
            escape(group.evidence),
            f"{code(group.rule)} {code(group.source)}",
        ]
        for group in groups
    ]
    header = ["nodes", "multiply-adds", "layers", "ops", "reason", "evidence", "rule"]
    return ["## Stays FP32", "", *table(header, rows, numbers="01")]


def _gaps(report: RunReport) -> list[str]:
    lines = [f"- {escape(gap.what)}: {escape(gap.reason)}" for gap in gaps(report)]
    return ["## Not checked", "", *lines] if lines else []


def _environment(report: RunReport) -> list[str]:
    model = report.model
    rows = [
        ("model", f"{model.model_class}, {fmt.count(model.parameters, 'parameter')}"),
        ("source", f"{model.source} ({model.digest})"),
        *(
            (name, "does not apply" if value is None else str(value))
            for name, value in report.environment
        ),
        ("amp-convert", report.amp_convert),
        ("created", report.created),
    ]
    cells = [[escape(name), escape(value)] for name, value in rows]
    return ["## Environment", "", *table(["", ""], cells)]
