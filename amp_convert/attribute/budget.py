"""A converted model and a batch -> `Budget`: the share of each node in the outputs' error.

1. Both graphs run in step, and give each node's own error (`local_errors`).
2. Backward passes from random projections of the outputs give each error its weight (`adjoint`).
3. The sum is held against the error that the converted model really has. Where the two part by more
   than a factor of two, or where a node that ranks chooses others, first order does not hold: the
   first nodes, and those that the ranking ones rank by, are tried one at a time (`trials`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.attribute.adjoint import NoGradientError, Projections, Target, project
from amp_convert.attribute.local_errors import LocalErrors, Site, local_errors
from amp_convert.attribute.results import HOLDS, Budget, Doubt, NodeShare, root_of_squares
from amp_convert.attribute.trials import outputs_with
from amp_convert.capture.captured import Value
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.core import device as devices
from amp_convert.core.batches import batch_size
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.core.tree_paths import named_leaves
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.insert_casts import Rewritten
from amp_convert.validate.inference.evaluating import evaluating

LEAST_VECTORS, MOST_VECTORS, PROJECTIONS = 8, 32, 128
"""How many backward passes there are: as many as make so many projections, one a vector and
sample."""
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
    one at a time.
    Raises UnsupportedModelError for a model that was captured in parts, and where what is held for
    the gradients would not fit into memory.
    """
    if not converted.captured.is_whole:
        raise UnsupportedModelError(
            "the error cannot be attributed in a model that was captured in parts",
            mend="See the parts' nodes in layers.csv: each has its own local error.",
        )
    with evaluating(converted):
        if vectors is None:
            needed = math.ceil(PROJECTIONS / max(batch_size(args, kwargs), 1))
            vectors = min(max(needed, LEAST_VECTORS), MOST_VECTORS)
        found = _Attribution(converted, vectors, seed, floor=floor, casts=casts)
        return found.run(args, kwargs)


class _Attribution:
    def __init__(
        self, converted: ConvertedModel, vectors: int, seed: int, *, floor: bool, casts: bool
    ) -> None:
        self._converted, self._vectors, self._seed = converted, vectors, seed
        self._floor, self._casts = floor, casts
        self._rewritten: Rewritten = converted.rewritten[""][Mode.EVAL]
        region = converted.captured.regions[0]
        self._runner: GraphRunner = region.runner(Mode.EVAL)
        self._graph = region.graphs[Mode.EVAL].graph_module

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Budget:
        self._refuse_large(args, kwargs)
        inputs = self._runner.inputs(args, kwargs)
        found = local_errors(
            self._rewritten,
            inputs,
            self._converted.captured.device,
            floor=self._floor,
            casts=self._casts,
        )
        outputs, targets = self._targets(found.reference)
        samples = max(batch_size(args, kwargs), 1)
        measured = self._error(targets, found.mixed)
        try:
            projections = project(found.sites, targets, samples, self._vectors, self._seed)
        except NoGradientError:
            return self._by_trials(found, inputs, samples, outputs, targets, measured)
        rows = _rows(found.sites, projections)
        predicted = root_of_squares(row.rel_l2 for row in rows)
        doubts = _doubts(found, predicted, measured)
        if doubts:
            wanted = [row.node for row in _ranked(rows)[:TRIED] if row.rel_l2]
            wanted += _ranked_by(self._graph.graph, found)
            tried = self._trials(wanted, found, inputs, targets)
            rows = [replace(row, trial_rel_l2=tried.get(row.node)) for row in rows]
        floors = [row.floor_rel_l2 for row in rows if row.floor_rel_l2 is not None]
        return Budget(
            vectors=self._vectors,
            seed=self._seed,
            samples=samples,
            outputs=tuple(target.name for target in targets),
            left_out=_left_out(outputs, targets),
            predicted_rel_l2=predicted,
            first_order_rel_l2=_signed(projections.errors),
            measured_rel_l2=measured,
            floor_rel_l2=_signed(projections.floors) if floors else None,
            doubts=doubts,
            nodes=tuple(self._named(row) for row in _ranked(rows) if _says_something(row)),
        )

    def _refuse_large(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Backward passes keep every value, and each has an error or two."""
        captured = self._converted.captured
        free = devices.free_bytes(captured.device)
        example = max(batch_size(captured.args, captured.kwargs), 1)
        values = captured.regions[0].traces[Mode.EVAL].values
        held = sum(
            4 * math.prod(value.shape)
            for node in self._graph.graph.nodes
            if node.op == "call_function" and not facts_of_target(node.target).is_a(Family.SHAPE)
            for value in pytree.tree_leaves(values.get(node.name))
            if isinstance(value, Value) and value.dtype.is_floating_point
        )
        each = 2 + self._floor + self._casts
        needed = held * batch_size(args, kwargs) // example * each
        if free is not None and needed > free:
            raise UnsupportedModelError(
                f"the gradients of one batch would take {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} are free",
                mend="Give a first batch of fewer samples.",
            )

    def _by_trials(
        self,
        found: LocalErrors,
        inputs: Sequence[Any],
        samples: int,
        outputs: Sequence[str],
        targets: Sequence[Target],
        measured: float,
    ) -> Budget:
        """The budget where no gradient tells: of the nodes whose own error is largest."""
        sites = [site for site in found.sites if site.error is not None]
        sites.sort(key=lambda site: -_relative(site))
        wanted = [*dict.fromkeys(site.node for site in sites)][:TRIED]
        wanted += _ranked_by(self._graph.graph, found)
        tried = self._trials(wanted, found, inputs, targets)
        total = sum(error**2 for error in tried.values())
        rows = [
            NodeShare(
                node=name,
                layer="",
                op="",
                dtype="",
                rel_l2=error,
                share=_share(error, total, list(tried.values())),
                standard_error=0.0,
                trial_rel_l2=error,
            )
            for name, error in tried.items()
        ]
        return Budget(
            vectors=0,
            seed=self._seed,
            samples=samples,
            outputs=tuple(target.name for target in targets),
            left_out=_left_out(outputs, targets),
            predicted_rel_l2=root_of_squares(tried.values()),
            first_order_rel_l2=math.nan,
            measured_rel_l2=measured,
            floor_rel_l2=None,
            doubts=(Doubt.NO_GRADIENT,),
            nodes=tuple(self._named(row) for row in _ranked(rows)),
        )

    def _targets(self, flat: Sequence[Any]) -> tuple[list[str], list[Target]]:
        """The names of all outputs, and those that an error is relative to: of real numbers, or,
        where there are none, all others."""
        leaves = named_leaves(self._runner.results(flat))
        tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
        real = [
            Target(name, leaf, norm)
            for name, leaf in tensors
            if is_float_tensor(leaf) and (norm := _norm(leaf)) and math.isfinite(norm)
        ]
        differentiable = [target for target in real if target.value.requires_grad]
        whole = [
            Target(name, leaf, math.sqrt(leaf.numel()))
            for name, leaf in tensors
            if not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel()
        ]
        return [name for name, _ in tensors], differentiable or real or whole

    def _error(self, targets: Sequence[Target], flat: Sequence[Any]) -> float:
        """The error of flat outputs. A whole number is right or wrong."""
        have = dict(named_leaves(self._runner.results(flat)))
        errors = []
        for target in targets:
            value, wanted = have[target.name], target.value.detach()
            if value.shape != wanted.shape:
                return math.inf
            if wanted.is_floating_point():
                size = float((value.double() - wanted.double()).norm())
            else:
                size = math.sqrt(int((value != wanted).sum()))
            errors.append(size / target.norm)
        return root_of_squares(errors)

    def _trials(
        self,
        wanted: Iterable[str],
        found: LocalErrors,
        inputs: Sequence[Any],
        targets: Sequence[Target],
    ) -> dict[str, float]:
        """The error of the outputs with the rounding of each of these nodes alone."""
        by_node: dict[str, list[Site]] = {}
        for site in found.sites:
            by_node.setdefault(site.node, []).append(site)
        return {
            name: self._error(targets, outputs_with(self._graph, inputs, by_node[name]))
            for name in dict.fromkeys(wanted)
        }

    def _named(self, row: NodeShare) -> NodeShare:
        """A row by the node's identity, in place of its FX name."""
        decision = self._rewritten.decisions[row.node]
        return replace(
            row, node=decision.node, layer=decision.layer, op=decision.op, dtype=decision.dtype
        )


def _left_out(outputs: Iterable[str], targets: Iterable[Target]) -> tuple[str, ...]:
    held = {target.name for target in targets}
    return tuple(name for name in outputs if name not in held)


def _relative(site: Site) -> float:
    """The site's own error, relative to its value."""
    assert site.error is not None
    size = _norm(site.error) / (_norm(site.value) or 1.0)
    return math.inf if math.isnan(size) else size


def _norm(value: torch.Tensor) -> float:
    return float(value.detach().double().norm())


def _rows(sites: Sequence[Site], projections: Projections) -> list[NodeShare]:
    """A row a node, by FX name."""
    errors = _by_node(sites, projections.errors)
    floors, casts = (_by_node(sites, dots) for dots in (projections.floors, projections.casts))
    names = dict.fromkeys([site.node for site in sites])
    squares = {name: _squares(errors.get(name, [])) for name in names}
    owed = {name: _size(_squares(floors[name])) for name in floors}
    cast = {name: _size(_squares(casts[name])) for name in casts}
    sizes = {name: _size(found) for name, found in squares.items()}
    total = sum(size**2 for size in sizes.values())
    return [
        NodeShare(
            node=name,
            layer="",
            op="",
            dtype="",
            rel_l2=size,
            share=_share(size, total, list(sizes.values())),
            standard_error=_standard_error(squares[name]),
            floor_rel_l2=owed.get(name),
            cast_rel_l2=cast.get(name),
        )
        for name, size in sizes.items()
    ]


def _by_node(
    sites: Sequence[Site], dots: Sequence[torch.Tensor | None]
) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for site, each in zip(sites, dots, strict=True):
        if each is not None:
            found.setdefault(site.node, []).append(each)
    return found


def _squares(dots: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a node adds to the squared error, for each vector: its parts are one error."""
    if not dots:
        return torch.zeros(1, dtype=torch.float64)
    return (_added(dots) ** 2).sum(1)


def _added(dots: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of dot products; by sample, where all of them are."""
    dots = list(dots)
    if len({found.shape[1] for found in dots}) > 1:
        dots = [found.sum(1, keepdim=True) for found in dots]
    return torch.stack(dots).sum(0)


def _size(squares: torch.Tensor) -> float:
    """The root of the mean; infinite where anything is not finite."""
    mean = float(squares.mean())
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _standard_error(squares: torch.Tensor) -> float:
    """That of the root of the mean over vectors, by the slope of the root."""
    mean = float(squares.mean())
    if len(squares) < 2 or not mean or not math.isfinite(mean):
        return 0.0
    return float(squares.std()) / math.sqrt(len(squares)) / (2 * math.sqrt(mean))


def _share(size: float, total: float, sizes: Sequence[float]) -> float:
    if math.isinf(total):  # those that overflow share it
        return 1 / sum(map(math.isinf, sizes)) if math.isinf(size) else 0.0
    return size**2 / total if total else 0.0


def _signed(dots: Sequence[torch.Tensor | None]) -> float:
    """The predicted error of all sites together, signs kept."""
    held = [found for found in dots if found is not None]
    return _size((_added(held) ** 2).sum(1)) if held else 0.0


def _doubts(found: LocalErrors, predicted: float, measured: float) -> tuple[Doubt, ...]:
    doubts = []
    if math.isinf(predicted) or math.isinf(measured) or math.isnan(measured):
        doubts.append(Doubt.NONFINITE)
    elif not measured / HOLDS <= predicted <= measured * HOLDS:
        doubts.append(Doubt.ADDITIVITY)
    if found.ranked:
        doubts.append(Doubt.CHOICES)
    return tuple(doubts)


def _says_something(row: NodeShare) -> bool:
    return bool(row.rel_l2 or row.floor_rel_l2 or row.trial_rel_l2 or row.cast_rel_l2)


def _ranked(rows: Iterable[NodeShare]) -> list[NodeShare]:
    """The largest first: by what was measured, where a node was tried."""
    return sorted(
        rows, key=lambda row: -(row.rel_l2 if row.trial_rel_l2 is None else row.trial_rel_l2)
    )


def _ranked_by(graph: fx.Graph, found: LocalErrors) -> list[str]:
    """The nearest nodes with an error of their own that the ranking nodes rank by."""
    names = []
    erring = {site.node for site in found.sites if site.error is not None}
    nodes = {node.name: node for node in graph.nodes}
    for ranking in found.ranked:
        pending, seen = [*nodes[ranking].all_input_nodes], set[fx.Node]()
        while pending:
            node = pending.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if node.name in erring:
                names.append(node.name)
            else:
                pending += node.all_input_nodes
    return list(dict.fromkeys(names))[:TRIED]
