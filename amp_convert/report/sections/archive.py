"""What a reader is told of the saved archive."""

from __future__ import annotations

from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport, Unchecked
from amp_convert.report.sections.summary import worst_output


def archive_text(report: RunReport) -> str:
    """The file and how near to FP32 it is as it was read back, in a sentence; "" where none was
    saved."""
    found = report.archive
    if isinstance(found, Unchecked):
        return ""
    said = [f"{found.file.path} ({fmt.size(found.file.bytes)})"]
    if found.failure:
        said.append(fmt.printable(found.failure))
    elif found.identical:
        said.append("gives the frozen model's bits")
    elif worst := worst_output(found.outputs):
        said.append(f"output error {fmt.error(worst.rel_l2)} against FP32")
    if found.file.fixed:
        fixed = ", ".join(map(fmt.printable, found.file.fixed))
        said.append(f"sizes that vary in the model, and not in it: {fixed}")
    return "; ".join(said)
