"""`Divergence`: what running a converted model beside its FP32 original showed. Plain data.

All errors are of the mixed model against FP32, summed in FP64 over all batches; see `compare`
for how they are measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NodeDivergence:
    """One node's errors against FP32. None where there is nothing to measure (integers, sizes).

    `local_rel_l2`, `max_ulp` (largest distance in representable steps of the low dtype) and
    `underflow_fraction` (elements that became zero) come from the node fed the reference's values;
    the rest from the node fed the mixed model's own. `nonfinite` counts elements that are not
    finite where the reference is; `overflow_fraction` is the share of those that became infinite.
    """

    node: str
    layer: str
    op: str
    dtype: str
    local_rel_l2: float | None
    accumulated_rel_l2: float | None
    sqnr_db: float | None
    cosine: float | None
    max_abs_err: float | None
    max_ulp: float | None
    nonfinite: int
    overflow_fraction: float | None
    underflow_fraction: float | None


@dataclass(frozen=True)
class OutputError:
    """One output's error against FP32, over all batches.

    For integer and boolean outputs only `elements` and `mismatches` count. Quantiles are of the
    absolute error, right to within 0.8 %.
    """

    name: str
    dtype: str
    elements: int
    rel_l2: float
    cosine: float
    max_abs_err: float
    ref_abs_max: float
    abs_err_p50: float
    abs_err_p90: float
    abs_err_p95: float
    abs_err_p99: float
    mismatches: int
    nonfinite: int
    ref_nonfinite: int


@dataclass(frozen=True)
class MetricPair:
    """One of the user's metrics for each arm: its mean over batches, weighted by batch size."""

    name: str
    fp32: float
    mixed: float
    autocast: float | None
    lower_is_better: bool


@dataclass(frozen=True)
class ArmCost:
    """Time and peak memory of one forward pass. `arm` is fp32, autocast, mixed or frozen."""

    arm: str
    milliseconds: float | None
    peak_bytes: int | None
    note: str


@dataclass(frozen=True)
class Divergence:
    """What running both models side by side showed.

    `reference_rel_l2` is the largest relative L2 difference, over all outputs and batches, between
    the captured FP32 graph, which is the reference, and the eager FP32 model; `frozen_identical`
    says whether the frozen model gave the mixed model's bits on the example inputs, None where that
    was not tried. `unvisited` names nodes that no batch reached. `outputs` has also what the model
    writes to its buffers and inputs. `autocast_outputs` are the errors of native `torch.autocast`
    at the same dtype, empty with a reason where it could not run; `metrics` are empty with a reason
    where the user gave none.
    """

    batches: int
    samples: int
    nodes: tuple[NodeDivergence, ...]
    outputs: tuple[OutputError, ...]
    autocast_outputs: tuple[OutputError, ...]
    autocast_reason: str
    metrics: tuple[MetricPair, ...]
    metrics_reason: str
    costs: tuple[ArmCost, ...]
    reference_rel_l2: float
    unvisited: tuple[str, ...] = ()
    frozen_identical: bool | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row a node, in graph order."""
        import pandas as pd

        columns = list(NodeDivergence.__dataclass_fields__)
        return pd.DataFrame([asdict(node) for node in self.nodes], columns=columns)
