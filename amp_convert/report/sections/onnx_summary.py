"""What exporting to ONNX gave and running it showed, drawn once so that every writer says the same.

Of a run's outputs the row shows the largest relative errors, and the distance of the one output
that decides whether the run agrees: one that does not, else one that is not known to, else the one
nearest to its limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from amp_convert.onnx_file.write import OnnxModel, OnnxTensor
from amp_convert.report import text as fmt
from amp_convert.report.model import OnnxSection, RunReport
from amp_convert.report.sections.onnx_node_summary import (
    FirstNode,
    NodeRow,
    first_nodes,
    node_rows,
    worst_nodes,
)
from amp_convert.report.sections.summary import severity, worst_output
from amp_convert.validate.onnx.compare import FP32_FACTOR
from amp_convert.validate.onnx.results import Arm, OnnxOutput, OnnxParity, OnnxRun
from amp_convert.verdict.check import CheckStatus
from amp_convert.verdict.onnx_checks import converted_check

RUNS_TEXT = (
    "Relative L2 error of the worst output against FP32 PyTorch and against the converted PyTorch "
    "model. The largest absolute distance from the converted model may be up to "
    f"{FP32_FACTOR:g} times that of the FP32 file from FP32 PyTorch, plus one ULP. Node by node "
    "keeps every rounding that the file asks for, which ONNX Runtime need not do"
)

_ARMS: Mapping[Arm, str] = {
    "fp32": "FP32 file",
    "unoptimised": "unoptimised",
    "optimised": "optimised",
    "node by node": "node by node",
}
_AGREES = {True: "yes", False: "no", None: "unknown"}
_RAN = {
    "as written": "as written",
    "in float32": "in float32 between casts",
    "rewritten": "rewritten into other nodes",
}


@dataclass(frozen=True)
class Fact:
    """One thing about the file or its runs. `detail` is left out where room is short."""

    name: str
    value: str
    detail: bool = False


@dataclass(frozen=True)
class RunRow:
    """One run, formatted; an empty value does not apply. `output` names the output whose `distance`
    and `limit` are shown; `status` is how the verdict takes it that the run `agrees` or not."""

    arm: str
    batches: int
    against_fp32: str
    against_converted: str
    output: str
    distance: str
    limit: str
    agrees: str
    status: CheckStatus
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MetricRow:
    """One of the user's metrics, formatted."""

    name: str
    fp32: str
    converted: str
    onnx: str


@dataclass(frozen=True)
class OnnxSummary:
    """Everything that a writer shows. `title` is the file in one line."""

    title: str
    facts: tuple[Fact, ...]
    remarks: tuple[str, ...]
    runs: tuple[RunRow, ...]
    metrics: tuple[MetricRow, ...]
    metrics_text: str
    firsts: tuple[FirstNode, ...]
    worst: tuple[NodeRow, ...]


def onnx_summary(report: RunReport) -> OnnxSummary | None:
    """The summary; None when nothing was exported."""
    section = report.onnx
    if not isinstance(section, OnnxSection):
        return None
    model, parity = section.model, section.parity
    rows = node_rows(parity, report.plan.decisions)
    beyond = converted_check(parity).status
    arm = parity.metrics_arm
    return OnnxSummary(
        title=f"{model.path}, {fmt.size(model.bytes)}, opset {model.opset}",
        facts=(*_file_facts(model), *_run_facts(parity)),
        remarks=_remarks(model),
        runs=tuple(_run_row(run, beyond) for run in parity.runs),
        metrics=_metric_rows(parity),
        metrics_text=f"The metrics; ONNX Runtime's are those of the {_ARMS[arm]} run"
        if arm
        else "",
        firsts=first_nodes(parity, rows),
        worst=worst_nodes(rows.values()),
    )


# --- the file ---


def _file_facts(model: OnnxModel) -> list[Fact]:
    size = fmt.size(model.bytes)
    if model.external_data:
        size += f" with the weights in {model.external_data}"
    io_types = {"keep": "the model's", "low": f"{model.dtype} for the model's FP32"}
    nodes = ", ".join(
        f"{number:,} {dtype or 'of no known dtype'}"
        for dtype, number in model.nodes_by_dtype.items()
    )
    return [
        Fact("file", f"{model.path}, {size}", detail=True),
        Fact("opset", f"{model.opset}, written by {model.producer}", detail=True),
        Fact("inputs", _tensors(model.inputs)),
        Fact("outputs", _tensors(model.outputs)),
        Fact("their dtypes", io_types[model.io_types], detail=True),
        Fact("nodes", f"{model.nodes:,}: {nodes}" if nodes else f"{model.nodes:,}"),
        Fact("casts", f"{model.casts:,} between floating point dtypes"),
    ]


def _tensors(tensors: Iterable[OnnxTensor]) -> str:
    """ "input_ids int64 (batch, 7), mask float32 (batch, 7)"."""
    found = [f"{t.name} {t.dtype} ({', '.join(str(size) for size in t.shape)})" for t in tensors]
    return ", ".join(found) or "none"


def _remarks(model: OnnxModel) -> tuple[str, ...]:
    if not model.lost_state:
        return ()
    names = ", ".join(model.lost_state)
    return (f"the model writes to {names}, which a file cannot: its runs all start afresh",)


# --- the runs ---


def _run_facts(parity: OnnxParity) -> list[Fact]:
    batches = fmt.count(parity.batches, "batch", "batches")
    compared = fmt.count(len(parity.nodes), "node")
    compared += f" on {fmt.count(parity.node_batches, 'batch', 'batches')}"
    if parity.unmatched:
        constant = fmt.count(len(parity.unmatched), "more is", "more are")
        compared += f"; {constant} constant in the file"
    return [
        Fact("runtime", f"{parity.runtime} on {', '.join(parity.providers)}"),
        Fact("batches", f"{batches}, {fmt.count(parity.samples, 'sample')}", detail=True),
        Fact("node by node", compared, detail=True),
        Fact(f"{parity.dtype} nodes", _ran_text(parity)),
    ]


def _ran_text(parity: OnnxParity) -> str:
    """How ONNX Runtime runs the low-precision nodes, which need not be how they are written."""
    if parity.ran:
        return ", ".join(f"{parity.ran[how]:,} {_RAN[how]}" for how in _RAN if how in parity.ran)
    return f"not known how they run: {parity.ran_reason}" if parity.ran_reason else "none"


def _run_row(run: OnnxRun, beyond: CheckStatus) -> RunRow:
    """`beyond` is what the verdict makes of runs that do not agree."""
    fp32 = worst_output([output.against_fp32 for output in run.outputs])
    compared = [o.against_converted for o in run.outputs if o.against_converted is not None]
    converted = worst_output(compared)
    deciding = _deciding(run)
    distance = deciding.against_converted if deciding else None
    return RunRow(
        arm=_ARMS[run.arm],
        batches=run.batches,
        against_fp32=fmt.error(fp32.rel_l2) if fp32 else "",
        against_converted=fmt.error(converted.rel_l2) if converted else "",
        output=distance.name or "output" if distance else "",
        distance=fmt.error(distance.max_abs_err) if distance else "",
        limit=fmt.error(deciding.limit) if deciding else "",
        agrees="" if run.arm == "fp32" else _AGREES[run.agrees],
        status={True: CheckStatus.PASS, False: beyond, None: CheckStatus.UNCHECKED}[run.agrees],
        notes=_notes(run),
    )


def _deciding(run: OnnxRun) -> OnnxOutput | None:
    """The floating point output that `OnnxRun.agrees` rests on."""

    def rank(output: OnnxOutput) -> tuple[bool, bool, float]:
        error, limit = output.against_converted, output.limit
        distance = error.max_abs_err if error else None
        if distance is not None and limit:
            distance /= limit
        return output.agrees is False, output.agrees is None, severity(distance)

    floating = [
        output
        for output in run.outputs
        if output.against_converted is not None and "float" in output.against_converted.dtype
    ]
    return max(floating, key=rank, default=None)


def _notes(run: OnnxRun) -> tuple[str, ...]:
    notes = []
    if run.without:
        notes.append(f"runs only without {', '.join(run.without)}: {run.failure}")
    elif run.failure:
        notes.append(f"failed: {run.failure}")
    errors = [output.against_converted for output in run.outputs]
    notes += [
        f"{error.name or 'output'}: {error.mismatches:,} of {error.elements:,} elements differ"
        for error in errors
        if error is not None and "float" not in error.dtype and error.mismatches
    ]
    return tuple(notes)


def _metric_rows(parity: OnnxParity) -> tuple[MetricRow, ...]:
    return tuple(
        MetricRow(
            metric.name + (" (lower is better)" if metric.lower_is_better else ""),
            fmt.number(metric.fp32),
            fmt.number(metric.converted),
            fmt.number(metric.onnx),
        )
        for metric in parity.metrics
    )
