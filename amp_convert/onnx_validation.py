"""ConvertedModel and its ONNX file -> `OnnxParity`: ONNX Runtime held against PyTorch.

Every batch goes through the FP32 PyTorch model, through the converted one, and through three
sessions of ONNX Runtime: the FP32 model's own file, which says how far ONNX Runtime and PyTorch are
apart without any conversion; the file unoptimised; and the file as ONNX Runtime optimises it. The
first batches also go through the file node by node (see `onnx_lockstep`): on a provider without
low-precision kernels that is the only run in which the file's roundings happen at all.

Outputs are compared with both PyTorch models, over all batches, in FP64; nodes with those of the
converted one. A run that fails is reported with its reason, and the others go on.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from amp_convert import onnx_export, onnx_program, onnx_sessions
from amp_convert.case import named_leaves
from amp_convert.comparison import Batch, OutputSums, Score, accumulate, batch_size, evaluating
from amp_convert.converted import ConvertedModel, fold_weights
from amp_convert.divergence import OutputError
from amp_convert.dtypes import from_name, ulp_at
from amp_convert.onnx_export import OnnxModel
from amp_convert.onnx_lockstep import OnnxLockstep
from amp_convert.onnx_nodes import NodeTable
from amp_convert.onnx_parity import Arm, OnnxMetric, OnnxOutput, OnnxParity, OnnxRun
from amp_convert.onnx_sessions import Placement, Session
from amp_convert.runner import Source

FP32_FACTOR = 4.0
"""How many times the FP32 file's distance from FP32 PyTorch a low file may keep."""

T = TypeVar("T")


def validate_onnx(
    converted: ConvertedModel,
    model: OnnxModel,
    batches: Iterable[Batch],
    *,
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    node_batches: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> OnnxParity:
    """Run the file that `model` describes on `batches`, of (args, kwargs, target), in eval mode.

    `converted` is the model that it was exported from. `score` gives the user's metrics; the first
    `node_batches` are compared node by node. `on_batch` is called after each batch. Raises
    UsageError when ONNX Runtime is not installed.
    """
    runtime = onnx_sessions.runtime_version()
    with tempfile.TemporaryDirectory() as folder, evaluating(converted):
        validation = _Validation(converted, model, Path(folder), score, node_batches)
        for batch in batches:
            validation.add(*batch)
            on_batch()
        return validation.result(runtime, lower_is_better)


@dataclass
class _Fed:
    """One batch: the model's tensors, the same in the dtypes of the file, and the FX graph's."""

    tensors: list[torch.Tensor]
    bordered: list[torch.Tensor]
    flat: list[Any]


@dataclass
class _Run:
    """One way of running a file, and the sums of its outputs. What fails in `attempt` ends this
    run, and no other."""

    arm: Arm
    failure: str = ""
    without: tuple[str, ...] = ()
    batches: int = 0
    call: Callable[[_Fed], list[torch.Tensor]] | None = None
    against_fp32: dict[str, OutputSums] = field(default_factory=dict)
    against_converted: dict[str, OutputSums] = field(default_factory=dict)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What `action` gives; None when it fails, as it then will from now on."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no class in common
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.failure, self.without, self.call = lines[-1].strip(), (), None
            return None

    def outputs(self, fed: _Fed) -> list[torch.Tensor] | None:
        """The outputs for one batch; None when this run has failed, now or before."""
        call = self.call
        return self.attempt(lambda: call(fed)) if call is not None else None


class _Validation:
    def __init__(
        self,
        converted: ConvertedModel,
        model: OnnxModel,
        folder: Path,
        score: Score | None,
        node_batches: int,
    ) -> None:
        import onnx_ir as ir

        self._converted, self._model, self._score = converted, model, score
        self._low = from_name(model.dtype)
        self._region = converted.captured.regions[0]
        rewritten = converted.rewritten[self._region.path]["eval"]
        self._folded = fold_weights(self._region, rewritten)
        written = ir.load(model.path)
        self._table = NodeTable(rewritten, self._folded.graph_module.graph, written, self._low)
        self._lockstep = OnnxLockstep(written, self._folded.graph_module)
        self._node_batches = node_batches
        self._scores: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._batches = self._samples = 0
        self._names: list[str] = []
        self._placements: Mapping[str, Placement] = {}
        self._providers = onnx_sessions.providers()
        self._runs = [self._fp32(folder), self._unoptimised(), self._optimised(), self._stepwise()]

    # --- the runs --------------------------------------------------------------------------------

    def _fp32(self, folder: Path) -> _Run:
        run, path = _Run("fp32"), folder / "fp32.onnx"

        def opened() -> Callable[[_Fed], list[torch.Tensor]]:
            graph = onnx_program.unconverted(self._region.graphs["eval"])
            built = onnx_program.build(self._region, graph, self._model.opset)
            onnx_export.write(built, path)
            session = Session(str(path))
            return lambda fed: session.run(fed.tensors)

        run.call = run.attempt(opened)
        return run

    def _unoptimised(self) -> _Run:
        run = _Run("unoptimised")
        opened = run.attempt(lambda: onnx_sessions.recorded(self._model.path))
        if opened is not None:
            session, self._placements = opened
            self._providers = session.providers
            run.call = lambda fed: session.run(fed.bordered)
        return run

    def _optimised(self) -> _Run:
        run = _Run("optimised")
        failure, without = onnx_sessions.needless(self._model.path)
        if not failure or without:
            path = self._model.path
            session = run.attempt(lambda: Session(path, optimised=True, disabled=without))
            if session is not None:
                run.call = lambda fed: session.run(fed.bordered)
        if not run.failure:
            run.failure, run.without = failure, without
        return run

    def _stepwise(self) -> _Run:
        visit = self._table.visit
        return _Run(
            "node by node", call=lambda fed: self._lockstep.run(fed.flat, fed.bordered, visit)
        )

    # --- a batch ---------------------------------------------------------------------------------

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Any) -> None:
        fp32 = self._called(self._converted.captured.model, args, kwargs)
        mixed = self._called(self._converted, args, kwargs)
        fed = self._fed(args, kwargs)
        size = batch_size(args, kwargs)
        scored = {"fp32": fp32, "converted": mixed}
        self._names = list(_tensors(fp32))
        for run in self._runs:
            if run.arm == "node by node" and self._batches >= self._node_batches:
                continue
            outputs = run.outputs(fed)
            if outputs is None:
                continue
            run.batches += 1
            named = dict(zip(self._names, outputs, strict=True))
            accumulate(run.against_fp32, _tensors(fp32), named)
            if run.arm != "fp32":
                accumulate(run.against_converted, _tensors(mixed), named)
                scored[run.arm] = _rebuilt(mixed, outputs)
        self._batches += 1
        self._samples += size
        for arm, outputs in scored.items() if self._score is not None else ():
            assert self._score is not None
            for name, value in self._score(outputs, target).items():
                self._scores[arm][name] += value * size

    @staticmethod
    def _called(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's outputs, on copies of the inputs, which it may write to."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        return model(*args, **kwargs)

    def _fed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Fed:
        runner = self._region.runner("eval")
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
        return _Fed(tensors, bordered, flat)

    # --- the result ------------------------------------------------------------------------------

    def result(self, runtime: str, lower_is_better: frozenset[str]) -> OnnxParity:
        fp32 = next(run for run in self._runs if run.arm == "fp32")
        sums = fp32.against_fp32 if not fp32.failure else {}
        reference = {name: total.row(name) for name, total in sums.items()}
        arm = next((a for a in _PREFERRED if a in self._scores), None)
        return OnnxParity(
            path=self._model.path,
            dtype=self._model.dtype,
            runtime=runtime,
            providers=self._providers,
            batches=self._batches,
            samples=self._samples,
            runs=tuple(self._finished(run, reference) for run in self._runs),
            ran=self._table.ran(self._placements),
            ran_reason=next(run.failure for run in self._runs if run.arm == "unoptimised"),
            nodes=self._table.rows(self._placements),
            node_batches=min(self._batches, self._node_batches),
            unmatched=self._table.unmatched(),
            parting=self._table.parting(),
            drifting=self._table.drifting(),
            metrics=tuple(
                OnnxMetric(
                    name=name,
                    fp32=total / self._samples,
                    converted=self._scores["converted"].get(name, float("nan")) / self._samples,
                    onnx=self._scores[arm].get(name, float("nan")) / self._samples,
                    lower_is_better=name in lower_is_better,
                )
                for name, total in self._scores["fp32"].items()
                if arm is not None
            ),
            metrics_arm=arm,
        )

    def _finished(self, run: _Run, reference: Mapping[str, OutputError]) -> OnnxRun:
        if run.failure and not run.without:  # some batches at most: nothing to judge by
            return OnnxRun(run.arm, run.failure, (), run.batches, ())
        outputs = tuple(
            self._output(
                sums.row(name),
                run.against_converted[name].row(name) if name in run.against_converted else None,
                reference.get(name),
            )
            for name, sums in run.against_fp32.items()
        )
        return OnnxRun(run.arm, run.failure, run.without, run.batches, outputs)

    def _output(
        self, fp32: OutputError, converted: OutputError | None, reference: OutputError | None
    ) -> OnnxOutput:
        if converted is None:
            return OnnxOutput(fp32, None, None, None)
        if "float" not in converted.dtype:
            return OnnxOutput(fp32, converted, None, converted.mismatches == 0)
        if reference is None:
            return OnnxOutput(fp32, converted, None, None)
        limit = FP32_FACTOR * reference.max_abs_err + ulp_at(self._low, reference.ref_abs_max)
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
