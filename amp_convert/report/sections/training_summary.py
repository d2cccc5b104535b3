"""What training showed, drawn from a `TrainingParity` once so that every writer says the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from amp_convert.core.batches import LOSS, TRAIN_LOSS
from amp_convert.report import text as fmt
from amp_convert.validate.training.arm_specs import ARMS, FP32, MIXED, NOISE
from amp_convert.validate.training.noninferiority import ALPHA, Look, Noninferiority
from amp_convert.validate.training.results import (
    ArmRecord,
    PairedRun,
    TrainingParity,
)
from amp_convert.verdict.training_run_checks import NOISE_FACTOR

ARMS_TEXT = (
    "All arms start from the same weights and see the same batches and random numbers. Autocast is "
    "the original under native torch.autocast with GradScaler, noise is FP32 from weights nudged "
    "by one ULP. Weight drift is relative to how far FP32's weights have moved"
)


@dataclass(frozen=True)
class TrainingRow:
    """One quantity, and its formatted value by arm; an empty or missing value does not apply.

    `note` and rows of `detail` are left out where room is short.
    """

    quantity: str
    values: Mapping[str, str]
    note: str = ""
    detail: bool = False

    @property
    def title(self) -> str:
        """The quantity with its note."""
        return f"{self.quantity} ({self.note})" if self.note else self.quantity


@dataclass(frozen=True)
class PairRow:
    """One seed. A difference above 0 means that mixed is better."""

    seed: int
    fp32: str
    mixed: str
    difference: str
    failure: str


@dataclass(frozen=True)
class LookRow:
    """One look at the differences; `answer` is what it said, "go on" if nothing."""

    pairs: int
    mean: str
    std: str
    lower: str
    upper: str
    answer: str


# --- the arms ---


def arms_shown(run: PairedRun) -> list[str]:
    """The arms that made a step, in the order of their columns."""
    found = {arm.arm for arm in run.arms if arm.losses}
    return [spec.name for spec in ARMS if spec.name in found]


def training_rows(parity: TrainingParity) -> list[TrainingRow]:
    """The figures of each arm, one row a quantity; what no arm has is left out."""
    run = parity.run
    fp32 = run.arm(FP32.name)
    base = fp32.milliseconds if fp32 else None
    names = dict.fromkeys(name for arm in run.arms for name in arm.metrics)
    rows = [
        _row(run, "loss, first step", lambda arm: fmt.number(arm.first_loss)),
        _row(run, "loss, last quarter", lambda arm: fmt.number(arm.last_loss)),
        *(_metric_row(parity, name) for name in names),
        _row(run, "loss drift from FP32", partial(_difference, fp32)),
        _row(run, "weight drift from FP32", lambda arm: fmt.error(arm.drift)),
        _row(run, "steps skipped", lambda arm: f"{len(arm.skipped)}" if arm.scales else ""),
        _row(run, "loss scale", _scales),
        _row(run, "gradient norm, median", _norm, detail=True),
        _row(run, "weights moved, FP32's as 1", lambda arm: fmt.number(arm.moved), detail=True),
        _row(run, "time per step", lambda arm: fmt.milliseconds(arm.milliseconds)),
        _row(run, "time, FP32's as 1", lambda arm: _ratio(arm.milliseconds, base), detail=True),
        _row(run, "peak memory", lambda arm: fmt.mebibytes(arm.peak_bytes)),
    ]
    return [row for row in rows if any(row.values.values())]


def _row(
    run: PairedRun, quantity: str, value: Callable[[ArmRecord], str], *, detail: bool = False
) -> TrainingRow:
    values = {arm.arm: value(arm) for arm in run.arms if arm.losses}
    return TrainingRow(quantity, values, detail=detail)


def _metric_row(parity: TrainingParity, name: str) -> TrainingRow:
    row = _row(parity.run, metric_title(name), lambda arm: fmt.number(arm.metrics.get(name)))
    lower = name in parity.lower_is_better and name != LOSS
    before = parity.run.initial_metrics.get(name)
    notes = ["lower is better"] if lower else []
    notes += [f"{fmt.number(before)} before training"] if before is not None else []
    return replace(row, note=", ".join(notes))


def metric_title(name: str) -> str:
    """A metric as a quantity."""
    if name == LOSS:
        return "loss, eval batches"
    return "loss, last quarter" if name == TRAIN_LOSS else fmt.printable(name)


def _difference(fp32: ArmRecord | None, arm: ArmRecord) -> str:
    """Of the losses over the last quarter, unsigned."""
    return "" if fp32 is None else fmt.error(abs(arm.last_loss - fp32.last_loss))


def _scales(arm: ArmRecord) -> str:
    if not arm.scales:
        return ""
    first, last = fmt.scale(arm.scales[0]), fmt.scale(arm.scales[-1])
    return first if set(arm.scales) == {arm.scales[0]} else f"{first}→{last}"


def _norm(arm: ArmRecord) -> str:
    # A NaN is as good as infinite here, and has a place in the order of numbers.
    norms = [math.inf if math.isnan(norm) else norm for norm in arm.gradient_norms]
    return fmt.number(statistics.median(norms)) if norms else ""


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3g}" if value is not None and base else ""


def steps_text(parity: TrainingParity) -> str:
    """ "50 steps of AdamW, learning rate 0.003"."""
    return f"{fmt.count(parity.run.steps, 'step')} of {parity.optimizer}"


def remarks(parity: TrainingParity) -> list[str]:
    """What a reader of the figures has to know: why training ended early, and which arms did."""
    found = [parity.ended] if parity.ended else []
    return found + [
        f"{arm.arm} stopped: {arm.note}"
        for arm in parity.run.arms
        if arm.note and arm.note not in parity.ended
    ]


def settings(parity: TrainingParity) -> list[tuple[str, str]]:
    """How the arms were trained, by name."""
    steps = f"{parity.run.steps:,}"
    if parity.run.steps != parity.steps:
        steps += f" of {parity.steps:,}"
    clip = "none" if parity.clip_norm is None else f"to an L2 norm of {parity.clip_norm:g}"
    judged = [("judged metric", parity.metric)] if parity.noninferiority else []
    return [
        ("steps", steps),
        ("optimizer", parity.optimizer),
        ("schedule", parity.schedule),
        ("initial weights", parity.initial_weights),
        ("batches a step", f"{parity.accumulate}"),
        ("gradient clipping", clip),
        ("loss scaling", parity.loss_scaling),
        ("seed", f"{parity.run.seed}"),
        *judged,
    ]


def noise_text(parity: TrainingParity) -> str:
    """Whether the mixed arm differs from FP32 by more than chaos; empty where that is unknown."""
    run = parity.run
    fp32, mixed, noise = run.arm(FP32.name), run.arm(MIXED.name), run.arm(NOISE.name)
    if fp32 is None or mixed is None or noise is None:
        return ""
    own, other = (abs(arm.last_loss - fp32.last_loss) for arm in (noise, mixed))
    if not (math.isfinite(own) and math.isfinite(other)):
        return ""
    if other == 0:
        return "the mixed arm ends with the very loss of FP32"
    nudged = "FP32 from weights nudged by one ULP ends"
    if other <= NOISE_FACTOR * own:
        return (
            f"{nudged} about as far from FP32's loss as the mixed arm does: what that differs by "
            "cannot be told from chaos"
        )
    times = f"{float(f'{other / own:.2g}'):,.0f}" if other < 1e6 * own else "over a million"
    near = f"{times} times nearer to FP32's loss than the mixed arm does"
    found = f"{nudged} {near if own else 'with the very loss of FP32'}"
    return f"{found}: what the mixed arm differs by is its precision, not chaos"


# --- seeds ---


def pair_rows(parity: TrainingParity) -> list[PairRow]:
    """One row a seed."""
    sign = -1 if parity.metric in parity.lower_is_better else 1
    return [
        PairRow(
            pair.seed,
            fmt.number(pair.fp32),
            fmt.number(pair.mixed),
            _signed(sign * (pair.mixed - pair.fp32)),
            pair.failure,
        )
        for pair in parity.pairs
    ]


def look_rows(answer: Noninferiority) -> list[LookRow]:
    """One row a look, in order."""
    return [
        LookRow(
            look.n,
            _signed(look.mean),
            fmt.number(look.std),
            _signed(look.lower),
            _signed(look.upper),
            _answer(answer, look),
        )
        for look in answer.looks
    ]


def _answer(answer: Noninferiority, look: Look) -> str:
    if look.status == "inconclusive" and (answer.seeds_needed or look != answer.last):
        return "go on"
    return look.status


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.4g}"


def bounds_text(answer: Noninferiority) -> str:
    """What the columns of `look_rows` mean."""
    return (
        "Above 0, mixed is better. Each bound holds with "
        f"{100 * (1 - ALPHA):.1f} % confidence. Pass when the lower one is above "
        f"{-answer.margin.value:.4g} (the margin), fail when the upper one is below that"
    )
