"""Jobs that plan a model and give no verdict: audit, explain, tune."""

from __future__ import annotations

from functools import partial

import torch

from amp_convert import optional_stages as stages
from amp_convert.core import device as devices
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.number_formats import from_name
from amp_convert.core.optional_packages import require
from amp_convert.core.progress import Logged, Progress
from amp_convert.loading.model_file import load_case
from amp_convert.loading.settings import Settings
from amp_convert.loading.user_functions import score
from amp_convert.plan.plan import Plan
from amp_convert.prepare import batches_of, fitting_batches, prepare
from amp_convert.report import (
    ModelInfo,
    Unchecked,
)
from amp_convert.report.assemble import model_info
from amp_convert.report.sections.explanation import Explanation, explanation
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rules.load import load_rules
from amp_convert.tune.results import Cost, Goals, Tuned
from amp_convert.validate.inference.layer_times import layer_times


def tune(
    source: str,
    settings: Settings,
    goals: Goals,
    progress: Progress,
    *,
    cost: Cost | None = None,
    blocks: bool = False,
) -> Tuned:
    """The cheapest plan for the model at `source` that reaches the goals, on its first
    `settings.calibrate` eval batches. Without a `cost`, prices are measured where the device has
    fast kernels for the dtype. Raises UnsupportedModelError for a model captured in parts."""
    load_rules(settings.rules)
    require("tune", "scipy")
    from amp_convert.tune.trials import TURNS, Bench
    from amp_convert.tune.tuning import MOST_TRIALS, Scores
    from amp_convert.tune.tuning import tune as search
    from amp_convert.tune.units import make_units

    progress = Logged(progress)
    progress.stage("load the model")
    torch.manual_seed(0)
    prepared = prepare(load_case(source), settings, progress, judges=False, train=False)
    case, captured, dtype = prepared.case, prepared.captured, from_name(settings.dtype)
    if not captured.is_whole:
        raise UnsupportedModelError(
            "plans are tuned for models that are captured whole, and this one is in parts",
            mend="Write a rules file by hand: a report says which layers the error comes from.",
        )
    given = batches_of(case, prepared.device, settings.calibrate)
    batches = [*fitting_batches(captured, given, "eval_batches")]
    if cost is None:
        cost = Cost.MODEL if devices.slow_kernels(captured.device, dtype) else Cost.MEASURED
    bench = Bench(
        captured,
        prepared.rules,
        prepared.stats,
        dtype,
        batches,
        partial(score, case),
        TURNS if cost is Cost.MEASURED or goals.speed is not None else 1,
    )
    progress.stage("attribute the error")
    lowest = bench.lowest()
    budget = bench.budget(lowest)
    times = layer_times(lowest, case.args, case.kwargs) if cost is Cost.MEASURED else ()
    units, borders = make_units(lowest, budget, times, cost, blocks=blocks)
    progress.stage("try plans", 2 * MOST_TRIALS)
    scores = Scores(units, borders, cost)
    return search(bench, scores, goals, case.lower_is_better, progress.advance)


def explain(
    source: str,
    settings: Settings,
    progress: Progress,
    *,
    layer: str | None = None,
    node: str | None = None,
) -> Explanation:
    """Everything about one layer or node of the model at `source`. Raises UsageError for one that
    there is not."""
    load_rules(settings.rules)
    progress = Logged(progress)
    progress.stage("load the model")
    torch.manual_seed(0)
    prepared = prepare(load_case(source), settings, progress, judges=False, train=False)
    case, dtype = prepared.case, from_name(settings.dtype)
    progress.stage("plan")
    converted = convert_captured(prepared.captured, prepared.rules, prepared.stats, dtype)
    budget = stages.attribute_(prepared, converted, settings, progress)
    return explanation(
        converted.plan,
        prepared.stats,
        budget if budget is not None else Unchecked(reason="no node computes in low precision"),
        layer_times(converted, case.args, case.kwargs),
        layer=layer,
        node=node,
    )


def audit(source: str, settings: Settings, progress: Progress) -> tuple[Plan, ModelInfo]:
    """Plan the model at `source` as `convert` would; convert nothing.

    Kernels are tried on the example inputs, as they are for `convert`, so both give one plan.
    """
    load_rules(settings.rules)
    devices.choose(settings.device)
    progress.stage("load the model")
    torch.manual_seed(0)
    prepared = prepare(load_case(source), settings, Logged(progress), judges=False)
    progress.stage("plan")
    dtype = from_name(settings.dtype)
    converted = convert_captured(prepared.captured, prepared.rules, prepared.stats, dtype)
    return converted.plan, model_info(prepared.case)
