"""`OnnxParity`: what running an exported ONNX file beside PyTorch showed. Plain data.

See `compare` for how it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from amp_convert.validate.inference.results import NodeDivergence, OutputError

if TYPE_CHECKING:
    import pandas as pd

Arm = Literal["fp32", "unoptimised", "optimised", "node by node"]
"""How a file was run. "fp32" is the FP32 model's own file, unoptimised: what ONNX Runtime and
PyTorch differ by without any conversion. "node by node" keeps every rounding that the file asks
for, which ONNX Runtime need not do."""


@dataclass(frozen=True)
class OnnxOutput:
    """One output of one run, over all its batches.

    `limit` is the largest absolute distance from the converted PyTorch model that counts as
    agreement: 4 times that of the FP32 file from FP32 PyTorch, and one ULP of the low dtype at the
    output's largest magnitude. None where that is not known, or where the FP32 file itself is more
    than such a ULP from FP32 PyTorch, as is then `agrees`; integers and
    booleans have no limit, and agree when they are equal.
    """

    against_fp32: OutputError
    against_converted: OutputError | None
    limit: float | None
    agrees: bool | None


@dataclass(frozen=True)
class OnnxRun:
    """One way of running a file. `failure` says why it did not run, or did so only `without` the
    optimisations named there; `lacks_kernel` that the provider at hand has no kernel for the dtype,
    which says nothing of the file."""

    arm: Arm
    failure: str
    without: tuple[str, ...]
    batches: int
    outputs: tuple[OnnxOutput, ...]
    lacks_kernel: bool = False

    @property
    def agrees(self) -> bool | None:
        """Whether all outputs do; None if one is not known to and none is known not to."""
        found = [output.agrees for output in self.outputs]
        if False in found:
            return False
        return True if found and None not in found else None


@dataclass(frozen=True, kw_only=True)
class OnnxNode(NodeDivergence):
    """One FX node's ONNX nodes, run one by one, against the same node of the converted PyTorch
    model; errors and dtype as in `NodeDivergence`, with PyTorch's converted model as the reference.

    `onnx_ops` are the operators that it became; empty if it became none. `ran` is how ONNX Runtime
    runs them in a session: "as written", "in float32" between casts, "rewritten" into others; ""
    where that is not known. `parts` says that the local result is further from PyTorch's than one
    ULP of its low dtype at its largest magnitude. FP32 results part beyond 2**-16 of that, and
    beyond 2**-22 of the largest magnitude that they were made of.
    """

    onnx_ops: tuple[str, ...]
    ran: str
    provider: str
    parts: bool


@dataclass(frozen=True)
class OnnxMetric:
    """One of the user's metrics: its mean over batches, weighted by batch size."""

    name: str
    fp32: float
    converted: float
    onnx: float
    lower_is_better: bool


@dataclass(frozen=True)
class OnnxParity:
    """What running an ONNX file showed.

    `ran` counts the file's low-precision nodes by how ONNX Runtime runs them, empty with a reason
    where that could not be found out. `node_batches` is the number of batches that `nodes` rest
    on; `unmatched` names FX nodes whose value is not in the file: it is constant there, or was
    only widened and narrowed again.
    `parting` is the first node that parts, `drifting` the first whose accumulated error would be
    parting, and `drawing` the first that draws random numbers, which are others in every runtime;
    "" if there is none. `metrics` were computed from the outputs of `metrics_arm`.
    """

    path: str
    dtype: str
    runtime: str
    providers: tuple[str, ...]
    batches: int
    samples: int
    runs: tuple[OnnxRun, ...]
    ran: Mapping[str, int]
    ran_reason: str
    nodes: tuple[OnnxNode, ...]
    node_batches: int
    unmatched: tuple[str, ...]
    parting: str
    drifting: str
    metrics: tuple[OnnxMetric, ...]
    metrics_arm: Arm | None
    drawing: str = ""

    @property
    def unrounded(self) -> str:
        """The first node that ONNX Runtime keeps in FP32, and whose roundings it may leave out; ""
        if there is none."""
        return next((row.node for row in self.nodes if row.ran == "in float32"), "")

    def run(self, arm: Arm) -> OnnxRun:
        """The run of that name."""
        return next(run for run in self.runs if run.arm == arm)

    def to_frame(self) -> pd.DataFrame:
        """One row a node, in graph order."""
        import pandas as pd

        columns = list(OnnxNode.__dataclass_fields__)
        return pd.DataFrame([asdict(node) for node in self.nodes], columns=columns)
