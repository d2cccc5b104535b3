"""A model as it comes -> `Prepared`: on its device, captured, calibrated. What planning needs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Call, Captured
from amp_convert.capture.kept.answers import kept_in
from amp_convert.capture.regions import capture
from amp_convert.core import device as devices
from amp_convert.core.batches import Batch
from amp_convert.core.device import Device
from amp_convert.core.errors import ModelError
from amp_convert.core.files.cache import Cache
from amp_convert.core.number_formats import from_name
from amp_convert.core.progress import Progress
from amp_convert.loading.first_run import check_forward
from amp_convert.loading.model_file import Case
from amp_convert.loading.settings import Settings
from amp_convert.loading.user_functions import user_batches
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.profile.kept_profile import kept_profile
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rules
from amp_convert.validate.training import setup as training_setup

_log = logging.getLogger(__name__)
_Batch = TypeVar("_Batch", bound=tuple[Any, ...])
KEPT_BATCHES = 16
"""What calibration finds on more is not cached: they would have to be in memory at once."""
SHAPES_SEEN, TRAIN_SHAPES_SEEN, MOST_OTHERS = 32, 8, 4
"""How many batches are looked at for sizes that vary, and how many of other sizes are kept."""


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it plans."""

    case: Case
    device: Device
    captured: Captured
    rules: Rules
    stats: RangeStats


def prepare(
    case: Case, settings: Settings, progress: Progress, *, judges: bool, train: bool = True
) -> Prepared:
    """Load onto the device, capture and calibrate. A run that `judges` proves its graphs, and
    measures anew; without `train` the model is captured for inference alone."""
    rules = load_rules(settings.rules)
    device = devices.choose(settings.device)
    case = on_device(case, device.device)
    check_forward(case)
    progress.stage("capture and check against eager FP32")
    with kept_in(Cache.of_user() if settings.cache else None):
        trains = judges and settings.train is not False
        others = other_shapes(case, device, _drawn(settings), train=trains)
        captured = capture(
            case.model,
            case.args,
            case.kwargs,
            train=train,
            proofs=judges,
            others=others,
            dynamic=case.dynamic,
        )
        if judges:
            training_setup.why_not(case, settings, captured)
        progress.stage("calibrate", settings.calibrate if case.eval_batches else 1)
        given = batches_of(case, device, settings.calibrate)
        batches = _ticking(fitting_batches(captured, given, "eval_batches"), progress)
        tried = [from_name(settings.dtype)] if rules.uses_trials else []
        if settings.cache and not judges and settings.calibrate <= KEPT_BATCHES:
            # They may all be one tensor, which the user fills anew for each.
            drawn = [pytree.tree_map_only(torch.Tensor, torch.clone, batch) for batch in batches]
            stats = kept_profile(captured, drawn, tried, probes=rules.uses_probes)
        else:
            stats = profile(
                captured, batches, tried, probes=rules.uses_probes, on_node=progress.node
            )
    return Prepared(case, device, captured, rules, stats)


def on_device(case: Case, device: torch.device) -> Case:
    """The case, its model and example inputs on a device."""
    return dataclasses.replace(
        case,
        model=case.model.to(device),
        args=devices.move(case.args, device),
        kwargs=devices.move(case.kwargs, device),
    )


def batches_of(case: Case, device: Device, at_most: int | None = None) -> Iterator[Batch]:
    """The user's eval batches on the run's device, or else the example inputs as the only one."""
    if case.eval_batches is None:
        yield case.args, case.kwargs, None
        return
    for batch in user_batches("eval_batches", case.eval_batches, case.path, at_most):
        yield devices.move(batch, device.device)


def fitting_batches(captured: Captured, batches: Iterable[_Batch], where: str) -> Iterator[_Batch]:
    """Those batches that the graph takes; the others are left out, with a warning. Raises
    ModelError where it takes none."""
    found, left = False, ""
    for batch in batches:
        if unfit := captured.takes(batch[0], batch[1]):
            left = left or unfit
            _log.warning("a batch of %s is left out: %s", where, unfit)
        else:
            found = True
            yield batch
    if left and not found:
        raise ModelError(left, where=where, mend="Give batches like the example inputs.")


def _drawn(settings: Settings) -> int:
    """How many eval batches a run looks at for their sizes: none that it has no other use for."""
    return min(SHAPES_SEEN, max(settings.calibrate, settings.batches or SHAPES_SEEN))


def other_shapes(case: Case, device: Device, at_most: int, *, train: bool) -> list[Call]:
    """Of the user's first batches those whose tensors have other sizes than the example inputs and
    than one another, a few of them: from these is learnt which dimensions vary."""
    batches = batches_of(case, device, at_most)
    if train:
        batches = chain(batches, _train_batches(case, device))
    seen = {_sizes((case.args, case.kwargs))}
    found: list[Call] = []
    for args, kwargs, _ in batches:
        if (sizes := _sizes((args, kwargs))) not in seen and len(found) < MOST_OTHERS:
            seen.add(sizes)
            found.append((args, kwargs))
    return found


def _train_batches(case: Case, device: Device) -> Iterator[Batch]:
    """The first training batches, as far as there are any: what is wrong with them is told where
    they are trained on."""
    if case.train_batches is None:
        return
    make = partial(case.train_batches, 0)
    try:
        for batch in user_batches("train_batches", make, case.path, TRAIN_SHAPES_SEEN):
            yield devices.move(batch, device.device)
    except ModelError:
        return


def _sizes(call: Call) -> tuple[torch.Size, ...]:
    """The sizes of a call's tensors, but for the first of each, which is dynamic anyway."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    return tuple(t.shape[1:] for t in tensors)


def _ticking(batches: Iterator[Batch], progress: Progress) -> Iterator[Call]:
    for args, kwargs, _ in batches:
        yield args, kwargs
        progress.advance()
