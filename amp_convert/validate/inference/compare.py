"""ConvertedModel -> `Divergence`: the mixed model held against its FP32 original in inference.

Every batch goes through the FP32 graph and the mixed graph in step (see `lockstep`), through native
`torch.autocast` for comparison, and through the user's metrics. It also goes through the eager FP32
model: a graph is right only for inputs on which the model takes the path that was traced, so the
reference itself is checked on every batch. Sums are kept, values are not, so nothing grows with the
number of batches.

Nodes are summed up in `node_errors`, outputs in `output_errors`; outputs are compared as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_call import in_mode
from amp_convert.core import device as devices
from amp_convert.core.batches import Batch, MetricMeans, Score, batch_size, no_score
from amp_convert.core.errors import ModelError, first_line
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name, is_float_tensor
from amp_convert.core.random_state import preserved_rng, rng_state, set_rng_state
from amp_convert.core.tensor_errors import larger
from amp_convert.loading.model_file import named_leaves
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.node_errors import NodeErrors
from amp_convert.validate.inference.output_errors import OutputSums, accumulate
from amp_convert.validate.inference.results import Divergence, MetricPair


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
            with in_mode(model, training=False), preserved_rng(device):
                results.append(model(*copies[0], **copies[1]))
    sums: dict[str, OutputSums] = {}
    accumulate(sums, *results)
    rows = [total.row(name) for name, total in sums.items()]
    return all(row.mismatches == 0 and not row.rel_l2 > 0 for row in rows)


class _Comparison:
    def __init__(self, converted: ConvertedModel, score: Score | None, *, autocast: bool) -> None:
        self._converted = converted
        self._captured, self._plan = converted.captured, converted.plan
        self._device = self._captured.device
        self._low = from_name(self._plan.dtype)
        self._tables = {r.path: NodeErrors(converted, r, self._low) for r in self._captured.regions}
        self._outputs: dict[str, OutputSums] = {}
        self._native: dict[str, OutputSums] = {}
        self._native_reason = "" if autocast else "it was not asked for"
        self._metrics, self._score = MetricMeans(), score or no_score
        self._batches = self._samples = 0
        self._reference_rel_l2 = 0.0

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> None:
        state = rng_state(self._device)
        reference, mixed = self._in_step(args, kwargs)
        self._refuse_nan(reference)
        accumulate(self._outputs, reference, mixed)
        size = batch_size(args, kwargs)
        self._batches += 1
        self._samples += size
        self._metrics.add("fp32", self._score(reference, target), size)
        self._metrics.add("mixed", self._score(mixed, target), size)
        del mixed
        self._check_reference(args, kwargs, reference, state)
        if not self._native_reason:
            try:
                with torch.autocast(self._device.type, dtype=self._low):
                    native = self._original(args, kwargs, state)
            except Exception as error:  # noqa: BLE001  autocast bans or breaks some models: a result
                first = first_line(error)
                self._native_reason = f"the original fails under torch.autocast: {first}"
                self._native.clear()
                self._metrics.drop("autocast")
            else:
                accumulate(self._native, reference, native)
                scores = self._score(_as_dtypes_of(native, reference), target)
                self._metrics.add("autocast", scores, size)

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
        set_rng_state(self._device, state)
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
            runner = region.runner(Mode.EVAL)
            inputs = runner.inputs(args, kwargs)
            reference, mixed = self._tables[""].run(inputs, inputs)
            for name, want, have in runner.changes(reference, mixed):
                self._outputs.setdefault(name, OutputSums(want.dtype)).add(want, have)
            return runner.results(reference), runner.results(mixed)
        state = rng_state(self._device)
        reference_calls = self._captured.calls(args, kwargs)
        mixed_calls = self._converted.calls(args, kwargs)
        for (region, (ref_args, ref_kwargs)), (_, (mix_args, mix_kwargs)) in zip(
            reference_calls, mixed_calls, strict=True
        ):
            runner = region.runner(Mode.EVAL)
            self._tables[region.path].run(
                runner.inputs(ref_args, ref_kwargs), runner.inputs(mix_args, mix_kwargs)
            )
        reference = self._original(args, kwargs, state)
        set_rng_state(self._device, state)
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        with in_mode(self._captured.model, training=False):
            return reference, self._converted(*args, **kwargs)

    def result(self, lower_is_better: frozenset[str], metrics_reason: str) -> Divergence:
        tables = self._tables.values()
        rows = {name: row for table in self._tables.values() for name, row in table.rows().items()}
        native = self._metrics.of("autocast")
        metrics = tuple(
            MetricPair(
                name=name,
                fp32=mean,
                mixed=self._metrics.value("mixed", name),
                autocast=native.get(name),
                lower_is_better=name in lower_is_better,
            )
            for name, mean in self._metrics.of("fp32").items()
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


def _as_dtypes_of(outputs: Any, reference: Any) -> Any:
    """Outputs in the reference's dtypes, as the user's metrics expect them."""

    def restored(have: Any, want: Any) -> Any:
        both = is_float_tensor(have) and is_float_tensor(want)
        return have.to(want.dtype) if both else have

    return pytree.tree_map(restored, outputs, reference)


@contextlib.contextmanager
def evaluating(converted: ConvertedModel) -> Iterator[None]:
    """Eval mode, no gradients, FP32 products exact; everything as before afterwards."""
    device = converted.captured.device
    with (
        in_mode(converted.captured.model, training=False),
        in_mode(converted, training=False),
        torch.no_grad(),
        devices.exact_fp32(device),
        preserved_rng(device),
    ):
        yield
