"""`Divergence`: what running a converted model beside its FP32 original showed. Plain data.

All errors are of the mixed model against FP32, summed in FP64 over all batches; see `compare`
for how they are measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from amp_convert.core.slices import SliceError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NodeDivergence:
    """One node's errors against FP32. None where there is nothing to measure (integers, sizes).

    `local_rel_l2`, `max_ulp` (largest distance in representable steps of the low dtype) and
    `underflow_fraction` (elements that became zero) come from the node fed the reference's values;
    the rest from the node fed the mixed model's own. `nonfinite` counts elements that are not
    finite where the reference is; `overflow_fraction` is the share of those that became infinite.
    `choices_changed` is the share of the indices of a node that ranks (topk, argmax) that are
    others than FP32's.
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
    choices_changed: float | None = None


class MetricDoubt(StrEnum):
    """Why a metric judges nothing."""

    CONSTANT = "constant"
    """It is the same for other outputs."""
    STATEFUL = "stateful"
    """It is another one for the same outputs, scored again."""


@dataclass(frozen=True)
class Misfit:
    """An output of one arm that the other has not, or has in another shape. Shapes are text such as
    "16 x 4"; "nothing" where an arm has no such output."""

    batch: int
    fp32: str
    mixed: str


@dataclass(frozen=True)
class OutputError:
    """One output's error against FP32, over all batches.

    For integer and boolean outputs only `elements` and `mismatches` count. Quantiles are of the
    absolute error, right to within 0.8 %. Elements of complex outputs count as one each.
    `ref_deviation_max` is the largest distance of a value from the mean of the first batch.
    `slices` are the worst ones of each kind, `misfits` the batches in which the arms differ in
    structure, the first of which is `misfit`. Where rows changed places among near-equal scores,
    they were put back before comparing; `moved` of `rows` they were. `noise_rel_l2` and
    `noise_max_abs` are the errors of FP32 itself, nudged by one ULP, None where that did not run.
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
    ref_deviation_max: float = math.inf
    slices: tuple[SliceError, ...] = ()
    misfits: int = 0
    misfit: Misfit | None = None
    rows: int = 0
    moved: int = 0
    noise_rel_l2: float | None = None
    noise_max_abs: float | None = None


@dataclass(frozen=True)
class MetricPair:
    """One of the user's metrics for each arm: its mean over batches, weighted by batch size.

    `standard_error` is that of the mean difference between both, from their differences batch by
    batch; None with fewer than two. `spread` is FP32's standard deviation from batch to batch, 0
    for a metric whose values all have one sign: relative to such a value a loss can be stated.
    `unpaired` counts the batches on which only one of the two has it; `doubt` says why its values
    mean nothing, "" where they do.
    """

    name: str
    fp32: float
    mixed: float
    autocast: float | None
    lower_is_better: bool
    standard_error: float | None = None
    spread: float = 0.0
    unpaired: int = 0
    doubt: MetricDoubt | None = None


@dataclass(frozen=True)
class ArmCost:
    """Time and peak memory of one forward pass. `arm` is fp32, autocast, mixed or frozen."""

    arm: str
    milliseconds: float | None
    peak_bytes: int | None
    note: str


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds that the operators of one layer took in each arm, timed one by one; None in
    autocast where that does not run the model. `module` is the class of the layer."""

    layer: str
    module: str
    fp32: float
    autocast: float | None
    mixed: float
    frozen: float


@dataclass(frozen=True)
class Unfit:
    """Batches that the graph does not take, for one reason; the original took them, under the plan,
    and the frozen model does not."""

    reason: str
    batches: int


@dataclass(frozen=True)
class PlanGap:
    """Calls of an operator in a layer of the eager model that the plan could not treat as it treats
    a node of the graph."""

    layer: str
    op: str
    calls: int


@dataclass(frozen=True)
class EagerPlanParity:
    """What the eager model under the plan (`plan.autocast`) gave for the first batch, beside the
    converted model. `identical` is whether the bits are the same, None where it did not run, with
    the `reason`; `rel_l2` the largest relative L2 difference of an output. Of the `calls` that read
    floating point values, `unplanned` are no node of the plan, and took the rule for their
    operator; `held_back` write in place to a value of another dtype than the plan has there."""

    identical: bool | None = None
    rel_l2: float | None = None
    reason: str = ""
    calls: int = 0
    unplanned: tuple[PlanGap, ...] = ()
    held_back: tuple[PlanGap, ...] = ()


class Stop(StrEnum):
    """Why batches were left out."""

    TIME = "time"
    ASKED = "asked"
    """The user asked for so many."""


@dataclass(frozen=True)
class Divergence:
    """What running both models side by side showed.

    Outputs and metrics rest on `batches` of `batches_given`, which is None where there are more
    than were counted, and `stopped` says why there are any; nodes on the first `node_batches`.
    `reference_rel_l2` is the largest relative L2 difference, over all outputs and batches, between
    the captured FP32 graph, which is the reference, and the eager FP32 model; `frozen_identical`
    says whether the frozen model gave the mixed model's bits, NaN being no bits, None where that
    was not tried. `unvisited` names nodes that no batch reached, or reached with no element,
    `untaken` those of them that are in a branch of a condition.
    `outputs` has also what the model writes to its buffers and inputs. `autocast_outputs` are the
    errors of native `torch.autocast` at the same dtype, empty with a reason where it could not run,
    `frozen_outputs` those of the frozen model, `untuned_outputs` those of the mixed model's graph
    before its kernels were tuned, which runs with gradients on; `metrics` are empty with a reason
    where the user gave none. `same_inputs` is whether all batches hold one and the same number
    throughout, as a placeholder of zeros does. `drawn_outside` names the generators outside of
    PyTorch ("Python", "NumPy") that the eager model draws from, `kept_state` the plain attributes
    that it changes from call to call. `parted_paths` counts the batches on which the mixed model
    called the captured parts another number of times, or in another order; `behind_parting` are
    those of `unvisited` that both called, but only behind the point where they parted.
    `slow_kernels` says why no speed can be expected of the low dtype on the device, "" where it
    can. Where it was asked for, `folded_outputs` and `folded_metrics` are those of the frozen model
    with BatchNorm folded, whose metric is then what `mixed` says; `layer_times` are the times of
    each layer, where those were. `eager_plan` is what the plan on the eager model gave, `unfit`
    tells the batches that no graph takes.
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
    untaken: tuple[str, ...] = ()
    frozen_identical: bool | None = None
    frozen_outputs: tuple[OutputError, ...] = ()
    untuned_outputs: tuple[OutputError, ...] = ()
    folded_outputs: tuple[OutputError, ...] = ()
    folded_metrics: tuple[MetricPair, ...] = ()
    batches_given: int | None = 0
    stopped: Stop | None = None
    node_batches: int = 0
    same_inputs: bool = False
    drawn_outside: tuple[str, ...] = ()
    kept_state: tuple[str, ...] = ()
    parted_paths: int = 0
    behind_parting: tuple[str, ...] = ()
    slow_kernels: str = ""
    layer_times: tuple[LayerTime, ...] = ()
    eager_plan: EagerPlanParity | None = None
    unfit: tuple[Unfit, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row a node, in graph order."""
        import pandas as pd

        columns = list(NodeDivergence.__dataclass_fields__)
        return pd.DataFrame([asdict(node) for node in self.nodes], columns=columns)
