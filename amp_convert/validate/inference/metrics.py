"""The user's metrics on the outputs of FP32, the mixed model and native autocast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amp_convert.core.batches import LOSS, MetricMeans, Score
from amp_convert.core.errors import ModelError
from amp_convert.core.spelling import nearest
from amp_convert.validate.inference.metric_probe import MetricProbe
from amp_convert.validate.inference.results import MetricPair

FP32, MIXED, AUTOCAST, FOLDED = "fp32", "mixed", "autocast", "folded"


class Metrics:
    """The means over all batches, by arm."""

    def __init__(self, score: Score) -> None:
        self._score, self._means, self._probe = score, MetricMeans(), MetricProbe(score)

    def add_pair(self, reference: Any, mixed: Any, target: Any, size: int) -> None:
        """Score one batch of `size` samples, and see whether the metrics tell wrong outputs."""
        self._probe.try_batch(reference, target)
        self._means.add(FP32, self._score(reference, target), size)
        self.add(MIXED, mixed, target, size)

    def add(self, arm: str, outputs: Any, target: Any, size: int) -> None:
        """Score one batch of an arm other than FP32."""
        self._means.add(arm, self._scored(outputs, target), size)

    def drop(self, arm: str) -> None:
        """Forget the scores of an arm that does not run."""
        self._means.drop(arm)

    def _scored(self, outputs: Any, target: Any) -> Mapping[str, float]:
        """The metrics of an arm other than FP32's; none where they refuse its outputs, such as NaN:
        then that arm lacks them on this batch."""
        try:
            return self._score(outputs, target)
        except ModelError:
            return {}

    def pairs(self, lower_is_better: frozenset[str], arm: str = MIXED) -> tuple[MetricPair, ...]:
        """FP32's metrics and those of the mixed model or another `arm`; none where that was not
        run. Raises ModelError for a name in `lower_is_better` that no metric has."""
        means = self._means
        names = means.names(FP32, arm) if means.names(arm) or arm == MIXED else []
        if names:
            _check_names(lower_is_better, names)
        return tuple(
            MetricPair(
                name=name,
                fp32=means.value(FP32, name),
                mixed=means.value(arm, name),
                autocast=means.complete(AUTOCAST).get(name),
                lower_is_better=name in lower_is_better,
                standard_error=means.standard_error(name, FP32, arm),
                spread=means.spread(FP32, name),
                unpaired=means.unpaired(name, FP32, arm),
                doubt=self._probe.doubt(name, varies=means.varies(FP32, name)),
            )
            for name in names
        )


def _check_names(lower_is_better: frozenset[str], known: Sequence[str]) -> None:
    """A metric whose name is misspelt would be judged upside down."""
    for name in sorted(lower_is_better - {*known, LOSS}):
        near = nearest(name, known)
        mend = f"Did you mean {near}?" if near else f"There are: {', '.join(known)}."
        raise ModelError(f"lower_is_better names {name}, which no metric is called", mend=mend)
