"""The training section of report.md."""

from __future__ import annotations

from amp_convert.report import text as fmt
from amp_convert.report.model import Unchecked
from amp_convert.report.sections.gradient_summary import (
    SUBNORMAL,
    UNDERFLOW,
    advice_text,
    gradient_remarks,
    gradient_text,
    range_note,
    range_rows,
    worst_gradients,
)
from amp_convert.report.sections.training_summary import (
    ARMS_TEXT,
    arms_shown,
    bounds_text,
    look_rows,
    noise_text,
    pair_rows,
    remarks,
    settings,
    steps_text,
    training_rows,
)
from amp_convert.report.writers.markdown import code, escape, table
from amp_convert.validate.training.gradient_results import GradientParity
from amp_convert.validate.training.noninferiority import Noninferiority
from amp_convert.validate.training.results import TrainingParity


def training_lines(training: TrainingParity | Unchecked) -> list[str]:
    """The lines of the section."""
    if isinstance(training, Unchecked):
        return ["## Training", "", f"Not checked: {escape(training.reason)}."]
    return [
        "## Training",
        "",
        f"{escape(steps_text(training))}. {ARMS_TEXT}.",
        *(f"**{escape(remark)}.**" for remark in remarks(training)),
        "",
        *_arms(training),
        *(_seeds(training, training.noninferiority) if training.noninferiority else []),
        *_gradients(training.gradients),
        *_worst(training.gradients),
    ]


def _arms(training: TrainingParity) -> list[str]:
    arms = arms_shown(training.run)
    rows = [
        [escape(row.title), *(row.values.get(arm, "") for arm in arms)]
        for row in training_rows(training)
    ]
    noise = noise_text(training)
    how = (f"- {name}: {escape(value)}" for name, value in settings(training))
    figures = table(["", *arms], rows, numbers="1234") if rows else []
    return [*figures, "", *([f"{noise}.", ""] if noise else []), *how, ""]


def _seeds(training: TrainingParity, answer: Noninferiority) -> list[str]:
    looks = [
        [str(look.pairs), look.mean, look.std, look.lower, look.upper, look.answer]
        for look in look_rows(answer)
    ]
    pairs = [
        [str(pair.seed), pair.fp32, pair.mixed, pair.difference, escape(pair.failure)]
        for pair in pair_rows(training)
    ]
    columns = ["pairs", "mean difference", "standard deviation", "lower bound", "upper bound"]
    return [
        "### Over seeds",
        "",
        f"**{answer.status.upper()}**: {code(training.metric)}, {escape(answer.reason)}.",
        "",
        *([*table([*columns, "answer"], looks, numbers="01234"), ""] if looks else []),
        f"{escape(bounds_text(answer))}.",
        "",
        *table(["seed", "FP32", "mixed", "difference", "remark"], pairs, numbers="0123"),
        "",
    ]


def _gradients(gradients: GradientParity) -> list[str]:
    scaled = gradients.scale != 1
    rows = [
        [
            row.of,
            row.nonzero,
            row.largest,
            row.underflow,
            *([row.scaled_underflow] if scaled else []),
            row.subnormal,
            *([row.scaled_subnormal] if scaled else []),
        ]
        for row in range_rows(gradients)
    ]
    borders = [
        text
        for limit in (UNDERFLOW, SUBNORMAL)
        for text in (f"under {limit}", *([f"under {limit}, scaled"] if scaled else []))
    ]
    return [
        "### Gradients of one step",
        "",
        f"All parameters together: {gradient_text(gradients)}.",
        *(f"**{escape(remark)}.**" for remark in gradient_remarks(gradients)),
        f"{range_note(gradients)}.",
        "",
        *table(["FP32 gradients of", "not zero", "largest", *borders], rows, numbers="123456"),
        "",
        f"Recommended static loss scale: {escape(advice_text(gradients))}.",
    ]


def _worst(gradients: GradientParity) -> list[str]:
    rows = [
        [
            fmt.error(row.rel_l2),
            fmt.number(row.cosine),
            row.zeroed,
            code(row.name),
            row.shape,
            row.underflow,
            row.scaled_underflow,
        ]
        for row in worst_gradients(gradients)
    ]
    layer = f"layer under {UNDERFLOW}"
    header = ["error", "cosine", "zeroed", "parameter", "shape", layer, f"{layer}, scaled"]
    if not rows:
        return []
    return [
        "",
        "The parameters whose gradients are furthest from FP32's, and how much of the activation "
        "gradients of their layer FP16 loses:",
        "",
        *table(header, rows, numbers="01256"),
    ]
