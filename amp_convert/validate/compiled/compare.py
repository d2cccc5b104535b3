"""ConvertedModel -> `CompiledParity`: the frozen model, and a training step, under `torch.compile`.

A compiler fuses operators and rounds elsewhere, so bits are not asked for: the outputs of
`torch.compile(frozen)` are held against FP32 over all batches, and the gradients of one compiled
step against those of FP32 for the same random numbers. What became of the plan's precisions is seen
in the graphs themselves (see `watch`). Times are those of FP32, autocast and the model all in the
low dtype, each compiled as well, in turns.

Dynamo leaves a call to eager PyTorch once it has compiled it too often: that is a failure here, or
what is judged would not be what was compiled.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.core import device as devices
from amp_convert.core.batches import Batch, Score, batch_size, no_score
from amp_convert.core.errors import first_line, refuse_environment
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import rng_state
from amp_convert.core.tensor_errors import ErrorSums
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.compiled.results import CompiledParity, CompiledStep, OperatorCount
from amp_convert.validate.compiled.watch import Watch
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.metrics import Metrics
from amp_convert.validate.inference.other_arms import OtherArms
from amp_convert.validate.inference.output_errors import OutputSums, accumulate
from amp_convert.validate.inference.reordered import row_matcher
from amp_convert.validate.inference.results import ArmCost
from amp_convert.validate.training.gradient_step import Loss, StepTrace, TrainStep

TURNS = 5
Arms = dict[str, Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class StepToCompile:
    """A training batch, (args, kwargs, target), the user's loss and the file it stands in, and the
    loss scale of the mixed model."""

    batch: Batch
    loss: Loss
    path: str
    scale: float


def compare_compiled(
    converted: ConvertedModel,
    batches: Iterable[Batch],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    step: StepToCompile | str = "training was not compared",
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    cuda_graphs: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> CompiledParity:
    """Compile, compare on `batches`, and time on the inputs `args` and `kwargs`; `step` may say why
    no step is made. `score` gives the user's metrics. What the compiler fails at is a result, and
    no error."""
    compiler = _Compiler(converted, cuda_graphs=cuda_graphs)
    metrics = Metrics(score or no_score)
    with compiler.alone():
        try:
            found = compiler.inference(batches, metrics, on_batch)
            forward = compiler.times(args, kwargs)
        except Exception as error:  # noqa: BLE001  compilers fail in as many ways as user code
            return CompiledParity(cuda_graphs, 0, failure=_failure(error))
        found = replace(found, forward=forward, metrics=metrics.pairs(lower_is_better))
        if isinstance(step, str):
            return replace(found, no_step=step)
        try:
            made, training = compiler.step(step)
        except Exception as error:  # noqa: BLE001  see above
            return replace(found, no_step=_failure(error), step_failed=True)
    return replace(found, step=made, training=training)


def _failure(error: Exception) -> str:
    refuse_environment(error)
    return f"torch.compile fails: {type(error).__name__}: {first_line(error)}"


class NothingCompiledError(RuntimeError):
    """`torch.compile` gave what it was given."""


class _Compiler:
    def __init__(self, converted: ConvertedModel, *, cuda_graphs: bool) -> None:
        self._converted, self._model = converted, converted.captured.model
        self._device, self._low = converted.captured.device, from_name(converted.plan.dtype)
        self._cuda_graphs, self._watch = cuda_graphs, Watch()
        self._arms = OtherArms(converted, autocast=False)
        self._frozen: Any = None

    def _compiled(self, module: nn.Module) -> Any:
        return torch.compile(module, options=self._watch.options(cuda_graphs=self._cuda_graphs))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing compiled before is left, nor what is compiled here afterwards."""
        torch._dynamo.reset()
        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                yield
        finally:
            torch._dynamo.reset()

    def inference(
        self, batches: Iterable[Batch], metrics: Metrics, on_batch: Callable[[], None]
    ) -> CompiledParity:
        """The outputs of the compiled frozen model against the eager FP32 model's."""
        sums: dict[str, OutputSums] = {}
        count, seconds = 0, 0.0
        self._frozen = self._compiled(self._arms.frozen_model)
        with evaluating(self._converted):
            for args, kwargs, target in batches:
                state, size = rng_state(self._device), batch_size(args, kwargs)
                matcher = row_matcher(self._converted, size)
                reference = self._arms.original(args, kwargs, state)
                noise = self._arms.noise(args, kwargs, state)
                begin = time.perf_counter()
                have = self._arms.called(self._frozen, args, kwargs, state)
                seconds = seconds or time.perf_counter() - begin
                accumulate(sums, reference, have, noise, matcher)
                metrics.add_pair(reference, have, target, size)
                count += 1
                on_batch()
        outputs = tuple(total.row(name) for name, total in sums.items())
        ops = self._compiled_ops()
        return CompiledParity(self._cuda_graphs, count, outputs, ops=ops, seconds=seconds)

    def _compiled_ops(self) -> tuple[OperatorCount, ...]:
        """What was compiled since the last call. Raises NothingCompiledError where nothing was,
        as where Dynamo is switched off: eager PyTorch would be judged in its place."""
        if not self._watch.graphs:
            raise NothingCompiledError("no graph has reached Inductor")
        return self._watch.counts()

    def times(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[ArmCost, ...]:
        """A forward pass of each arm."""
        original = self._compiled(self._model)

        def run(model: Any, given: Any, *, autocast: bool = False) -> None:
            copied = pytree.tree_map_only(torch.Tensor, torch.clone, given)
            with torch.autocast(self._device.type, dtype=self._low, enabled=autocast):
                model(*copied[0], **copied[1])

        given = (tuple(args), dict(kwargs))
        arms: Arms = {
            "fp32": partial(run, original, given),
            "autocast": partial(run, original, given, autocast=True),
            "frozen": partial(run, self._frozen, given),
        }
        with contextlib.suppress(RuntimeError, TypeError):  # some models cannot be copied
            low = self._compiled(copy.deepcopy(self._model).to(self._low))
            arms["all low"] = partial(run, low, _lowered(given, self._low))
        with evaluating(self._converted):
            return self._timed(arms)

    def step(self, step: StepToCompile) -> tuple[CompiledStep, tuple[ArmCost, ...]]:
        """One compiled training step against FP32's."""
        args, kwargs, target = step.batch
        batch = (tuple(args), dict(kwargs), target)
        one = TrainStep(self._converted, batch, step.loss, step.path)
        reference = one.run(self._model, "FP32")
        eager = one.run(self._converted, "mixed", step.scale)
        mixed = self._compiled(self._converted)
        have = one.run(mixed, "mixed", step.scale)
        ops = self._compiled_ops()
        error, missing = _apart(reference, have, step.scale)
        found = CompiledStep(
            loss_fp32=reference.loss,
            loss=have.loss,
            rel_l2=error,
            eager_rel_l2=_apart(reference, eager, step.scale)[0],
            missing=tuple(missing),
            ops=ops,
        )
        original = self._compiled(self._model)

        def native(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self._device.type, dtype=self._low):
                return original(*args, **kwargs)

        arms: Arms = {
            "fp32": partial(one.run, original, "FP32"),
            "autocast": partial(one.run, native, "mixed", step.scale),
            "mixed": partial(one.run, mixed, "mixed", step.scale),
        }
        return found, self._timed(arms)

    def _timed(self, arms: Arms) -> tuple[ArmCost, ...]:
        times: dict[str, list[float]] = {name: [] for name in arms}
        notes: dict[str, str] = {}
        for name, run in arms.items():
            try:
                run()
                run()  # the second call may still compile: sizes, CUDA graphs
            except Exception as error:  # noqa: BLE001  a result
                notes[name] = f"it does not run: {first_line(error)}"
        for _ in range(TURNS):
            for name, run in arms.items():
                if name not in notes:
                    times[name].append(devices.milliseconds(run, self._device))
        self._watch.counts()
        return tuple(
            ArmCost(
                arm=name,
                milliseconds=statistics.median(taken) if taken else None,
                peak_bytes=None,
                note=notes.get(name, f"compiled; median of {len(taken)} calls"),
            )
            for name, taken in times.items()
        )


def _lowered(given: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given
    )


def _apart(want: StepTrace, have: StepTrace, scale: float) -> tuple[float, list[str]]:
    """The relative L2 error of all gradients, and the parameters for which there is none."""
    sums, missing = ErrorSums(), []
    for name, gradient in want.gradients.items():
        other = have.gradients[name]
        if (gradient is None) != (other is None):
            missing.append(name)
        elif gradient is not None and other is not None:
            if not bool(torch.isfinite(other).all()):
                missing.append(name)
            sums.add(gradient, other.double() / scale)
    return sums.rel_l2, missing
