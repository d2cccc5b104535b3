"""What the exporter says where an operator has no translation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from amp_convert.capture.captured import Region
from amp_convert.core.errors import UnsupportedModelError, first_line
from amp_convert.core.mode import Mode

if TYPE_CHECKING:
    pass


def untranslated(region: Region, error: Exception) -> UnsupportedModelError:
    """What the exporter says, with the layer and line of the operator that it stumbles over."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    what = first_line(causes[-1])
    where = ""
    # Its words: Error when translating node %name : [...] = call_function[target=torch.ops.OP](
    stumbled = r"translating node %(\w+) .*?\[target=torch\.ops\.([\w.]+)\]"
    if found := re.search(stumbled, " ".join(map(str, causes))):
        info = region.graphs[Mode.EVAL].nodes.get(found[1])
        if info is not None and info.op == found[2]:
            where = f"{info.layer} {info.location}".strip()
        if what.startswith("No ONNX function"):
            what = f"the operator {found[2]} has no translation to ONNX"
    return UnsupportedModelError(
        f"this model cannot be written as ONNX: {what}",
        where=where,
        mend="Write that part of the model with other operators.",
    )
