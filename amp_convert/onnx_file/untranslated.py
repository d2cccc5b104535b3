"""What to tell a user when the exporter does not know an operator.

The exporter names the operator that it stumbles over, which is often none of the model's own: it
has decomposed the model's operators first (`torch.cumprod` becomes `prims.prod`, among others). The
node itself is still in the frames that the exception came through, and its mark tells which
operator of the model it came from, and from which line.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence

from torch import fx

from amp_convert.capture.captured import Region
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.errors import UnsupportedModelError, first_line
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import short_name
from amp_convert.onnx_file.labels import MARK

# Its words: Error when translating node %name : [...] = call_function[target=torch.ops.OP](
_STUMBLED = re.compile(r"translating node %(\w+) .*?\[target=(?:torch\.ops\.)?([\w.]+)\]")
_UNKNOWN = "No ONNX function"


def untranslated(region: Region, error: Exception) -> UnsupportedModelError:
    """What the exporter says, with the operator, layer and line that the model's author wrote."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    what, where = first_line(causes[-1]), ""
    mend = "Write that part of the model with other operators."
    if found := _STUMBLED.search(" ".join(map(str, causes))):
        name, op = found.groups()
        info = _origin(region, name, causes)
        if info is not None:
            where = f"{info.layer} {info.location}".strip()
        if what.startswith(_UNKNOWN):
            own = short_name(info.op) if info is not None else op
            what = f"the operator {own} has no translation to ONNX"
            if info is not None and own != short_name(op):
                what += f" (PyTorch makes {short_name(op)} of it)"
            mend = "Write it with other operators there, or leave --onnx out."
    return UnsupportedModelError(
        f"this model cannot be written as ONNX: {what}", where=where, mend=mend
    )


def _origin(region: Region, name: str, errors: Sequence[BaseException]) -> NodeInfo | None:
    """The node of the model that the exporter's node of this name came from, if it can be found."""
    infos = region.graphs[Mode.EVAL].nodes
    for error in errors:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, fx.Node) and value.name == name:
                    mark = value.meta.get("custom", {}).get(MARK, "")
                    if mark in infos:
                        return infos[mark]
    return None
