"""ConvertedModel -> `TrainingParity`: the mixed model trained beside its FP32 original.

1. One step, without an update: the gradients of both models (see `compare_gradients`), at the loss
   scale that training starts with; where that overflows and the scale is dynamic, at the one it
   finds.
2. A paired run of N steps from the first seed, with native autocast and FP32 noise: see
   `paired_run`.
3. Where more seeds are asked for: a pair a seed, FP32 and mixed alone, until the test of
   `noninferiority` has its answer.

After every few steps the state can go to a checkpoint. A run that was killed begins again from the
last one and ends in the same bits: weights, optimizer, loss scale and random states are stored, the
batches are drawn anew from their seed, and whatever else decides about the bits (versions, threads,
settings, the plan) has to be as it was. A checkpoint that cannot be written, on a full disk say, is
said at once and costs nothing else: the old one stays whole, and the run goes on.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from amp_convert.core.batches import LOSS, TRAIN_LOSS
from amp_convert.core.errors import AmpConvertError, ModelError, UsageError
from amp_convert.loading.user_code import placed
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training.arm_specs import ARMS, FP32, PAIR, ArmSpec
from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.gradient_results import GradientParity
from amp_convert.validate.training.learning import Learning
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.noninferiority import Noninferiority, judge_pairs
from amp_convert.validate.training.options import DEFAULT_STEPS, MOST_STEPS, Options, fingerprint
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe, in_words
from amp_convert.validate.training.results import PairedRun, SeedPair, TrainingParity
from amp_convert.validate.training.training_mode import training


def compare_training(
    converted: ConvertedModel,
    recipe: Recipe,
    data: Data,
    options: Options,
    *,
    tick: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> TrainingParity:
    """Train both models and measure; the model is afterwards as it was.

    `tick` is called after each step; once `should_stop` says so, no further step is begun, and what
    there is becomes the result. `say` is told what a user should know at once, such as a checkpoint
    that cannot be written. Raises UnsupportedModelError for a model without a train graph,
    ModelError for whatever is wrong with the user's batches, loss, optimizer or FP32 training, and
    UsageError for a checkpoint that belongs to another run.
    """
    low = any(decision.low for decision in converted.plan.train)
    if not low:  # nothing can underflow, and plain training is what it is compared with
        recipe = dataclasses.replace(recipe, scaling=LossScaling("none"))
    return _Comparison(converted, recipe, data, options, tick, should_stop, say).run()


class _Comparison:
    def __init__(
        self,
        converted: ConvertedModel,
        recipe: Recipe,
        data: Data,
        options: Options,
        tick: Callable[[], None],
        should_stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._converted, self._model = converted, converted.captured.model
        self._recipe, self._data, self._options = recipe, data, options
        self._scaled = recipe
        self._tick, self._should_stop, self._say = tick, should_stop, say
        self._steps = options.steps or DEFAULT_STEPS
        self._metric = ""
        self._interrupted = False
        self._answer: Noninferiority | None = None
        self._first: PairedRun | None = None
        self._ended = ""
        self._unsaved = 0
        self._words: dict[str, str] = {}
        self._pairs: list[SeedPair] = []

    def run(self) -> TrainingParity:
        resumed = self._resume()
        begin = resumed["seed"] if resumed else 0
        with training(self._model, self._converted):
            gradients = self._gradients()
            self._scaled = self._recipe.starting_at(gradients.scale)
            for seed in range(begin, self._options.seeds):
                if self._train_seed(seed, resumed if seed == begin else None):
                    break
        return self._parity(gradients)

    def _train_seed(self, seed: int, resumed: Mapping[str, Any] | None) -> bool:
        """Train the arms of a seed; whether it was the last one needed, or possible."""
        race = self._race(seed, ARMS if seed == 0 else PAIR)
        if seed == 0:
            self._metric = race.name_metric(self._options.metric)
        fp32 = race.arms[FP32.name]
        self._words = self._words or in_words(fp32.optimizer, fp32.scheduler)
        if resumed and self._options.checkpoint:
            with checkpoint.applied(self._options.checkpoint):
                race.load(resumed["race"])
        self._ended = self._train(race)
        if self._teaches_nothing(race):
            self._say(f"FP32 has learnt nothing in {race.steps} steps; up to {MOST_STEPS} are made")
            self._steps = MOST_STEPS
            self._ended = self._train(race)
        done = race.result(interrupted=self._interrupted)
        self._keep_first(done)
        # A pair that came to grief is one: it is judged by how.
        if not race.ended and race.steps < self._steps:
            return True
        self._pairs.append(SeedPair.of(done, self._metric))
        return self._decided()

    def _teaches_nothing(self, race: Race) -> bool:
        """Whether more steps than asked for are needed before training is called unchecked. Judged
        on the first steps alone, so that a run that goes on from a checkpoint decides the same."""
        if self._options.steps is not None or race.seed or race.ended or self._interrupted:
            return False
        losses = race.arms[FP32.name].losses[:DEFAULT_STEPS]
        return len(losses) == DEFAULT_STEPS and not Learning.of(losses).learnt

    def _race(self, seed: int, specs: Sequence[ArmSpec]) -> Race:
        at_most = self._steps if self._options.steps is not None or seed else MOST_STEPS
        return Race(self._model, self._converted, self._scaled, self._data, seed, specs, at_most)

    def _gradients(self) -> GradientParity:
        """The gradients of one step from the first seed's weights, at a scale that they bear."""
        race = self._race(0, [FP32])
        args, kwargs, target = race.first_batch()
        scaling = self._recipe.scaling
        with race.arms[FP32.name].installed(), placed("batch 0 of train_batches(0)"):
            return compare_gradients(
                self._converted,
                args,
                kwargs,
                target,
                self._recipe.loss,
                scale=scaling.initial if scaling.kind != "none" else 1.0,
                backoff=scaling.backoff_factor if scaling.kind == "dynamic" else None,
                path=self._recipe.path,
            )

    def _train(self, race: Race) -> str:
        """Train to the end of the seed; says why there are fewer steps, if there are."""
        of_seed = f" of seed {race.seed}" if race.seed else ""
        while race.steps < self._steps:
            if self._should_stop():
                return self._interrupt(race) + of_seed
            try:
                stepped = race.step()
            except AmpConvertError:
                if not self._should_stop():  # Ctrl-C reaches the user's own worker processes too
                    raise
                return self._interrupt(race) + of_seed
            if not stepped:
                if race.steps and self._options.steps is None and self._first is None:
                    return ""  # as many as there are is what was asked for
                many = f"batches for {race.steps} steps only, of {self._steps}"
                return f"train_batches({race.seed}) has {many}"
            self._tick()
            if race.ended:
                return race.ended + of_seed
            self._unsaved += 1
            if self._unsaved >= self._options.checkpoint_every and race.steps < self._steps:
                self._save(race)
        return ""

    def _interrupt(self, race: Race) -> str:
        self._interrupted = True
        if self._save(race):
            where = self._options.checkpoint
            self._say(f"kept in {where}: the same command goes on from there")
        return f"interrupted after {race.steps} of {self._steps} steps"

    def _keep_first(self, run: PairedRun) -> None:
        """Keep the first seed's run. Raises ModelError for a later one that is the same: pairs that
        repeat each other would look like certainty."""
        if self._first is None:
            self._first = run
            if self._options.steps is None and not self._interrupted:
                self._steps = run.steps  # the other seeds make as many
            return
        digests = [
            arm.weights_sha256 for each in (self._first, run) if (arm := each.arm(FP32.name))
        ]
        if run.steps and digests[0] == digests[1]:
            raise ModelError(
                f"FP32 training with seed {run.seed} ends in the very weights of seed 0",
                where=os.path.basename(self._recipe.path),
                mend="Let train_batches(seed) depend on its seed, or define initial_model(seed).",
            )

    # --- the metric over seeds ---

    def _decided(self) -> bool:
        """Whether no further seed is needed."""
        margin = self._options.margin
        if self._options.seeds == 1 or margin is None:
            return True
        self._answer = judge_pairs(
            [pair.fp32 for pair in self._pairs],
            [math.nan if pair.failure else pair.mixed for pair in self._pairs],
            margin,
            lower_is_better=self._lower_is_better,
        )
        return self._answer.seeds_needed == 0

    @property
    def _lower_is_better(self) -> bool:
        return self._metric in (LOSS, TRAIN_LOSS, *self._options.lower_is_better)

    # --- checkpoints ---

    def _save(self, race: Race) -> bool:
        """Write the checkpoint, where one is wanted; whether it is there."""
        self._unsaved, folder = 0, self._options.checkpoint
        if folder is None:
            return False
        try:
            state = {
                "seed": race.seed,
                "race": race.state(),
                "metric": self._metric,
                "pairs": [dataclasses.asdict(pair) for pair in self._pairs],
                "first": None if self._first is None else dataclasses.asdict(self._first),
            }
            checkpoint.save(
                folder, state, fingerprint=fingerprint(self._converted, self._recipe, self._options)
            )
        except UsageError as error:
            self._say(str(error))
            return False
        return True

    def _resume(self) -> dict[str, Any] | None:
        folder = self._options.checkpoint
        state = (
            checkpoint.load(folder, fingerprint(self._converted, self._recipe, self._options))
            if folder is not None
            else None
        )
        if state is None or folder is None:
            return None
        with checkpoint.applied(folder):
            seed, steps = state["seed"], state["race"]["steps"]
            most = self._options.steps or MOST_STEPS
            if seed not in range(self._options.seeds) or steps not in range(most + 1):
                raise ValueError(f"{steps} steps of seed {seed}")
            self._metric = str(state["metric"])
            self._pairs = TypeAdapter(list[SeedPair]).validate_python(state["pairs"])
            if seed:
                self._keep_first(TypeAdapter(PairedRun).validate_python(state["first"]))
            if self._pairs:
                self._decided()
        of_seed = f" of seed {seed}" if seed else ""
        self._say(f"going on after step {steps}{of_seed}, from the checkpoint {folder}")
        for _ in range(seed * self._steps + steps):
            self._tick()
        return state

    # --- the result ---

    def _parity(self, gradients: GradientParity) -> TrainingParity:
        recipe, data, first = self._scaled, self._data, self._first
        assert first is not None
        return TrainingParity(
            dtype=self._converted.plan.dtype,
            steps=self._options.steps or first.steps,
            ended=self._ended,
            **self._words,
            initial_weights="initial_model(seed)" if data.initial_model else "the model's own",
            loss_scaling=str(recipe.scaling),
            accumulate=recipe.accumulate,
            clip_norm=recipe.clip_norm,
            metric=self._metric,
            lower_is_better=(LOSS, TRAIN_LOSS, *sorted(self._options.lower_is_better)),
            gradients=gradients,
            run=first,
            pairs=tuple(self._pairs) if self._options.seeds > 1 else (),
            noninferiority=self._answer,
            interrupted=self._interrupted,
        )
