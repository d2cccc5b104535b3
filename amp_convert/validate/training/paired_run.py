"""Several arms trained in step from one seed, on the same weights, batches and random numbers.

The arms take turns at every step, so that a machine whose speed drifts slows all of them alike, and
so that a run that is stopped has the same number of steps in each. Every arm starts from the random
state that `torch.manual_seed(seed)` gives and keeps its own from then on; batches are drawn once,
with a random state of their own, and each arm gets a copy.

See `arm_specs` for what each arm is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.batches import LOSS, TRAIN_LOSS, Batch, MetricMeans, batch_size
from amp_convert.core.errors import AmpConvertError, ModelError, UsageError
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import preserved_rng, set_rng_state
from amp_convert.loading.user_code import user_code
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.arm import Arm
from amp_convert.validate.training.arm_specs import FP32, PAIR, ArmSpec
from amp_convert.validate.training.data import Data, Stream, initial_weights, seeded_rng
from amp_convert.validate.training.gradient_step import cloned
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.results import ArmRecord, PairedRun
from amp_convert.validate.training.training_mode import (
    autocast_failure,
    mode_of,
    native_autocast,
    nudged,
    weight_distance,
    widened_outputs,
)
from amp_convert.validate.training.weights import Weights


class Race:
    """The arms `specs` of one model, from one seed. Open it with `training` around."""

    def __init__(
        self,
        model: nn.Module,
        converted: ConvertedModel | None,
        recipe: Recipe,
        data: Data,
        seed: int,
        specs: Sequence[ArmSpec],
        at_most: int,
    ) -> None:
        self.seed, self.steps = seed, 0
        self.random_parted: int | None = None
        self.drawn_outside: list[str] = []
        self._means = MetricMeans()
        self.initial_metrics: dict[str, float] = {}
        self._model, self._converted, self._recipe, self._data = model, converted, recipe, data
        self.device = devices.of_model(model)
        self.weights = Weights(model)
        self.rng = seeded_rng(self.device, seed)
        self.initial = initial_weights(self.weights, data, recipe.path, self.device, seed)
        self._stream = Stream(data, seed, self.rng, self.device, recipe.accumulate)
        self._at_most = at_most
        self._branches = converted is not None and converted.captured.has_branches
        self.arms = {spec.name: self._arm(spec) for spec in specs}

    def _arm(self, spec: ArmSpec) -> Arm:
        call: Callable[..., Any] = self._model
        recipe, initial = self._recipe, self.initial
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if not spec.low:
            recipe = dataclasses.replace(recipe, scaling=LossScaling("none"))
        if spec.nudged:
            initial = nudged(initial, self.weights.parameters)
        if spec.converted:
            assert self._converted is not None
            call = self._converted
        if spec.autocast:
            assert self._converted is not None
            low = from_name(self._converted.plan.dtype)
            context = functools.partial(native_autocast, self.device, low)
        return Arm(spec, call, self.weights, initial, recipe, self.device, self.rng, context)

    def first_batch(self) -> Batch:
        """The first batch that training sees."""
        stream = Stream(self._data, self.seed, self.rng, self.device, 1)
        found = stream.draw(1)
        assert found is not None  # user_batches refuses to give none
        return found[0]

    def step(self) -> bool:
        """One step of every arm; False where the batches have run out."""
        batches = self._stream.draw(self._at_most)
        if batches is None:
            return False
        self.steps += 1
        meter = self.steps == min(2, self._at_most) and not self._branches
        for arm in list(self.arms.values()):
            if arm.note:
                continue
            if not arm.spec.may_fail:
                with arm.given(f"step {self.steps} of train_batches({self.seed})"):
                    arm.step(batches, meter=meter)
                self._check(arm)
                continue
            try:
                arm.step(batches, meter=meter)
            except Exception as error:  # noqa: BLE001  autocast bans or breaks some models: a result
                arm.note = autocast_failure(error)
                arm.clear()
        states = [self.arms[spec.name].rng for spec in PAIR if spec.name in self.arms]
        if self.random_parted is None and not all(states[0].same(state) for state in states):
            self.random_parted = self.steps
            self.drawn_outside = states[0].drawn_outside_torch(states[1])
        return True

    def _check(self, arm: Arm) -> None:
        """Note why an arm ends here, if it does."""
        loss, scale = arm.losses[-1], arm.scaler.get_scale()
        if not math.isfinite(loss):
            arm.note = f"its loss is {loss} at step {self.steps}"
        elif arm.scaler.is_enabled() and scale < 1:
            arm.scales.append(scale)
            arm.note = f"its loss scale is under 1 after step {self.steps}: {arm.scale_history}"

    @property
    def ended(self) -> str:
        """Why the pair cannot go on; empty while it can."""
        for spec in PAIR:
            if spec.name in self.arms and self.arms[spec.name].note:
                return f"the {spec.title} arm stopped: {self.arms[spec.name].note}"
        return ""

    def result(self, *, interrupted: bool = False) -> PairedRun:
        """What the arms show after the steps that they made; runs the eval batches.

        After a run that was `interrupted` an arm whose evaluation fails has no metrics: a Ctrl-C
        reaches the user's own worker processes too.
        """
        moved = weight_distance(self.arms[FP32.name].tensors, self.initial, self.weights)
        rows = tuple(self._row(arm, moved, interrupted) for arm in self.arms.values())
        return PairedRun(
            self.seed,
            self.steps,
            self.random_parted,
            rows,
            self.initial_metrics,
            tuple(self.drawn_outside),
        )

    def _row(self, arm: Arm, moved: float, interrupted: bool) -> ArmRecord:
        metrics: dict[str, float] = {}
        try:
            metrics = {} if arm.note else self.evaluate(arm)
        except Exception as error:
            if arm.spec.may_fail:
                arm.note = autocast_failure(error)
            elif not (interrupted and isinstance(error, AmpConvertError)):
                raise
        base = self.arms[FP32.name].tensors
        drift = weight_distance(arm.tensors, base, self.weights) / moved if moved else None
        own = weight_distance(arm.tensors, self.initial, self.weights) / moved if moved else None
        return ArmRecord(
            arm=arm.name,
            losses=tuple(arm.losses),
            gradient_norms=tuple(arm.norms),
            scales=tuple(arm.scales) if arm.scaler.is_enabled() else (),
            skipped=tuple(arm.skipped),
            drift=drift,
            moved=own,
            metrics=metrics,
            metric_errors={
                name: found
                for name in metrics
                if (found := self._means.standard_error(name, FP32.name, arm.name)) is not None
            },
            milliseconds=arm.milliseconds,
            peak_bytes=arm.peak_bytes,
            weights_sha256=arm.sha256(),
            note=arm.note,
        )

    def evaluate(self, arm: Arm) -> dict[str, float]:
        """The metrics of an arm's weights, means over the eval batches weighted by batch size.

        "loss" is the user's loss there, unless a metric has that name or it refuses those targets.
        What a batch does not have, the arm does not have. Each arm's batches are drawn with the
        random state that training began with. Raises ModelError for batches without a sample.
        """
        if self._data.eval_batches is None:
            return {}
        means = self._means
        means.drop(arm.name)
        with (
            arm.installed(),
            in_mode(self._model, training=False),
            mode_of(self._converted, training=False),
            preserved_rng(self.device),
            torch.no_grad(),
        ):
            set_rng_state(self.device, self.rng)
            for batch in self._data.eval_batches():
                means.add(arm.name, self._scores(arm, batch), batch_size(batch[0], batch[1]))
        if not means.samples(arm.name):
            where = os.path.basename(self._recipe.path)
            raise ModelError("eval_batches() gives no sample", where=where, mend="Give some.")
        return means.complete(arm.name)

    def name_metric(self, wanted: str | None) -> str:
        """The metric that seeds are judged by: `wanted`, or the first of the user's, or a loss.

        To be called before any step, so that no result can choose it; the initial weights are
        evaluated. Raises UsageError when there is no such metric.
        """
        self.initial_metrics = self.evaluate(self.arms[FP32.name])
        known = (*self.initial_metrics, TRAIN_LOSS)
        if wanted is not None and wanted not in known:
            what = f"the model file has no metric {wanted}"
            raise UsageError(what, mend=f"There are: {', '.join(known)}.")
        return (
            wanted or sorted(known, key=lambda name: (name == TRAIN_LOSS) + 0.5 * (name == LOSS))[0]
        )

    def _scores(self, arm: Arm, batch: Batch) -> dict[str, float]:
        args, kwargs, target = cloned(batch)
        found: dict[str, float] = {}
        with arm.context():
            with arm.given("a batch of eval_batches()"):
                outputs = arm.call(*args, **kwargs)
            with contextlib.suppress(ModelError), user_code("loss()", self._recipe.path):
                # On copies: a loss may write to what it is given, and the metrics come next.
                found["loss"] = float(self._recipe.loss(*cloned((outputs, target))))
        wide = pytree.tree_map_only(torch.Tensor, widened_outputs, outputs)
        return {**found, **self._data.score(wide, target)}

    def state(self) -> dict[str, Any]:
        """What `load` goes on from."""
        return {
            "steps": self.steps,
            "random_parted": self.random_parted,
            "drawn_outside": self.drawn_outside,
            "arms": {name: arm.state() for name, arm in self.arms.items()},
            "last_batch": self._stream.digest(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the batches up to there are drawn again, and compared."""
        self.steps, self.random_parted = state["steps"], state["random_parted"]
        self.drawn_outside = [str(name) for name in state["drawn_outside"]]
        for _ in range(self.steps):
            self._stream.draw(self._at_most)
        if self._stream.digest() != state["last_batch"]:
            raise ModelError(
                f"train_batches({self.seed}) gives other batches than when the checkpoint was made",
                where=os.path.basename(self._recipe.path),
                mend="Let it depend on its seed alone, or delete the checkpoint.",
            )
        for name, arm in self.arms.items():
            arm.load(state["arms"][name])
