"""ConvertedModel and its ONNX file -> `OnnxParity`: ONNX Runtime held against PyTorch.

Every batch goes through the FP32 PyTorch model, through the converted one, and through three
sessions of ONNX Runtime: the FP32 model's own file, which says how far ONNX Runtime and PyTorch are
apart without any conversion; the file unoptimised; and the file as ONNX Runtime optimises it. The
first batches also go through the file node by node (see `lockstep`): on a provider without
low-precision kernels that is the only run in which the file's roundings happen at all.

Outputs are compared with both PyTorch models, over all batches, in FP64; nodes with those of the
converted one. A run that fails is reported with its reason, and the others go on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_signature import Source
from amp_convert.core.batches import Batch, MetricMeans, Score, batch_size, no_score
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name, ulp_at
from amp_convert.core.tree_paths import named_leaves
from amp_convert.onnx_file import build as onnx_program
from amp_convert.onnx_file.write import OnnxModel
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.frozen_model import fold_weights
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.output_errors import accumulate
from amp_convert.validate.inference.reordered import row_matcher
from amp_convert.validate.inference.results import OutputError
from amp_convert.validate.onnx import runs as onnx_runs
from amp_convert.validate.onnx import sessions as onnx_sessions
from amp_convert.validate.onnx.lockstep import OnnxLockstep
from amp_convert.validate.onnx.node_errors import OnnxNodeErrors
from amp_convert.validate.onnx.results import Arm, OnnxMetric, OnnxOutput, OnnxParity, OnnxRun
from amp_convert.validate.onnx.runs import Fed, FileRun

if TYPE_CHECKING:
    import onnx_ir as ir

FP32_FACTOR = 4.0
"""How many times the FP32 file's distance from FP32 PyTorch a low file may keep."""


def validate_onnx(
    converted: ConvertedModel,
    model: OnnxModel,
    batches: Iterable[Batch],
    *,
    fp32: Callable[[], ir.Model] | None = None,
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    node_batches: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> OnnxParity:
    """Run the file that `model` describes on `batches`, of (args, kwargs, target), in eval mode.

    `converted` is the model that it was exported from. `fp32` makes the FP32 model's own ONNX
    model, as `onnx_export.export` gives it; without it, that is exported anew. `score` gives the
    user's metrics; the first `node_batches` are compared node by node. `on_batch` is called after
    each batch. Raises UsageError when ONNX Runtime is not installed.
    """
    runtime = onnx_sessions.runtime_version()
    region = converted.captured.regions[0]
    fp32 = fp32 or partial(onnx_program.fp32_model, region, model.opset)
    with tempfile.TemporaryDirectory() as folder, evaluating(converted):
        run = onnx_runs.fp32_run(fp32, Path(folder))
        validation = _Validation(converted, model, run, score, node_batches)
        for batch in batches:
            validation.add(*batch)
            on_batch()
        return validation.result(runtime, lower_is_better)


class _Validation:
    def __init__(
        self,
        converted: ConvertedModel,
        model: OnnxModel,
        fp32: FileRun,
        score: Score | None,
        node_batches: int,
    ) -> None:
        import onnx_ir as ir

        self._converted, self._model = converted, model
        self._low = from_name(model.dtype)
        self._region = converted.captured.regions[0]
        rewritten = converted.rewritten[self._region.path][Mode.EVAL]
        self._folded = fold_weights(self._region, rewritten)
        written = ir.load(model.path)
        self._table = OnnxNodeErrors(rewritten, self._folded.graph_module.graph, written, self._low)
        self._node_batches = node_batches
        self._metrics, self._score = MetricMeans(), score or no_score
        self._batches = self._samples = 0
        lockstep = OnnxLockstep(written, self._folded.graph_module)
        self._fp32 = fp32
        self._plain, self._placements, self._providers = onnx_runs.unoptimised_run(model.path)
        self._runs = [
            self._fp32,
            self._plain,
            onnx_runs.optimised_run(model.path),
            onnx_runs.stepwise_run(lockstep, self._table.visit),
        ]

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> None:
        fp32 = self._called(self._converted.captured.model, args, kwargs)
        mixed = self._called(self._converted, args, kwargs)
        fed = self._fed(args, kwargs)
        size = batch_size(args, kwargs)
        self._metrics.add("fp32", self._score(fp32, target), size)
        self._metrics.add("converted", self._score(mixed, target), size)
        matcher, noise = row_matcher(self._converted, size), None
        for run in self._runs:
            if run.arm == "node by node" and self._batches >= self._node_batches:
                continue
            outputs = run.outputs(fed)
            if outputs is None:
                continue
            run.batches += 1
            named = dict(zip(_tensors(fp32), outputs, strict=True))
            accumulate(run.against_fp32, _tensors(fp32), named, noise, matcher)
            if run is self._fp32:
                noise = named  # what two FP32 runtimes differ by
            else:
                accumulate(run.against_converted, _tensors(mixed), named, matcher=matcher)
                scores = self._score(_rebuilt(mixed, outputs), target)
                self._metrics.add(run.arm, scores, size)
        self._batches += 1
        self._samples += size

    @staticmethod
    def _called(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's outputs, on copies of the inputs, which it may write to."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        return model(*args, **kwargs)

    def _fed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fed:
        runner = self._region.runner(Mode.EVAL)
        inputs = zip(runner.inputs(args, kwargs), runner.signature.inputs, strict=True)
        users = [value for value, spec in inputs if spec.source is Source.USER]
        tensors = [_real(value) for value in users if isinstance(value, torch.Tensor)]
        dtypes = [from_name(described.dtype) for described in self._model.inputs]
        bordered = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        rest = iter(users)
        flat = [
            next(rest) if spec.source is Source.USER else self._folded.tensors[spec.target]
            for spec in self._folded.signature.inputs
        ]
        return Fed(tensors, bordered, flat)

    def result(self, runtime: str, lower_is_better: frozenset[str]) -> OnnxParity:
        sums = {} if self._fp32.failed else self._fp32.against_fp32
        reference = {name: total.row(name) for name, total in sums.items()}
        whole = {run.arm for run in self._runs if run.batches == self._batches and not run.failed}
        arm = next((arm for arm in _PREFERRED if arm in whole and self._metrics.of(arm)), None)
        return OnnxParity(
            path=self._model.path,
            dtype=self._model.dtype,
            runtime=runtime,
            providers=self._providers,
            batches=self._batches,
            samples=self._samples,
            runs=tuple(self._finished(run, reference) for run in self._runs),
            ran=self._table.ran(self._placements),
            ran_reason=self._plain.failure,
            nodes=self._table.rows(self._placements),
            node_batches=min(self._batches, self._node_batches),
            unmatched=self._table.unmatched(),
            parting=self._table.first_diverging(),
            drifting=self._table.first_drifting(),
            drawing=self._table.first_random(),
            metrics=tuple(
                OnnxMetric(
                    name=name,
                    fp32=mean,
                    converted=self._metrics.value("converted", name),
                    onnx=self._metrics.value(arm, name),
                    lower_is_better=name in lower_is_better,
                )
                for name, mean in self._metrics.of("fp32").items()
                if arm is not None
            ),
            metrics_arm=arm,
        )

    def _finished(self, run: FileRun, reference: Mapping[str, OutputError]) -> OnnxRun:
        lacking = onnx_sessions.lacks_kernel(run.failure)
        if run.failed:  # some batches at most: nothing to judge by
            return OnnxRun(run.arm, run.failure, (), run.batches, (), lacking)
        outputs = tuple(
            self._output(
                sums.row(name),
                run.against_converted[name].row(name) if name in run.against_converted else None,
                reference.get(name),
            )
            for name, sums in run.against_fp32.items()
        )
        return OnnxRun(run.arm, run.failure, run.without, run.batches, outputs, lacking)

    def _output(
        self, fp32: OutputError, converted: OutputError | None, reference: OutputError | None
    ) -> OnnxOutput:
        if converted is None:
            return OnnxOutput(fp32, None, None, None)
        if "float" not in converted.dtype:
            return OnnxOutput(fp32, converted, None, converted.mismatches == 0)
        if reference is None:
            return OnnxOutput(fp32, converted, None, None)
        ulp = ulp_at(self._low, reference.ref_abs_max)
        if not reference.max_abs_err <= ulp:  # such a limit would let anything pass
            return OnnxOutput(fp32, converted, None, None)
        limit = FP32_FACTOR * reference.max_abs_err + ulp
        return OnnxOutput(fp32, converted, limit, converted.max_abs_err <= limit)


_PREFERRED: tuple[Arm, ...] = ("optimised", "unoptimised", "node by node")
"""Whose outputs the user's metrics are computed from: what users run comes first."""


def _tensors(outputs: Any) -> dict[str, torch.Tensor]:
    leaves = ((name, leaf) for name, leaf in named_leaves(outputs))
    return {name: _real(leaf).cpu() for name, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """ONNX has no complex numbers: they are pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _rebuilt(like: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`tensors` in the structure, dtypes and places of a model's own outputs."""
    found = iter(tensors)

    def replaced(leaf: torch.Tensor) -> torch.Tensor:
        value = next(found)
        if leaf.is_complex():
            value = torch.view_as_complex(value)
        return value.to(leaf.device, leaf.dtype)

    return pytree.tree_map_only(torch.Tensor, replaced, like)
