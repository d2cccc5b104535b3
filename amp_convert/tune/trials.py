"""One plan tried: converted, run beside FP32 on the batches, and timed as it would be deployed."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Budget
from amp_convert.capture.captured import Captured
from amp_convert.core import device as devices
from amp_convert.core.batches import Batch, MetricMeans, Score, batch_size
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.core.tensor_errors import larger
from amp_convert.core.tree_paths import map_tensors
from amp_convert.profile.calibrate import RangeStats
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.rule import LOSS_LIMITS, Category, Rule, Target
from amp_convert.rules.rule_set import Rules
from amp_convert.tune.results import Point, Unit
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.output_errors import OutputSums, accumulate
from amp_convert.validate.inference.reordered import row_matcher

TURNS = 7
"""How often a plan is timed; once, where prices are not measured."""
FP32 = "fp32"
REASON = "kept in FP32 by amp-convert tune"


def without_loss_guards(rules: Rules) -> Rules:
    """The rules with every guard of precision loss switched off; those of the range stay."""
    return replace(rules, guards=replace(rules.guards, **dict.fromkeys(LOSS_LIMITS, False)))


class Bench:
    """Tries plans of one captured model on a few batches."""

    def __init__(
        self,
        captured: Captured,
        rules: Rules,
        stats: RangeStats,
        dtype: torch.dtype,
        batches: Sequence[Batch],
        score: Score,
        turns: int = TURNS,
    ) -> None:
        self._turns = turns
        self._captured, self._stats, self._dtype = captured, stats, dtype
        self._given, self._lowest = rules, without_loss_guards(rules)
        self._batches, self._score = batches, score
        self._references: list[Any] = []
        self._state = rng_state(captured.device)
        self._fp32: Mapping[str, float] = {}
        self.points: dict[frozenset[str], Point] = {}
        """Every plan that was tried, by the units that it keeps."""

    def given(self) -> Point:
        """The user's own plan."""
        converted = convert_captured(self._captured, self._given, self._stats, self._dtype)
        return self._measured(converted, (), 0.0, 0.0)

    def lowest(self) -> ConvertedModel:
        """The plan in which nothing is kept in FP32 for loss of precision."""
        return convert_captured(self._captured, self._lowest, self._stats, self._dtype)

    def budget(self, converted: ConvertedModel) -> Budget:
        """The error budget of a plan on the first batch."""
        args, kwargs, _ = self._batches[0]
        return attribute(converted, args, kwargs, floor=False, casts=True)

    def fp32_metrics(self) -> tuple[tuple[str, float], ...]:
        """The user's metrics of FP32."""
        return tuple(self._fp32.items())

    def tried(
        self, kept: Collection[str], units: Sequence[Unit], predicted: float, price: float
    ) -> Point:
        """The plan that keeps these units in FP32; each is measured once."""
        key = frozenset(kept)
        if key not in self.points:
            nodes = [n for unit in units if unit.name in key for n in unit.nodes]
            rank = 1 + max((rule.rank for rule in self._lowest.rules), default=0)
            rules = replace(
                self._lowest, rules=(*self._lowest.rules, *(_keeping(n, rank) for n in nodes))
            )
            converted = convert_captured(self._captured, rules, self._stats, self._dtype)
            names = tuple(unit.name for unit in units if unit.name in key)
            self.points[key] = self._measured(converted, names, predicted, price)
        return self.points[key]

    def _measured(
        self, converted: ConvertedModel, names: tuple[str, ...], predicted: float, price: float
    ) -> Point:
        self._run_fp32(converted)
        sums: dict[str, OutputSums] = {}
        means = MetricMeans()
        for (args, kwargs, target), reference in zip(self._batches, self._references, strict=True):
            outputs = self._called(converted, converted, args, kwargs)
            accumulate(
                sums, reference, outputs, matcher=row_matcher(converted, batch_size(args, kwargs))
            )
            means.add("", self._score(outputs, target), batch_size(args, kwargs))
        plan = converted.plan
        return Point(
            units=names,
            predicted=predicted,
            price=price,
            error=_worst(sums),
            speedup=self._speedup(converted),
            share_macs_low=plan.share_macs_low(),
            metrics=tuple(means.of("").items()),
        )

    def _called(
        self, model: nn.Module, converted: ConvertedModel, args: Sequence[Any], kwargs: Any
    ) -> Any:
        """One call on copies, from one random state; what the model writes is put back."""
        set_rng_state(self._captured.device, self._state)
        with evaluating(converted):
            return model(*_copied(args), **_copied(dict(kwargs)))

    def _run_fp32(self, converted: ConvertedModel) -> None:
        """FP32's outputs and metrics, once."""
        if self._references:
            return
        means, model = MetricMeans(), self._captured.model
        for args, kwargs, target in self._batches:
            reference = self._called(model, converted, args, kwargs)
            self._references.append(map_tensors(torch.clone, reference))
            means.add(FP32, self._score(reference, target), batch_size(args, kwargs))
        self._fp32 = means.of(FP32)

    def _speedup(self, converted: ConvertedModel) -> float:
        """FP32's time over the frozen model's, in turns, on the first batch."""
        args, kwargs, _ = self._batches[0]
        device, frozen = self._captured.device, converted.freeze()
        times: dict[str, list[float]] = {FP32: [], "frozen": []}
        with evaluating(converted):
            for turn in range(self._turns + 1):
                for name, model in ((FP32, self._captured.model), ("frozen", frozen)):
                    call = partial(model, *_copied(args), **_copied(dict(kwargs)))
                    taken = devices.milliseconds(call, device)
                    if turn:
                        times[name].append(taken)
        return statistics.median(times[FP32]) / statistics.median(times["frozen"])


def _worst(sums: Mapping[str, OutputSums]) -> float:
    """The error of the worst output; of whole numbers the root of the share that differs."""
    error = 0.0
    for name, found in sums.items():
        row = found.row(name)
        if row.dtype.startswith(("float", "bfloat", "complex")):
            error = larger(error, row.rel_l2)
        elif row.elements:
            error = larger(error, (row.mismatches / row.elements) ** 0.5)
    return error


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


def _keeping(node: str, rank: int) -> Rule:
    return Rule(
        target=Target.NODE,
        pattern=node,
        category=Category.DENY,
        reason=REASON,
        dtype=None,
        device=None,
        mode=None,
        source="amp-convert tune",
        rank=rank,
    )
