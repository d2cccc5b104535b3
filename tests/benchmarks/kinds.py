"""`make kinds`: models of many kinds, and whether each ends in a verdict or in a clear refusal.

Each model of `kinds_models` is converted to FP16 with default settings and judged end to end, its
training included where it has a loss. No verdict is expected: the table is there to be read. An
exception that amp-convert did not foresee is a fault, and so is a message that owns up to one; then
the program ends with 1.

`python -m tests.benchmarks.kinds [NAME ...] [--markdown FILE]` takes some of the models, and writes
the table to a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch

import amp_convert as amp
from amp_convert.capture.captured import Captured
from amp_convert.core.errors import AmpConvertError, UnsupportedModelError, first_line
from amp_convert.pipeline import Run
from amp_convert.validate.inference.results import OutputError
from amp_convert.validate.training.results import TrainingParity
from tests.benchmarks.kinds_models import KINDS, Kind
from tests.benchmarks.table_program import run, table

DTYPE = torch.float16
FAULT = "FAULT"
OWN_FAULT = "a fault in amp-convert"
NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """One line of the table; `why` stands below it where the verdict is no pass."""

    model: str
    field: str
    captured: str = NOTHING
    low: str = NOTHING
    error: str = NOTHING
    autocast: str = NOTHING
    training: str = NOTHING
    verdict: str = ""
    why: str = ""

    @property
    def cells(self) -> list[str]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "why"]


HEADS = (
    "model", "field", "captured", "low multiply-adds", "worst output error", "autocast's",
    "training", "verdict",
)  # fmt: skip


def judged(kind: Kind) -> Row:
    """The row of one model, whatever comes of it."""
    if kind.missing:
        return Row(kind.name, kind.field, verdict="skipped", why=kind.missing)
    model = kind.trained()
    try:
        run = amp.check(
            model,
            kind.example(),
            dtype=DTYPE,
            eval_batches=kind.evals,
            train_batches=kind.train_batches if kind.loss else None,
            loss=kind.loss,
            optimizer=kind.optimizer,
            initial_model=kind.initial,
            name=kind.name,
        )
    except AmpConvertError as error:
        refused = "refused" if isinstance(error, UnsupportedModelError) else "error"
        verdict = FAULT if OWN_FAULT in str(error) else f"{refused} ({error.exit_code})"
        return Row(kind.name, kind.field, verdict=verdict, why=str(error))
    except Exception as error:  # noqa: BLE001  a fault, to be shown beside the others
        why = f"{type(error).__name__}: {first_line(error)}"
        return Row(kind.name, kind.field, verdict=FAULT, why=why)
    return _row(kind, run)


def _row(kind: Kind, run: Run) -> Row:
    checks, inference = run.verdict.checks, run.report.inference
    assert inference is not None
    decisive = [c for c in checks if c.status == "fail"] or [
        c for c in checks if c.required and c.status == "unchecked"
    ]
    passed = run.verdict.status == "pass"
    why = "" if passed else "; ".join(f"{check.name}: {check.reason}" for check in decisive)
    if not inference.autocast_outputs:
        why += f" [autocast: {inference.autocast_reason}]"
    return Row(
        kind.name,
        kind.field,
        _how_captured(run.converted.captured),
        f"{run.plan.share_macs_low():.0%}",
        _worst(inference.outputs),
        _worst(inference.autocast_outputs),
        _training(kind, run),
        FAULT if OWN_FAULT in why else str(run.verdict.status),
        why,
    )


def _how_captured(captured: Captured) -> str:
    if captured.is_whole:
        return "whole"
    eager = {part.reason.partition(" (")[0]: part.layer for part in captured.uncaptured}
    left = "; ".join(f"{layer or 'top level'} eager: {why}" for why, layer in eager.items())
    count = len(captured.regions)
    return f"{count} part{'s' * (count > 1)}; {left}"


def _worst(outputs: Iterable[OutputError]) -> str:
    """The largest relative L2 error. Integers have none."""
    errors = [output.rel_l2 for output in outputs if output.elements]
    return f"{max(errors):.1e}" if errors else NOTHING


def _training(kind: Kind, run: Run) -> str:
    training = run.report.training
    if isinstance(training, TrainingParity):
        return f"compared, {training.run.steps} steps"
    return f"unchecked: {training.reason}" if kind.loss else "none"


def text(row: Row) -> str:
    """A row for the terminal."""
    line = f"{row.model:22} {row.verdict:13} {row.low:>5} {row.error:>8} {row.autocast:>8}"
    line += f"  {row.captured} | {row.training}"
    return f"{line}\n    {row.why}" if row.why else line


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table as a page."""
    lines = [
        "# Models of many kinds",
        "",
        "What amp-convert says of small models whose code was written as their authors would write "
        "it, with default settings. They stand in `tests/benchmarks/kinds_models/`.",
        "",
        f"Made on a CPU, to {str(DTYPE).removeprefix('torch.')}, with PyTorch {torch.__version__}, "
        f"by `{command}`.",
        "",
        "Errors are relative L2 errors against FP32, of the worst output. `autocast's` is that of "
        "native `torch.autocast`. What decided where the verdict is no pass stands below the "
        "table.",
        "",
        *table(HEADS, [row.cells for row in rows]),
    ]
    lines += ["", "## Why not", ""]
    lines += [f"- **{row.model}**, {row.verdict}: {row.why.strip()}" for row in rows if row.why]
    return "\n".join([*lines, ""])


def main() -> int:
    """Judge, print and write; 1 where there is a fault."""
    return run(
        "tests.benchmarks.kinds",
        {kind.name: partial(judged, kind) for kind in KINDS},
        text,
        markdown,
        lambda row: row.verdict == FAULT,
    )


if __name__ == "__main__":
    sys.exit(main())
