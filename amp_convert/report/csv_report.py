"""layers.csv: one row a node of the eval plan, with its decision and its measured error.

Decisions and errors are joined by node identity; a node that was not measured has empty cells.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from amp_convert.report.format import printable
from amp_convert.report.model import RunReport

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
COLUMNS = _DECIDED + _MEASURED
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
    return csv_text(
        COLUMNS,
        (
            [getattr(decision, name) for name in _DECIDED]
            + [getattr(errors.get(decision.node), name, None) for name in _MEASURED]
            for decision in report.plan.decisions
        ),
    )
