"""The headline figures of report.html: a title, a value, and what to compare it with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.report.sections.gradient_summary import share
from amp_convert.report.sections.summary import tolerance, worst_output
from amp_convert.report.sections.training_summary import metric_title
from amp_convert.validate.training.arm_specs import FP32, MIXED
from amp_convert.validate.training.gradient_results import GradientParity
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.verdict import Check


@dataclass(frozen=True)
class Tile:
    """A headline figure: what it is, its value, and what to compare it with."""

    title: str
    value: str
    notes: tuple[str, ...]


def tiles(report: RunReport) -> list[Tile]:
    """The figures against FP32."""
    plan = report.plan
    found = [*_error_tile(report), *_metric_tiles(report), *_cost_tiles(report)]
    nodes = f"{plan.low_nodes:,} of {fmt.count(plan.nodes, 'node')}"
    notes = ("of the multiply-adds", nodes, f"{fmt.count(plan.casts, 'cast')} inserted")
    return [*found, Tile("in low precision", fmt.percent(plan.share_macs_low), notes)]


def _error_tile(report: RunReport) -> list[Tile]:
    inference = report.inference
    mixed = worst_output(inference.outputs) if inference else None
    if inference is None or mixed is None:
        return []
    autocast = worst_output(inference.autocast_outputs)
    limit = tolerance(report)
    notes = [f"native autocast {fmt.error(autocast.rel_l2)}"] if autocast else []
    notes += [f"limit {fmt.error(limit)}"] if limit is not None else []
    return [Tile("output error", fmt.error(mixed.rel_l2), tuple(notes))]


def _metric_tiles(report: RunReport) -> list[Tile]:
    metrics = report.inference.metrics[:2] if report.inference else ()
    return [_against_fp32(metric.name, metric.fp32, metric.mixed) for metric in metrics]


def _against_fp32(title: str, fp32: float, mixed: float) -> Tile:
    notes = (f"FP32 {fmt.number(fp32)}", f"change {fmt.change(fp32, mixed)}")
    return Tile(fmt.clip(fmt.printable(title), 40), fmt.number(mixed), notes)


def _cost_tiles(report: RunReport) -> list[Tile]:
    costs = {cost.arm: cost for cost in report.inference.costs} if report.inference else {}
    fp32, mixed = costs.get("fp32"), costs.get("mixed")
    if fp32 is None or mixed is None:
        return []
    found = _time_tile("time", fp32.milliseconds, mixed.milliseconds)
    if fp32.peak_bytes and mixed.peak_bytes:
        ratio = f"{mixed.peak_bytes / fp32.peak_bytes:.2f} × the memory"
        notes = (f"FP32 {fmt.mebibytes(fp32.peak_bytes)}", ratio)
        found.append(Tile("peak memory", fmt.mebibytes(mixed.peak_bytes), notes))
    return found


def _time_tile(title: str, fp32: float | None, mixed: float | None) -> list[Tile]:
    if not fp32 or not mixed:
        return []
    notes = (f"FP32 {fmt.milliseconds(fp32)}", f"{fp32 / mixed:.2f} × as fast")
    return [Tile(title, fmt.milliseconds(mixed), notes)]


# --- training ---


def training_tiles(parity: TrainingParity, checks: Iterable[Check]) -> list[Tile]:
    """The figures of training; `checks` tell the limits that they were held to."""
    limits = {check.name: check.threshold for check in checks}
    fp32, mixed = parity.run.arm(FP32.name), parity.run.arm(MIXED.name)
    gradients = _gradient_tiles(parity.gradients, limits.get("training.gradients"))
    if fp32 is None or mixed is None or not mixed.losses:
        return gradients
    losses = [_against_fp32("loss, last quarter", fp32.last_loss, mixed.last_loss)]
    if parity.metric in fp32.metrics and parity.metric in mixed.metrics:
        before, after = fp32.metrics[parity.metric], mixed.metrics[parity.metric]
        losses.append(_against_fp32(metric_title(parity.metric), before, after))
    time = _time_tile("time per step", fp32.milliseconds, mixed.milliseconds)
    return [*_seeds_tile(parity), *losses, *gradients, *time]


def _seeds_tile(parity: TrainingParity) -> list[Tile]:
    answer = parity.noninferiority
    if answer is None:
        return []
    notes = (answer.status, fmt.count(answer.pairs, "pair"), f"margin {answer.margin.value:.4g}")
    mean = "not yet" if answer.last is None else f"{answer.last.mean:+.3g}"
    return [Tile("difference over seeds", mean, notes)]


def _gradient_tiles(gradients: GradientParity, limit: float | str | None) -> list[Tile]:
    total, activations = gradients.total, gradients.activation_range
    found = []
    if total.rel_l2 is not None:
        notes = [f"cosine {fmt.number(total.cosine)}"]
        notes += [f"limit {fmt.error(limit)}"] if isinstance(limit, float) else []
        found.append(Tile("gradient error", fmt.error(total.rel_l2), tuple(notes)))
    if gradients.scale != 1 and activations.underflow_fraction is not None:
        notes = ["of activation gradients", f"{share(activations.underflow_fraction)} unscaled"]
        scaled = share(activations.scaled_underflow_fraction)
        found.append(Tile("FP16 underflow", scaled, tuple(notes)))
    return found
