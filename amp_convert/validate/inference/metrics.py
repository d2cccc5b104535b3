"""The user's metrics on the outputs of FP32, the mixed model and native autocast."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from amp_convert.core.batches import LOSS, MetricMeans, Score
from amp_convert.core.errors import ModelError
from amp_convert.validate.inference.metric_probe import MetricProbe
from amp_convert.validate.inference.results import MetricPair

FP32, MIXED, AUTOCAST = "fp32", "mixed", "autocast"


class Metrics:
    """The means over all batches, by arm."""

    def __init__(self, score: Score) -> None:
        self._score, self._means, self._probe = score, MetricMeans(), MetricProbe(score)

    def add_pair(self, reference: Any, mixed: Any, target: Any, size: int) -> None:
        """Score one batch of `size` samples, and see whether the metrics tell wrong outputs."""
        self._probe.try_batch(reference, target)
        self._means.add(FP32, self._score(reference, target), size)
        self._means.add(MIXED, self._scored(mixed, target), size)

    def add_autocast(self, outputs: Any, target: Any, size: int) -> None:
        """Score one batch of autocast's."""
        self._means.add(AUTOCAST, self._scored(outputs, target), size)

    def drop_autocast(self) -> None:
        """Forget autocast's scores: it does not run."""
        self._means.drop(AUTOCAST)

    def _scored(self, outputs: Any, target: Any) -> Mapping[str, float]:
        """The metrics of an arm other than FP32's; none where they refuse its outputs, such as NaN:
        then that arm lacks them on this batch."""
        try:
            return self._score(outputs, target)
        except ModelError:
            return {}

    def pairs(self, lower_is_better: frozenset[str]) -> tuple[MetricPair, ...]:
        """FP32's and the mixed model's metrics. Raises ModelError for a name in `lower_is_better`
        that no metric has."""
        means, names = self._means, self._means.names(FP32, MIXED)
        if names:
            _check_names(lower_is_better, names)
        return tuple(
            MetricPair(
                name=name,
                fp32=means.value(FP32, name),
                mixed=means.value(MIXED, name),
                autocast=means.complete(AUTOCAST).get(name),
                lower_is_better=name in lower_is_better,
                standard_error=means.standard_error(name, FP32, MIXED),
                spread=means.spread(FP32, name),
                unpaired=means.unpaired(name, FP32, MIXED),
                doubt=self._probe.doubt(name, varies=means.varies(FP32, name)),
            )
            for name in names
        )


def _check_names(lower_is_better: frozenset[str], known: Sequence[str]) -> None:
    """A metric whose name is misspelt would be judged upside down."""
    for name in sorted(lower_is_better - {*known, LOSS}):
        near = difflib.get_close_matches(name, known, n=1)
        mend = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
        raise ModelError(f"lower_is_better names {name}, which no metric is called", mend=mend)
