"""layers.csv: one row a node of the eval plan, with its decision and its measured error.

Decisions and errors are joined by node identity; a node that was not measured has empty cells. The
same goes for `grad_underflow_fraction`, the share of the nonzero FP32 gradients with respect to the
node's results that are under 2**-24: it is measured in the train graph, which has other nodes in
some places. `grad_rel_l2` and `grad_cosine` are those of all parameter gradients of the node's
layer together, the same in all rows of a layer.

The `onnx_` columns are those of an `OnnxNode`: the ONNX operators that the node became, how ONNX
Runtime runs them, and the errors against the converted PyTorch model. `output_rel_l2` is what the
node's own rounding adds to the error of the outputs, `error_share` its part of the sum of squares.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from amp_convert.attribute.results import Budget
from amp_convert.report.model import OnnxSection, RunReport
from amp_convert.report.text import printable
from amp_convert.validate.onnx.results import OnnxNode
from amp_convert.validate.training.results import TrainingParity

_DECIDED = ("node", "layer", "op", "dtype", "rule", "reason", "source")
_MEASURED = (
    "local_rel_l2",
    "accumulated_rel_l2",
    "sqnr_db",
    "cosine",
    "max_abs_err",
    "max_ulp",
    "nonfinite",
    "overflow_fraction",
    "underflow_fraction",
)
_LAYER_GRADIENT = {"grad_rel_l2": "rel_l2", "grad_cosine": "cosine"}
_GRADIENT = ("grad_underflow_fraction",)
_ONNX = {
    "onnx_ran": "ran",
    "onnx_local_rel_l2": "local_rel_l2",
    "onnx_accumulated_rel_l2": "accumulated_rel_l2",
}
_ATTRIBUTED = {"output_rel_l2": "rel_l2", "error_share": "share"}
COLUMNS = (*_DECIDED, *_MEASURED, *_LAYER_GRADIENT, *_GRADIENT, "onnx_ops", *_ONNX, *_ATTRIBUTED)
# What makes a spreadsheet take a cell for a formula (OWASP, CSV injection), full-width forms
# included.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """RFC 4180 text with "\\n" at line ends.

    Text cells that a spreadsheet would run get a leading apostrophe, control characters become
    escapes.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return ("'" if value.startswith(_FORMULA) else "") + printable(value)
    return repr(value)


def layers_csv(report: RunReport) -> str:
    """The text of layers.csv, in graph order."""
    errors = {row.node: row for row in report.inference.nodes} if report.inference else {}
    training = report.training
    gradients = training.gradients if isinstance(training, TrainingParity) else None
    layers = {row.layer: row for row in gradients.layers} if gradients else {}
    activations = {row.node: row for row in gradients.activations} if gradients else {}
    onnx = report.onnx.parity.nodes if isinstance(report.onnx, OnnxSection) else ()
    exported = {row.node: row for row in onnx}
    budget = report.attribution
    shares = {row.node: row for row in budget.nodes} if isinstance(budget, Budget) else {}
    return csv_text(
        COLUMNS,
        (
            [getattr(decision, name) for name in _DECIDED]
            + _fields(errors.get(decision.node), _MEASURED)
            + _fields(layers.get(decision.layer), _LAYER_GRADIENT.values())
            + _fields(activations.get(decision.node), _GRADIENT)
            + _onnx_fields(exported.get(decision.node))
            + _fields(shares.get(decision.node), _ATTRIBUTED.values())
            for decision in report.plan.decisions
        ),
    )


def _fields(row: object, names: Iterable[str]) -> list[str | float | None]:
    return [getattr(row, name, None) for name in names]


def _onnx_fields(row: OnnxNode | None) -> list[str | float | None]:
    return [" ".join(row.onnx_ops) if row else None, *_fields(row, _ONNX.values())]
