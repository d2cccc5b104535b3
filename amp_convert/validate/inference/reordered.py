"""Rows that only changed places among near-equal scores: they are put back before comparing.

A model that ranks (topk, sort, argmax) gives its rows in the order of their scores. Where two
scores are as good as equal, any rounding swaps the rows, and an error of the whole tensor calls
that a failure, though every row is there. So rows are matched: outputs that share their rows
(boxes, scores and labels of the same detections) are looked at together. A row may stand in another
place only where all of these hold:

1. One column is sorted along the rows in FP32: it is the score.
2. Every number of the row is that of the FP32 row, to within `NEAR` roundings of its column's
   largest magnitude; every integer is the same.
3. The FP32 scores of both places are equal to within that as well.

Whatever does not match stays where it is, and counts as the error that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from amp_convert.core.number_formats import from_name, unit_roundoff
from amp_convert.core.op_facts import Family, facts_of
from amp_convert.rewrite.converted_model import ConvertedModel

NEAR = 16.0
_MOST_ROWS = 4096
Tensors = Mapping[str, torch.Tensor]


class RowMatcher:
    """Puts rows of a model's outputs back in the order of the reference; `low` is the dtype whose
    roundings are allowed for, `samples` the size of the batch: its dimension is never reordered."""

    def __init__(self, low: torch.dtype, samples: int) -> None:
        self._near, self._samples = NEAR * unit_roundoff(low), samples

    def matched(
        self, reference: Mapping[str, Any], value: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """The values with their rows put back; and for each output whose rows are in the order of a
        score, how many there are, and how many had changed places."""
        found, counts = dict(value), dict[str, tuple[int, int]]()
        for axis, names in self._groups(reference, value):
            order = self._order(
                [reference[name] for name in names], [value[name] for name in names], axis
            )
            if order is None:
                continue
            moved = int((order != torch.arange(order.shape[1])).sum())
            for name in names:
                counts[name] = order.numel(), moved
                if moved:
                    found[name] = _permuted(value[name], order, axis)
        return found, counts

    def _groups(
        self, reference: Mapping[str, Any], value: Mapping[str, Any]
    ) -> list[tuple[int, list[str]]]:
        """Outputs that share their rows, by the axis of these."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, want in reference.items():
            have = value.get(name)
            if not (isinstance(want, torch.Tensor) and isinstance(have, torch.Tensor)):
                continue
            if want.shape != have.shape or want.is_complex() or not want.numel():
                continue
            axis = 1 if want.dim() and want.shape[0] == self._samples else 0
            if want.dim() > axis and 1 < want.shape[axis] <= _MOST_ROWS:
                groups.setdefault(tuple(want.shape[: axis + 1]), []).append(name)
        return [(len(shape) - 1, names) for shape, names in groups.items()]

    def _order(
        self, reference: list[torch.Tensor], value: list[torch.Tensor], axis: int
    ) -> torch.Tensor | None:
        """For each sample and place, where the row of the reference is in the value; None where
        no score says in which order they are."""
        want, have = (_rows(tensors, axis) for tensors in (reference, value))
        if not bool(torch.isfinite(want).all()):
            return None
        whole = _rows([torch.full_like(t, float(not t.is_floating_point()), dtype=torch.float64)
                       for t in reference], axis)[0, 0].bool()  # fmt: skip
        limit = self._near * want.abs().amax((0, 1)).masked_fill(whole, 0)
        scores = [c for c in range(want.shape[2]) if not whole[c] and _is_sorted(want[:, :, c])]
        if not scores:
            return None
        order = torch.arange(want.shape[1]).repeat(want.shape[0], 1)
        for sample in range(want.shape[0]):
            self._match(want[sample], have[sample], limit, scores, order[sample])
        return order

    @staticmethod
    def _match(
        want: torch.Tensor,
        have: torch.Tensor,
        limit: torch.Tensor,
        scores: list[int],
        order: torch.Tensor,
    ) -> None:
        """Write into `order` where the rows of one sample are."""
        rows = torch.nonzero(~((have - want).abs() <= limit).all(1)).flatten()
        if len(rows) < 2:
            return
        near = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        for c in scores:
            near |= (want[rows, c][None] - want[rows, c][:, None]).abs() <= limit[c]
        options = [
            [j for j in torch.nonzero(near[i]).flatten().tolist()
             if bool(((have[rows[j]] - want[rows[i]]).abs() <= limit).all())]
            for i in range(len(rows))
        ]  # fmt: skip
        found: dict[int, int] = {}
        for i in sorted(range(len(rows)), key=lambda i: len(options[i])):
            free = [j for j in options[i] if j not in found]
            if not free:
                return  # no row may be lost, or stand in two places
            found[free[0]] = i
        for j, i in found.items():
            order[rows[i]] = rows[j]


def row_matcher(converted: ConvertedModel, samples: int) -> RowMatcher | None:
    """What puts the rows of a batch of `samples` back; None for a model in which nothing ranks.
    What was not captured may."""
    plan, whole = converted.plan, converted.captured.is_whole
    ranks = any(facts_of(decision.op).is_a(Family.RANKING) for decision in plan.eval)
    return RowMatcher(from_name(plan.dtype), samples) if ranks or not whole else None


def _rows(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    """(samples, rows, columns) in FP64."""
    flat = []
    for tensor in tensors:
        led = tensor.detach().cpu().double()
        led = led if axis else led[None]
        flat.append(led.reshape(led.shape[0], led.shape[1], -1))
    return torch.cat(flat, 2)


def _is_sorted(column: torch.Tensor) -> bool:
    """Whether the rows of every sample are in the order of a column that says something."""
    steps = column.diff(dim=1)
    return bool((steps <= 0).all() or (steps >= 0).all()) and bool((steps != 0).any())


def _permuted(tensor: torch.Tensor, order: torch.Tensor, axis: int) -> torch.Tensor:
    order = order.to(tensor.device)
    if not axis:
        return tensor[order[0]]
    samples = torch.arange(order.shape[0], device=tensor.device)[:, None]
    return tensor[samples, order]
