"""The arms of an inference comparison, batch by batch: what `compare` sums up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from amp_convert.capture.branches.nest import one_branch
from amp_convert.capture.graph_call import UnfitCallError
from amp_convert.core.batches import Score, batch_size, no_score
from amp_convert.core.errors import ModelError, first_line, refuse_environment
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name, is_float_tensor
from amp_convert.core.progress import OnNode
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.core.tensor_errors import larger
from amp_convert.core.tree_paths import named_leaves
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.eager_plan import eager_plan_parity
from amp_convert.validate.inference.inputs_seen import InputsSeen
from amp_convert.validate.inference.metrics import AUTOCAST, FOLDED, Metrics
from amp_convert.validate.inference.node_errors import NodeErrors
from amp_convert.validate.inference.other_arms import OtherArms, as_dtypes_of
from amp_convert.validate.inference.output_errors import OutputSums, accumulate, same_bits
from amp_convert.validate.inference.reordered import RowMatcher, row_matcher
from amp_convert.validate.inference.results import (
    Divergence,
    EagerPlanParity,
    OutputError,
    Stop,
    Unfit,
)


class Comparison:
    """The sums over all batches so far; `left` counts those that were left out, `stopped` says
    why."""

    def __init__(
        self,
        converted: ConvertedModel,
        arms: OtherArms,
        score: Score | None,
        node_batches: int | None,
        on_node: OnNode,
    ) -> None:
        self._converted, self._arms, self._on_node = converted, arms, on_node
        self._captured, self._plan = converted.captured, converted.plan
        self._device = self._captured.device
        self._low = from_name(self._plan.dtype)
        self._tables = {r.path: NodeErrors(converted, r, self._low) for r in self._captured.regions}
        self._outputs: dict[str, OutputSums] = {}
        self._native: dict[str, OutputSums] = {}
        self._frozen: dict[str, OutputSums] = {}
        self._folded: dict[str, OutputSums] = {}
        self._untuned: dict[str, OutputSums] = {}
        self._frozen_identical = True
        self._eager_plan: EagerPlanParity | None = None
        self._metrics = Metrics(score or no_score)
        self._node_batches = math.inf if node_batches is None else node_batches
        self.batches = self._samples = 0
        self._reference_rel_l2 = 0.0
        self._inputs = InputsSeen()
        self._drawn: set[str] = set()
        self._parted = 0
        self._behind: set[str] = set()
        self._unfit: Counter[str] = Counter()
        self.left: int | None = 0
        self.stopped: Stop | None = None

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> None:
        if unfit := self._captured.takes(args, kwargs):
            self._add_unfit(unfit, args, kwargs, target)
            return
        state, size = rng_state(self._device), batch_size(args, kwargs)
        try:
            reference, untuned = self._reference(args, kwargs, state)
        except UnfitCallError as error:  # of one of the parts
            self._add_unfit(error.what, args, kwargs, target)
            return
        self._refuse_nan(reference)
        self._inputs.add(args, kwargs)
        matcher = row_matcher(self._converted, size)
        noise = self._arms.noise(args, kwargs, state)
        if untuned is not None:
            accumulate(self._untuned, reference, untuned, noise, matcher)
        del untuned
        mixed = self._arms.mixed(args, kwargs, state)
        accumulate(self._outputs, reference, mixed, noise, matcher)
        noise = noise if self._arms.folds else None
        if self._eager_plan is None:
            planned = self._arms.planned(args, kwargs, state)
            self._eager_plan = eager_plan_parity(planned, mixed)
            del planned
        self._metrics.add_pair(reference, mixed, target, size)
        if self._captured.is_whole:  # else the reference is the eager model itself
            self._check_reference(self._arms.original(args, kwargs, state), reference)
            self._drawn |= set(state.drawn_outside_torch(rng_state(self._device)))
        frozen = self._arms.frozen(args, kwargs, state)
        accumulate(self._frozen, reference, frozen, matcher=matcher)
        self._frozen_identical &= same_bits(mixed, frozen)
        del mixed, frozen
        if self._arms.folds:
            folded = self._arms.folded(args, kwargs, state)
            accumulate(self._folded, reference, folded, noise, matcher)
            self._metrics.add(FOLDED, folded, target, size)
            del folded
        self._add_native(args, kwargs, target, reference, state, matcher)
        self.batches += 1
        self._samples += size

    def _add_unfit(
        self, unfit: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any
    ) -> None:
        """A batch that the graph does not take, and why: the original takes it, under the plan, and
        there is no graph to look into, nor a frozen model."""
        state, size = rng_state(self._device), batch_size(args, kwargs)
        try:
            reference = self._arms.original(args, kwargs, state)
        except Exception as error:
            refuse_environment(error)
            raise ModelError(
                f"{unfit}, and the model itself fails on it: {first_line(error)}",
                where=f"batch {self.batches}",
                mend="Give batches that the model takes.",
            ) from error
        self._unfit[unfit] += 1
        self._refuse_nan(reference)
        self._inputs.add(args, kwargs)
        mixed = self._arms.mixed(args, kwargs, state)
        accumulate(self._outputs, reference, mixed)
        self._metrics.add_pair(reference, mixed, target, size)
        del mixed
        self._add_native(args, kwargs, target, reference, state, None)
        self.batches += 1
        self._samples += size

    def _add_native(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        target: Any,
        reference: Any,
        state: Any,
        matcher: RowMatcher | None,
    ) -> None:
        native = self._arms.autocast(args, kwargs, state)
        if self._arms.autocast_reason:
            self._native.clear()
            self._metrics.drop(AUTOCAST)
            return
        accumulate(self._native, reference, native, matcher=matcher)
        outputs = as_dtypes_of(native, reference)
        self._metrics.add(AUTOCAST, outputs, target, batch_size(args, kwargs))

    def _refuse_nan(self, reference: Any) -> None:
        for name, leaf in named_leaves(reference):
            if is_float_tensor(leaf) and bool(torch.isnan(leaf).any()):
                raise ModelError(
                    f"the FP32 model itself gives NaN in its output {name}, for batch "
                    f"{self.batches}",
                    mend="Correct the model or that batch: NaN cannot be compared with anything.",
                )

    def _check_reference(self, eager: Any, reference: Any) -> None:
        """Hold the reference against the eager FP32 model."""
        sums: dict[str, OutputSums] = {}
        accumulate(sums, eager, reference)
        for name, total in sums.items():
            row = total.row(name)
            error = row.rel_l2 if not row.mismatches else math.inf
            self._reference_rel_l2 = larger(self._reference_rel_l2, error)

    def _reference(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any
    ) -> tuple[Any, Any]:
        """The reference's outputs for one batch, and those of the mixed graph as it was rewritten,
        whose kernels are not those of the model that runs (see `rewrite.kernels`); None for the
        latter where it was not run. Of a model that was captured in parts the reference is the
        eager model itself."""
        if self._captured.is_whole:
            return self._whole(args, kwargs, state)
        if self.batches < self._node_batches:
            self._parts_in_step(args, kwargs)
        return self._arms.original(args, kwargs, state), None

    def _whole(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> tuple[Any, Any]:
        """The outputs of the reference, and of the rewritten graph where it is run: for the first
        batches, on which nodes are visited. What both graphs would write to buffers and inputs is
        compared."""
        runner = self._captured.regions[0].runner(Mode.EVAL)
        if self.batches < self._node_batches:
            inputs = runner.inputs(args, kwargs)
            reference, mixed = self._tables[""].run(inputs, inputs, self._on_node)
        else:
            set_rng_state(self._device, state)
            reference, mixed = runner.run(*runner.inputs(args, kwargs)), None
            if runner.writes:
                set_rng_state(self._device, state)
                graph = self._converted.rewritten[""][Mode.EVAL].graph_module
                mixed = one_branch(graph)(*runner.inputs(args, kwargs))
        if mixed is None:
            return runner.results(reference), None
        for name, want, have in runner.changes(reference, mixed):
            self._outputs.setdefault(name, OutputSums(want.dtype)).add(want, have)
        return runner.results(reference), runner.results(mixed)

    def _parts_in_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Visit the nodes of the parts of a model that was not captured whole."""
        reference_calls = self._captured.calls(args, kwargs)
        mixed_calls = self._converted.calls(args, kwargs)
        self._parted += [r for r, _ in reference_calls] != [r for r, _ in mixed_calls]
        for index, ((region, (ref_args, ref_kwargs)), (other, (mix_args, mix_kwargs))) in enumerate(
            zip(reference_calls, mixed_calls, strict=False)
        ):
            if region is not other:  # from here on the two took other paths
                left = [{r.path for r, _ in c[index:]} for c in (reference_calls, mixed_calls)]
                self._behind |= left[0] & left[1]
                break
            runner = region.runner(Mode.EVAL)
            self._tables[region.path].run(
                runner.inputs(ref_args, ref_kwargs), runner.inputs(mix_args, mix_kwargs)
            )

    def result(self, lower_is_better: frozenset[str], metrics_reason: str) -> Divergence:
        tables = self._tables.values()
        by_part = {path: table.rows() for path, table in self._tables.items()}
        rows = {name: row for part in by_part.values() for name, row in part.items()}
        unvisited = tuple(
            d.node for d in self._plan.eval if not any(d.node in t.visited for t in tables)
        )
        branches = self._captured.in_branches
        behind = {name for path in self._behind for name in by_part[path]}
        metrics = self._metrics.pairs(lower_is_better)
        return Divergence(
            batches=self.batches,
            samples=self._samples,
            nodes=tuple(rows[d.node] for d in self._plan.eval),
            outputs=_rows(self._outputs),
            autocast_outputs=_rows(self._native),
            autocast_reason=self._arms.autocast_reason,
            metrics=metrics,
            metrics_reason="" if metrics else metrics_reason,
            costs=(),
            reference_rel_l2=self._reference_rel_l2,
            unvisited=unvisited,
            untaken=tuple(node for node in unvisited if node in branches),
            behind_parting=tuple(node for node in unvisited if node in behind),
            frozen_identical=self._frozen_identical if self._frozen else None,
            frozen_outputs=_rows(self._frozen),
            folded_outputs=_rows(self._folded),
            folded_metrics=self._metrics.pairs(lower_is_better, FOLDED),
            untuned_outputs=_rows(self._untuned),
            batches_given=None if self.left is None else self.batches + self.left,
            stopped=self.stopped,
            node_batches=int(min(self.batches, self._node_batches)),
            parted_paths=self._parted,
            kept_state=tuple(self._arms.kept),
            drawn_outside=tuple(sorted(self._drawn)),
            same_inputs=self._inputs.same,
            eager_plan=self._eager_plan,
            unfit=tuple(Unfit(why, count) for why, count in self._unfit.most_common()),
        )


def _rows(sums: Mapping[str, OutputSums]) -> tuple[OutputError, ...]:
    return tuple(total.row(name) for name, total in sums.items())
