"""A converted model and a batch -> `Budget`: the share of each node in the outputs' error.

1. Both graphs run in step, and give each node's own error (`reference`, `local_errors`).
2. Backward passes from random projections of the outputs give each error its weight (`adjoint`).
3. The sum is held against the error that the converted model really has. Where the two part by more
   than a factor of two, or where a node that ranks chooses others, first order does not hold: the
   first nodes, and those that the ranking ones rank by, are tried one at a time (`trials`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.attribute.adjoint import NoGradientError, Projections, Target, project
from amp_convert.attribute.local_errors import Site
from amp_convert.attribute.reference import Ran, Reference
from amp_convert.attribute.results import HOLDS, Budget, Doubt, NodeShare, root_of_squares
from amp_convert.attribute.shares import rows_of, rows_of_sizes, signed
from amp_convert.capture.captured import Value
from amp_convert.core import device as devices
from amp_convert.core.batches import batch_size
from amp_convert.core.errors import (
    AmpConvertError,
    UnsupportedModelError,
    first_line,
    refuse_environment,
)
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.core.tree_paths import named_leaves
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.output_errors import as_real
from amp_convert.validate.inference.reordered import row_matcher

_log = logging.getLogger(__name__)
LEAST_VECTORS, MOST_VECTORS, PROJECTIONS = 8, 32, 128
"""How many backward passes there are by default: as many as make so many projections, one a vector
and sample, within these bounds."""
_LEAST_NORM = 1e-37
"""An output of a smaller norm is nothing to be relative to."""
TRIED = 10
"""How many nodes are tried one at a time where first order does not hold."""


def attribute(
    converted: ConvertedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    vectors: int | None = None,
    seed: int = 0,
    floor: bool = True,
    casts: bool = False,
) -> Budget:
    """The error budget of `converted` for the call `converted(*args, **kwargs)`, in eval mode.

    `vectors` backward passes through the FP32 graph are run, by default 8, and up to 32 for a batch
    of few samples; with `floor` each node is measured in FP64 as well, with `casts` so is what
    casting its FP32 result would add. The same seed gives the same budget. The model, its buffers
    and the random state are left as they were. Where no gradient reaches an output, nodes are tried
    one at a time. Raises UnsupportedModelError where what is held for the gradients would not fit
    into memory, and where the model fails with gradients on.
    """
    samples = max(batch_size(args, kwargs), 1)
    if vectors is None:
        vectors = min(max(math.ceil(PROJECTIONS / samples), LEAST_VECTORS), MOST_VECTORS)
    with _as_unsupported(), evaluating(converted):
        _refuse_large(converted, args, kwargs, 1 + floor + casts)
        reference = Reference(converted, floor=floor, casts=casts)
        return _Attribution(converted, reference, args, kwargs).budget(vectors, seed)


@contextlib.contextmanager
def _as_unsupported() -> Iterator[None]:
    """Kernels and eager code that never ran with gradients on may refuse."""
    try:
        yield
    except (AmpConvertError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        refuse_environment(error)
        _log.warning("the error could not be attributed", exc_info=True)
        raise UnsupportedModelError(
            f"the FP32 model fails with gradients on: {first_line(error)}",
            mend="The nodes' own errors are in layers.csv.",
        ) from error


class _Attribution:
    """One call; `samples` are in it."""

    def __init__(
        self,
        converted: ConvertedModel,
        reference: Reference,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._reference, self._args, self._kwargs = reference, args, kwargs
        self._decisions = {decision.node: decision for decision in converted.plan.eval}
        self._ran: Ran = reference.run(args, kwargs)
        self._outputs, self._targets = _targets(self._ran.outputs)
        self._samples = max(batch_size(args, kwargs), 1)
        self._matcher = row_matcher(converted, self._samples)

    def budget(self, vectors: int, seed: int) -> Budget:
        measured = self._error(self._ran.mixed)
        doubts: tuple[Doubt, ...] = (Doubt.NO_GRADIENT,)
        found: Projections | None = None
        try:
            found = project(self._ran.sites, self._targets, self._samples, vectors, seed)
        except NoGradientError:
            vectors, rows = 0, self._by_trials()
            predicted = root_of_squares(row.rel_l2 for row in rows)
        else:
            vectors = found.vectors or vectors
            rows = rows_of(self._ran.sites, found)
            predicted = root_of_squares(row.rel_l2 for row in rows)
            doubts = self._doubts(predicted, measured)
            if doubts:
                wanted = [row.node for row in _ranked(rows)[:TRIED] if row.rel_l2]
                tried = self._trials([*wanted, *self._ran.ranked_by[:TRIED]])
                rows = [replace(row, trial_rel_l2=tried.get(row.node)) for row in rows]
        floors = any(row.floor_rel_l2 is not None for row in rows)
        known = {target.name for target in self._targets}
        return Budget(
            vectors=vectors,
            seed=seed,
            samples=self._samples,
            outputs=tuple(target.name for target in self._targets),
            left_out=tuple(name for name in self._outputs if name not in known),
            predicted_rel_l2=predicted,
            first_order_rel_l2=signed(found.errors) if found is not None else math.nan,
            measured_rel_l2=measured,
            floor_rel_l2=signed(found.floors) if found is not None and floors else None,
            doubts=doubts,
            nodes=tuple(self._named(row) for row in _ranked(rows) if _says_something(row)),
        )

    def _by_trials(self) -> list[NodeShare]:
        """The rows where no gradient tells: of the nodes whose own error is largest."""
        sites = [site for site in self._ran.sites if site.error is not None]
        sites.sort(key=lambda site: -_relative(site))
        wanted = [*dict.fromkeys(site.node for site in sites)][:TRIED]
        tried = self._trials([*wanted, *self._ran.ranked_by[:TRIED]])
        return [replace(row, trial_rel_l2=row.rel_l2) for row in rows_of_sizes(tried)]

    def _doubts(self, predicted: float, measured: float) -> tuple[Doubt, ...]:
        doubts = []
        if math.isinf(predicted) or not math.isfinite(measured):
            doubts.append(Doubt.NONFINITE)
        elif not measured / HOLDS <= predicted <= measured * HOLDS:
            doubts.append(Doubt.ADDITIVITY)
        if self._ran.ranked_by:
            doubts.append(Doubt.CHOICES)
        return tuple(doubts)

    def _error(self, outputs: Any) -> float:
        """The error of the user's outputs. A whole number is right or wrong."""
        have = dict(named_leaves(outputs))
        if self._matcher is not None:  # rows that changed places among near-equal scores
            have, _ = self._matcher.matched(dict(named_leaves(self._ran.outputs)), have)
        errors = []
        for target in self._targets:
            value, wanted = have.get(target.name), target.value.detach()
            if not isinstance(value, torch.Tensor):
                return math.inf
            value = _real(value.detach())
            if value.shape != wanted.shape:
                return math.inf
            if wanted.is_floating_point():
                difference = torch.where(
                    wanted.isfinite(), value.double() - wanted.double(), torch.zeros_like(wanted)
                )
                size = float(difference.double().norm())
            else:
                size = math.sqrt(int((value != wanted).sum()))
            errors.append(size / target.norm)
        return root_of_squares(errors)

    def _trials(self, wanted: Iterable[str]) -> dict[str, float]:
        """The error of the outputs with the rounding of each of these nodes alone."""
        by_node: dict[str, list[Site]] = {}
        for site in self._ran.sites:
            by_node.setdefault(site.node, []).append(site)
        return {
            name: self._error(self._reference.shifted(self._args, self._kwargs, by_node[name]))
            for name in dict.fromkeys(wanted)
        }

    def _named(self, row: NodeShare) -> NodeShare:
        """A row with what the plan says of its node."""
        decision = self._decisions[row.node]
        return replace(row, layer=decision.layer, op=decision.op, dtype=decision.dtype)


def _refuse_large(
    converted: ConvertedModel, args: Sequence[Any], kwargs: Mapping[str, Any], each: int
) -> None:
    """Backward passes keep every value, and there are `each` tensors more of its size."""
    captured = converted.captured
    free = devices.free_bytes(captured.device)
    example = max(batch_size(captured.args, captured.kwargs), 1)
    held = sum(
        4 * math.prod(value.shape)
        for region in captured.regions
        for node in region.graphs[Mode.EVAL].graph_module.graph.nodes
        if node.op == "call_function" and not facts_of_target(node.target).is_a(Family.SHAPE)
        for value in pytree.tree_leaves(region.traces[Mode.EVAL].values.get(node.name))
        if isinstance(value, Value) and value.dtype.is_floating_point
    )
    needed = held * batch_size(args, kwargs) // example * (1 + each)
    if free is not None and needed > free:
        raise UnsupportedModelError(
            f"the gradients of one batch would take {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free",
            mend="Give a first batch of fewer samples.",
        )


def _targets(outputs: Any) -> tuple[list[str], list[Target]]:
    """The names of all outputs, and those that an error is relative to: of real numbers, or, where
    there are none, all others."""
    leaves = named_leaves(outputs)
    tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
    floating = [(name, _real(leaf)) for name, leaf in tensors if _is_number(leaf)]
    real = [
        Target(name, leaf, norm) for name, leaf in floating if (norm := _norm(leaf)) > _LEAST_NORM
    ]
    differentiable = [target for target in real if target.value.requires_grad]
    whole = [
        Target(name, leaf, math.sqrt(leaf.numel()))
        for name, leaf in tensors
        if not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel()
    ]
    return [name for name, _ in tensors], differentiable or real or whole


def _relative(site: Site) -> float:
    """The site's own error, relative to its value."""
    assert site.error is not None
    size = _norm(site.error) / (_norm(site.value) or 1.0)
    return math.inf if math.isnan(size) else size


def _norm(value: torch.Tensor) -> float:
    """The norm of what is finite."""
    finite = torch.where(value.isfinite(), value.detach(), torch.zeros_like(value.detach()))
    return float(finite.double().norm())


def _real(value: torch.Tensor) -> torch.Tensor:
    """A complex value as pairs of reals, with its history."""
    with torch.enable_grad():
        return as_real(value) if value.is_complex() else value


def _is_number(leaf: torch.Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _says_something(row: NodeShare) -> bool:
    return bool(row.rel_l2 or row.floor_rel_l2 or row.trial_rel_l2 or row.cast_rel_l2)


def _ranked(rows: Iterable[NodeShare]) -> list[NodeShare]:
    """The largest first: by what was measured, where a node was tried."""
    return sorted(
        rows, key=lambda row: -(row.rel_l2 if row.trial_rel_l2 is None else row.trial_rel_l2)
    )
