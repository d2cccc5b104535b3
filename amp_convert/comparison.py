"""ConvertedModel -> `Divergence`: the mixed model held against its FP32 original in inference.

Every batch goes through the FP32 graph and the mixed graph in step (see `lockstep`), through native
`torch.autocast` for comparison, and through the user's metrics. It also goes through the eager FP32
model: a graph is right only for inputs on which the model takes the path that was traced, so the
reference itself is checked on every batch. Sums are kept, values are not, so nothing grows with the
number of batches.

Each node gets two errors. The local one is the node's own doing: it is fed the reference's values.
The accumulated one is what has built up to there: it is fed the mixed model's own values. Some rows
are known without measuring, which keeps validation within a few forward passes:

1. A node with the FP32 dtypes of the original has a local error of 0: it is the same operator on
   the same values.
2. A view, or access to the only result of a tuple, moves no number: its local error is 0, and its
   accumulated error is that of its source.

A node whose mask is clamped is compared with what the clamp makes of the reference: -1e9 that
became -32752 is no error, since a softmax makes 0 of either. A value that is held times a power of
two is compared with the reference times that. Outputs are compared as they are.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert import device as devices
from amp_convert import lockstep
from amp_convert.capture import Region
from amp_convert.case import named_leaves
from amp_convert.converted import ConvertedModel
from amp_convert.divergence import Divergence, MetricPair, NodeDivergence, OutputError
from amp_convert.dtypes import from_name, is_float_tensor, name_of
from amp_convert.error_metrics import ErrorSums, Quantiles, RoundingSums, larger
from amp_convert.errors import ModelError
from amp_convert.plan import Decision
from amp_convert.rewrite import held
from amp_convert.runner import in_mode

aten = torch.ops.aten

Batch = tuple[Sequence[Any], Mapping[str, Any], Any]
"""(args, kwargs, target) of one call."""
Score = Callable[[Any, Any], Mapping[str, float]]
"""The user's metrics: (outputs, target) to values by name."""


def compare(
    converted: ConvertedModel,
    batches: Iterable[Batch],
    *,
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    metrics_reason: str = "no metrics were given",
    autocast: bool = True,
    on_batch: Callable[[], None] = lambda: None,
) -> Divergence:
    """Run both models on `batches` in eval mode, without gradients, and measure.

    `autocast` also runs the original under `torch.autocast`. `on_batch` is called after each batch.
    The model's training flags, buffers and random state are left as they were.
    """
    comparison = _Comparison(converted, score, autocast=autocast)
    with evaluating(converted):
        for batch in batches:
            comparison.add(*batch)
            on_batch()
    return comparison.result(lower_is_better, metrics_reason)


def frozen_identical(
    converted: ConvertedModel, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether `converted.freeze()` gives the bits of `converted` on these inputs."""
    frozen = converted.freeze()
    device = converted.captured.device
    results = []
    with evaluating(converted):
        for model in (converted, frozen):
            torch.manual_seed(0)
            copies = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
            with in_mode(model, training=False), devices.preserved_rng(device):
                results.append(model(*copies[0], **copies[1]))
    sums: dict[str, OutputSums] = {}
    accumulate(sums, *results)
    rows = [total.row(name) for name, total in sums.items()]
    return all(row.mismatches == 0 and not row.rel_l2 > 0 for row in rows)


class _Comparison:
    def __init__(self, converted: ConvertedModel, score: Score | None, *, autocast: bool) -> None:
        self._converted, self._score = converted, score
        self._captured, self._plan = converted.captured, converted.plan
        self._device = self._captured.device
        self._low = from_name(self._plan.dtype)
        self._tables = {r.path: _NodeTable(converted, r, self._low) for r in self._captured.regions}
        self._outputs: dict[str, OutputSums] = {}
        self._native: dict[str, OutputSums] = {}
        self._native_reason = "" if autocast else "it was not asked for"
        self._scores: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._weights = 0
        self._batches = self._samples = 0
        self._reference_rel_l2 = 0.0

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> None:
        state = devices.rng_state(self._device)
        reference, mixed = self._in_step(args, kwargs)
        self._refuse_nan(reference)
        accumulate(self._outputs, reference, mixed)
        size = batch_size(args, kwargs)
        self._batches += 1
        self._samples += size
        self._add_scores("fp32", reference, target, size)
        self._add_scores("mixed", mixed, target, size)
        del mixed
        self._check_reference(args, kwargs, reference, state)
        if not self._native_reason:
            try:
                with torch.autocast(self._device.type, dtype=self._low):
                    native = self._original(args, kwargs, state)
            except Exception as error:  # noqa: BLE001  autocast bans or breaks some models: a result
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._native_reason = f"the original fails under torch.autocast: {first}"
                self._native.clear()
                self._scores.pop("autocast", None)
            else:
                accumulate(self._native, reference, native)
                self._add_scores("autocast", _as_dtypes_of(native, reference), target, size)

    def _refuse_nan(self, reference: Any) -> None:
        for name, leaf in named_leaves(reference):
            if is_float_tensor(leaf) and bool(torch.isnan(leaf).any()):
                raise ModelError(
                    f"the FP32 model itself gives NaN in its output {name}, for batch "
                    f"{self._batches}",
                    mend="Correct the model or that batch: NaN cannot be compared with anything.",
                )

    def _original(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The original's outputs from this random state, on copies of the inputs and with its
        buffers as they were."""
        devices.set_rng_state(self._device, state)
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        with in_mode(self._captured.model, training=False):
            return self._captured.model(*args, **kwargs)

    def _check_reference(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], reference: Any, state: Any
    ) -> None:
        """Hold the reference against the eager FP32 model."""
        if not self._captured.is_whole:
            return  # then the reference is the eager model itself
        sums: dict[str, OutputSums] = {}
        accumulate(sums, self._original(args, kwargs, state), reference)
        for name, total in sums.items():
            row = total.row(name)
            error = row.rel_l2 if not row.mismatches else math.inf
            self._reference_rel_l2 = larger(self._reference_rel_l2, error)

    def _in_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Both models' outputs for one batch, with every node visited on the way."""
        if self._captured.is_whole:
            region = self._captured.regions[0]
            runner = region.runner("eval")
            inputs = runner.inputs(args, kwargs)
            reference, mixed = self._tables[""].run(inputs, inputs)
            for name, want, have in runner.changes(reference, mixed):
                self._outputs.setdefault(name, OutputSums(want.dtype)).add(want, have)
            return runner.results(reference), runner.results(mixed)
        state = devices.rng_state(self._device)
        reference_calls = self._captured.calls(args, kwargs)
        mixed_calls = self._converted.calls(args, kwargs)
        for (region, (ref_args, ref_kwargs)), (_, (mix_args, mix_kwargs)) in zip(
            reference_calls, mixed_calls, strict=True
        ):
            runner = region.runner("eval")
            self._tables[region.path].run(
                runner.inputs(ref_args, ref_kwargs), runner.inputs(mix_args, mix_kwargs)
            )
        reference = self._original(args, kwargs, state)
        devices.set_rng_state(self._device, state)
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        with in_mode(self._captured.model, training=False):
            return reference, self._converted(*args, **kwargs)

    def _add_scores(self, arm: str, outputs: Any, target: Any, size: int) -> None:
        if self._score is not None:
            for name, value in self._score(outputs, target).items():
                self._scores[arm][name] += value * size

    def result(self, lower_is_better: frozenset[str], metrics_reason: str) -> Divergence:
        tables = self._tables.values()
        rows = {name: row for table in self._tables.values() for name, row in table.rows().items()}
        metrics = tuple(
            MetricPair(
                name=name,
                fp32=total / self._samples,
                mixed=self._scores["mixed"].get(name, float("nan")) / self._samples,
                autocast=self._scores["autocast"][name] / self._samples
                if name in self._scores["autocast"]
                else None,
                lower_is_better=name in lower_is_better,
            )
            for name, total in dict(self._scores["fp32"]).items()
        )
        return Divergence(
            batches=self._batches,
            samples=self._samples,
            nodes=tuple(rows[d.node] for d in self._plan.eval),
            outputs=tuple(sums.row(name) for name, sums in self._outputs.items()),
            autocast_outputs=tuple(sums.row(name) for name, sums in self._native.items()),
            autocast_reason=self._native_reason,
            metrics=metrics,
            metrics_reason="" if metrics else metrics_reason,
            costs=(),
            reference_rel_l2=self._reference_rel_l2,
            unvisited=tuple(
                d.node for d in self._plan.eval if not any(d.node in t.visited for t in tables)
            ),
        )


# --- nodes ---------------------------------------------------------------------------------------


@dataclass
class _NodeSums:
    accumulated: ErrorSums = field(default_factory=ErrorSums)
    local: RoundingSums | None = None


class _NodeTable:
    """The sums of one region's nodes, by FX name."""

    def __init__(self, converted: ConvertedModel, region: Region, low: torch.dtype) -> None:
        self._rewritten = converted.rewritten[region.path]["eval"]
        graph = region.graphs["eval"]
        decisions = {d.node: d for d in converted.plan.eval}
        self._decisions = {n: decisions[info.identity] for n, info in graph.nodes.items()}
        self._low, self._device = low, converted.captured.device
        self._sums: dict[str, _NodeSums] = defaultdict(_NodeSums)
        self.visited: set[str] = set()
        values = region.traces["eval"].values
        self._source = {
            node.name: source.name
            for node in graph.graph_module.graph.nodes
            if node.name in self._decisions
            and (source := _unchanged_source(node, values, self._decisions)) is not None
        }

    def run(self, reference: Sequence[Any], mixed: Sequence[Any]) -> tuple[Any, Any]:
        return lockstep.run(
            self._rewritten, reference, mixed, self._visit, self._wants_local, self._device
        )

    def _wants_local(self, node: fx.Node) -> bool:
        return self._decisions[node.name].low and node.name not in self._source

    def _visit(self, step: lockstep.Step) -> None:
        name = step.node.name
        self.visited.add(self._decisions[name].node)
        if name in self._source or ".empty" in self._decisions[name].op:
            return  # what was not written yet holds no value
        sums = self._sums[name]
        reference, mixed = _float_leaves(step.reference), _float_leaves(step.accumulated)
        reference = [held(tensor, self._decisions[name]) for tensor in reference]
        if [t.shape for t in reference] != [t.shape for t in mixed]:
            # A selection by value can do this; there is nothing to subtract.
            sums.accumulated.elements += sum(t.numel() for t in reference)
            sums.accumulated.difference = math.nan
            return
        for want, have in zip(reference, mixed, strict=True):
            sums.accumulated.add(want, have)
        if step.local is not None:
            sums.local = sums.local or RoundingSums(self._low)
            for want, have in zip(reference, _float_leaves(step.local), strict=True):
                sums.local.add(want, have)

    def rows(self) -> dict[str, NodeDivergence]:
        """One row a node, by stable identity."""
        return {d.node: self._row(name, d) for name, d in self._decisions.items()}

    def _row(self, name: str, decision: Decision) -> NodeDivergence:
        source = name
        while source in self._source:
            source = self._source[source]
        sums = self._sums.get(source, _NodeSums())
        errors, local = sums.accumulated, sums.local if source == name else None
        measured = errors.elements > 0
        return NodeDivergence(
            node=decision.node,
            layer=decision.layer,
            op=decision.op,
            dtype=decision.dtype,
            local_rel_l2=(local.errors.rel_l2 if local else 0.0) if measured else None,
            accumulated_rel_l2=errors.rel_l2 if measured else None,
            sqnr_db=errors.sqnr_db if measured else None,
            cosine=errors.cosine if measured else None,
            max_abs_err=errors.max_abs if measured else None,
            max_ulp=(local.max_ulp if local else 0.0) if measured else None,
            nonfinite=errors.nonfinite,
            overflow_fraction=errors.overflow_fraction if measured else None,
            underflow_fraction=(local.underflow_fraction if local else 0.0) if measured else None,
        )


_VIEWS = {
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.t.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.movedim.int,
}  # fmt: skip


def _unchanged_source(
    node: fx.Node, values: Mapping[str, Any], decisions: Mapping[str, Decision]
) -> fx.Node | None:
    """The node whose every number this one passes on, if it is such a node (rule 2)."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.name not in decisions:
        return None
    if decisions[source.name].dtype != decisions[node.name].dtype:
        return None
    if node.target is operator.getitem:
        only = len([v for v in pytree.tree_leaves(values[source.name]) if v and 0 not in v.shape])
        return source if only == 1 else None
    return source if node.target in _VIEWS else None


# --- outputs -------------------------------------------------------------------------------------


class OutputSums:
    """The sums of one output over all batches."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = name_of(dtype) if dtype is not None else "object"
        self._errors, self._quantiles = ErrorSums(), Quantiles()
        self._elements = self._mismatches = 0

    def add(self, reference: torch.Tensor, value: object) -> None:
        """Take in the reference's tensor and whatever stands in its place."""
        self._elements += reference.numel()
        if not isinstance(value, torch.Tensor) or value.shape != reference.shape:
            # Another shape (a selection by value can do this) cannot be compared at all.
            self._mismatches += reference.numel()
            self._errors.difference = self._errors.max_abs = math.nan
            return
        if reference.is_complex():
            reference, value = torch.view_as_real(reference), torch.view_as_real(value)
        if reference.is_floating_point():
            self._errors.add(reference, value)
            self._quantiles.add(reference, value)
        else:
            self._mismatches += int((reference != value).sum())

    def differs(self) -> None:
        """Take in a value that is no tensor and is not the reference's."""
        self._elements += 1
        self._mismatches += 1

    def row(self, name: str) -> OutputError:
        """What was summed up."""
        errors, at = self._errors, self._quantiles.at
        return OutputError(
            name=name,
            dtype=self._dtype,
            elements=self._elements,
            rel_l2=errors.rel_l2,
            cosine=errors.cosine,
            max_abs_err=errors.max_abs,
            ref_abs_max=errors.ref_abs_max,
            abs_err_p50=at(0.5),
            abs_err_p90=at(0.9),
            abs_err_p95=at(0.95),
            abs_err_p99=at(0.99),
            mismatches=self._mismatches,
            nonfinite=errors.nonfinite,
            ref_nonfinite=errors.ref_nonfinite,
        )


def accumulate(sums: dict[str, OutputSums], reference: Any, value: Any) -> None:
    """Add one batch's outputs, and those of the reference, to the sums by output name."""
    have = dict(named_leaves(value))
    for name, want in named_leaves(reference):
        if not isinstance(want, torch.Tensor):
            plain = isinstance(want, int | float | complex | str | bytes | None)
            if not plain:  # an object that nobody but its class can look into
                sums.setdefault(name, OutputSums(None))
            elif want != have.get(name):
                sums.setdefault(name, OutputSums(None)).differs()
        else:
            sums.setdefault(name, OutputSums(want.dtype)).add(want, have.get(name))


def _as_dtypes_of(outputs: Any, reference: Any) -> Any:
    """Outputs in the reference's dtypes, as the user's metrics expect them."""

    def restored(have: Any, want: Any) -> Any:
        both = is_float_tensor(have) and is_float_tensor(want)
        return have.to(want.dtype) if both else have

    return pytree.tree_map(restored, outputs, reference)


def _float_leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if is_float_tensor(leaf) and leaf.numel()]


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs; 1 where there is none."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


@contextlib.contextmanager
def evaluating(converted: ConvertedModel) -> Iterator[None]:
    """Eval mode, no gradients, FP32 products exact; everything as before afterwards."""
    device = converted.captured.device
    with (
        in_mode(converted.captured.model, training=False),
        in_mode(converted, training=False),
        torch.no_grad(),
        devices.exact_fp32(device),
        devices.preserved_rng(device),
    ):
        yield
