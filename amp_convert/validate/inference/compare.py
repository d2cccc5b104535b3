"""ConvertedModel -> `Divergence`: the mixed model held against its FP32 original in inference.

The first batches go through the FP32 graph and the mixed graph in step (see `lockstep`), which
shows each node's error. Outputs are those of both models as they are, within a time limit. Each
batch also goes through the eager FP32 model: a graph is right only for inputs on which the model
takes the path that was traced, so the reference itself is checked on each batch. And through native
`torch.autocast`, FP32 nudged by one ULP, the frozen model (and that with BatchNorm folded, where it
is asked for) and the user's metrics (see `other_arms`). Sums are kept, values are not, so nothing
grows with the number of batches. A batch that the graph does not take goes through the arms that
do: the original, and that under the plan.

Nodes are summed up in `node_errors`, outputs in `output_errors`; outputs are compared as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

from amp_convert.core.batches import Batch, Score
from amp_convert.core.progress import OnNode, unwatched
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.comparison import Comparison
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.other_arms import OtherArms
from amp_convert.validate.inference.results import (
    Divergence,
    Stop,
)

COUNT_SECONDS = 2.0
"""How long batches that are past the time limit are counted."""


def compare(
    converted: ConvertedModel,
    batches: Iterable[Batch],
    *,
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    metrics_reason: str = "no metrics were given",
    autocast: bool = True,
    fold_batch_norm: bool = False,
    node_batches: int | None = None,
    at_most: int | None = None,
    seconds: float = math.inf,
    on_batch: Callable[[], None] = lambda: None,
    on_node: OnNode = unwatched,
) -> Divergence:
    """Run both models on `batches` in eval mode, without gradients, and measure.

    Nodes are compared on the first `node_batches`, or on all; no batch is begun after the first
    `at_most`, nor after `seconds`, but for the first. `autocast` also runs the original under
    `torch.autocast`, `fold_batch_norm` the model that is frozen so. `on_batch` is called after each
    batch, `on_node` for each node that is compared. The model's training flags, buffers and random
    state are left as they were. Raises ModelError for a name in `lower_is_better` that no metric
    has, UsageError where the plan forbids to fold.
    """
    arms = OtherArms(converted, autocast=autocast, fold_batch_norm=fold_batch_norm)
    comparison = Comparison(converted, arms, score, node_batches, on_node)
    begin, given = time.perf_counter(), iter(batches)
    with evaluating(converted):
        for batch in given:
            late = comparison.batches > 0 and time.perf_counter() - begin > seconds
            if late or comparison.batches == at_most:
                comparison.left = _count(given)
                comparison.stopped = Stop.TIME if late else Stop.ASKED
                break
            comparison.add(*batch)
            on_batch()
    return comparison.result(lower_is_better, metrics_reason)


def _count(rest: Iterator[Batch]) -> int | None:
    """How many batches there are after the first one that was left out, with that one; None where
    counting takes too long: there may be no end."""
    begin, count = time.perf_counter(), 1
    for _ in rest:
        count += 1
        if time.perf_counter() - begin > COUNT_SECONDS:
            return None
    return count
