"""FP32 training over seeds of its own: one metric, and how far it spreads, kept as a file.

The spread of a metric over FP32 seeds is the yardstick for how much worse mixed training may be. It
has to come from other seeds than those under test, and from before the test, or an accident in them
would both widen the margin and shift the difference: so it is measured once, on seeds from
`FIRST_SEED` up, and stored with the conditions that it was measured under. Under any others it says
nothing, and is refused. See `noninferiority`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from torch import nn

from amp_convert import __version__
from amp_convert.core.batches import LOSS, TRAIN_LOSS
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.files.atomic_files import try_to_write, write_file
from amp_convert.core.files.reading import parse_json, read_file
from amp_convert.validate.training.arm_specs import FP32
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin, require_spread
from amp_convert.validate.training.noninferiority import LOOKS
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training

FIRST_SEED = 1000
_KIND: Literal["amp-convert FP32 training baseline"] = "amp-convert FP32 training baseline"
_MAKE_ANEW = "Make it anew with amp-convert fp32-seeds."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Conditions(_Part):
    """What the spread of a metric depends on.

    `digest` is the SHA-256 of the model file, `device` a type ("cpu", "cuda"), `batches` how many
    eval batches are taken at most. A step takes `accumulate` batches, and clips gradients to
    `clip_norm` where that is not None.
    """

    digest: str
    device: str
    steps: int
    accumulate: int
    clip_norm: float | None
    batches: int


class SeedSpread(_Part):
    """`values` has the metric of each of `seeds` after FP32 training under `conditions`.

    `created` is an ISO 8601 time in UTC.
    """

    kind: Literal["amp-convert FP32 training baseline"]
    schema_version: Literal[1]
    amp_convert: str
    created: str
    model: str
    conditions: Conditions
    metric: str
    lower_is_better: bool
    seeds: tuple[Annotated[int, Field(ge=LOOKS[-1])], ...]  # the test's are under it
    values: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _one_value_a_seed(self) -> SeedSpread:
        if not len(self.values) == len(self.seeds) == len(set(self.seeds)):
            raise ValueError("there is not one value for each seed")
        return self

    @property
    def margin(self) -> Margin:
        """What the spread allows. Raises UsageError where it allows nothing."""
        return Margin.from_spread(self.values)

    @property
    def summary(self) -> str:
        """One line: the metric's mean and spread, and the margin that it gives."""
        mean, margin = statistics.mean(self.values), self.margin
        return (
            f"{self.metric} {mean:.6g} ± {margin.std:.3g} over {len(self.values)} seeds of "
            f"{self.conditions.steps} steps; margin {margin.value:.3g}"
        )

    @property
    def text(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=2) + "\n"

    def margin_for(
        self, conditions: Conditions, metric: str | None, lower_is_better: Collection[str]
    ) -> Margin:
        """The margin for a test of `metric` (None: of the file's) under `conditions`.

        Raises UsageError where anything differs, and for a spread that gives no margin.
        """
        for name in Conditions.model_fields:
            _refuse_other(name, getattr(self.conditions, name), getattr(conditions, name))
        _refuse_other("train_metric", self.metric, metric or self.metric)
        lower = _is_lower_better(self.metric, lower_is_better)
        _refuse_other("lower_is_better", self.lower_is_better, lower)
        return self.margin

    def write(self, path: Path) -> None:
        """Write the file whole, or not at all. Raises UsageError as `check_writable` does."""
        with _usage_errors(path):
            _refuse_foreign(path)
            write_file(path, self.text)


def check_writable(path: Path) -> None:
    """Find out before any work that the seeds can be written to `path`.

    Raises UsageError where it cannot, and where `path` holds anything but such a file, since
    that may be a file of the user's.
    """
    with _usage_errors(path):
        _refuse_foreign(path)
        try_to_write(path)


def load_seed_spread(path: Path) -> SeedSpread:
    """What such a file holds. Raises UsageError for one that is not there, or another file."""
    try:
        return SeedSpread.model_validate_json(json.dumps(parse_json(read_file(path))))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", mend=_MAKE_ANEW) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        what = f"{path} is no file of FP32 seeds: {place}: {first['msg']}"
        raise UsageError(what, mend=_MAKE_ANEW) from error
    except ValueError as error:
        raise UsageError(f"{path} is no file of FP32 seeds: {error}", mend=_MAKE_ANEW) from error


def make_seed_spread(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    conditions: Conditions,
    *,
    name: str,
    seeds: int,
    metric: str | None = None,
    lower_is_better: Collection[str] = (),
    tick: Callable[[], None] = lambda: None,
) -> SeedSpread:
    """Train the FP32 model alone over `seeds` seeds; the model is afterwards as it was.

    `metric` None takes the first of the user's metrics, or else a loss. Raises UsageError for fewer
    than 8 seeds, an unknown metric, and one that is the same for all seeds; ModelError where the
    batches run out, or FP32 training fails or has a metric that is no number.
    """
    require_spread(seeds)
    recipe = dataclasses.replace(recipe, scaling=LossScaling("none"))
    numbers, values = range(FIRST_SEED, FIRST_SEED + seeds), []
    with training(model, None):
        for seed in numbers:
            race = Race(model, None, recipe, data, seed, (FP32,), conditions.steps)
            metric = race.name_metric(metric)
            values.append(_trained(race, metric, conditions.steps, recipe.path, tick))
    assert metric is not None
    Margin.from_spread(values)  # where it raises, no run could use the file
    return SeedSpread(
        kind=_KIND,
        schema_version=1,
        amp_convert=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=name,
        conditions=conditions,
        metric=metric,
        lower_is_better=_is_lower_better(metric, lower_is_better),
        seeds=tuple(numbers),
        values=tuple(values),
    )


def _trained(race: Race, metric: str, steps: int, path: str, tick: Callable[[], None]) -> float:
    """The metric after `steps` steps of the race's FP32 arm."""
    place = os.path.basename(path)
    while race.steps < steps:
        if not race.step():
            what = f"train_batches({race.seed}) has batches for {race.steps} of {steps} steps only"
            fewer = f", or give --steps {race.steps}" if race.steps else ""
            raise ModelError(what, where=place, mend=f"Let it give more{fewer}.")
        tick()
        if race.ended:
            what, mend = f"seed {race.seed}: {race.ended}", "Make FP32 training stable first."
            raise ModelError(what, where=place, mend=mend)
    value = race.result().arms[0].metric(metric)
    if not math.isfinite(value):
        what = f"the metric {metric} is {value} after FP32 training from seed {race.seed}"
        raise ModelError(what, where=place, mend="Make FP32 training stable first.")
    return value


def _is_lower_better(metric: str, named: Collection[str]) -> bool:
    return metric in (LOSS, TRAIN_LOSS, *named)


def _refuse_other(name: str, there: Any, here: Any) -> None:
    if there == here:
        return
    flag, mend = f"--{name.replace('_', '-')}", _MAKE_ANEW
    if name == "digest":
        name, there, here = "the model file's SHA-256", there[:12], here[:12]
    elif name != "lower_is_better":
        change = f"Leave {flag} out" if there is None else f"Give {flag} {there}"
        name, mend = flag[2:], f"{change}, or make it anew with amp-convert fp32-seeds."
    was, now = ("none" if value is None else value for value in (there, here))
    what = f"the FP32 seeds are of other training: {name} was {was}, is {now}"
    raise UsageError(what, mend=mend)


def _refuse_foreign(path: Path) -> None:
    try:
        document: Any = parse_json(read_file(path))
    except FileNotFoundError:
        if not path.is_symlink():
            return
        document = None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        what = f"{path} is no file of FP32 seeds, so it is not overwritten"
        raise UsageError(what, mend="Choose another path, or remove that file.")


@contextlib.contextmanager
def _usage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {path}: {why}") from error
