"""`make architectures`: what amp-convert does for public architectures, row by row.

Each is converted to FP16 on the CPU from tiny configurations and random weights, and judged by
`amp.check` with training, ONNX and an archive. No verdict is given: of random weights it would say
little. What is looked at is what works, and how near to FP32 and to native autocast it is.

`python -m tests.benchmarks.architectures [NAME ...] [--markdown FILE]` takes some of them, and
writes the table to a file.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.capture.captured import Captured
from amp_convert.core.errors import AmpConvertError, first_line
from amp_convert.core.tree_paths import named_leaves
from amp_convert.pipeline import Run
from amp_convert.report import OnnxSection, RunReport, Unchecked
from amp_convert.validate.inference.results import OutputError
from amp_convert.validate.training.results import TrainingParity
from tests.benchmarks.architectures_models import ARCHITECTURES, Architecture
from tests.benchmarks.table_program import line, run, table

DTYPE = torch.float16
NOTHING, FAULT = "-", "FAULT"


@dataclass(frozen=True)
class Row:
    """One line of the table, as text; `notes` stand below it."""

    model: str
    source: str
    captured: str = NOTHING
    low: str = NOTHING
    error: str = NOTHING
    autocast: str = NOTHING
    sizes: str = NOTHING
    eager: str = NOTHING
    gradients: str = NOTHING
    onnx: str = NOTHING
    archive: str = NOTHING
    load: str = NOTHING
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> list[str]:
        return list(astuple(self)[:-1])


HEADS = (
    "model", "from", "captured", "low multiply-adds", "output error", "autocast's",
    "sizes that vary", "plan on eager", "gradient error", "ONNX", "archive", "load",
)  # fmt: skip


def loss(outputs: Any, target: Any) -> torch.Tensor:
    """Something that every output has a part in."""
    leaves = [leaf for _, leaf in named_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return sum(
        (t.float().square().mean() for t in leaves if t.is_floating_point()), torch.zeros(())
    )


def judged(one: Architecture) -> Row:
    """The row of one architecture, whatever comes of it."""
    if one.missing:
        return Row(one.name, one.source, notes=(one.missing,))
    example, other, _ = one.sizes
    drawn = ((3, example), (2, other), (4, example))
    evals = [(one.inputs(*sizes, seed), None) for seed, sizes in enumerate(drawn, 1)]
    training = [(one.inputs(2, example, 9 + i), None) for i in range(3)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = amp.check(
                one.model(),
                one.inputs(2, example),
                dtype=DTYPE,
                eval_batches=evals,
                train_batches=lambda seed: training,
                loss=loss,
                out=folder,
                onnx=True,
                save=True,
            )
        return _row(one, run)
    except AmpConvertError as error:
        return Row(one.name, one.source, notes=(str(error),))
    except Exception as error:  # noqa: BLE001  a fault, to be shown beside the others
        return Row(
            one.name, one.source, notes=(f"FAULT {type(error).__name__}: {first_line(error)}",)
        )


def _row(one: Architecture, run: Run) -> Row:
    report, captured = run.report, run.converted.captured
    inference = report.inference
    assert inference is not None
    notes: list[str] = []
    if not inference.autocast_outputs:
        notes.append(f"autocast: {inference.autocast_reason}")
    notes += [f"{part.layer or 'top level'} eager: {part.reason}" for part in captured.uncaptured]
    return Row(
        model=one.name,
        source=one.source,
        captured="whole" if captured.is_whole else f"{len(captured.regions)} parts",
        low=f"{run.plan.share_macs_low():.0%}",
        error=_worst(inference.outputs),
        autocast=_worst(inference.autocast_outputs),
        sizes=_sizes(one, captured, notes),
        eager=_eager(report),
        gradients=_gradients(report, notes),
        onnx=_onnx(report, notes),
        archive=_archive(report, notes),
        load=_loaded(one, run, notes),
        notes=tuple(notes),
    )


def _worst(outputs: Iterable[OutputError]) -> str:
    errors = [output.rel_l2 for output in outputs if output.elements]
    return f"{max(errors):.1e}" if errors else NOTHING


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _sizes(one: Architecture, captured: Captured, notes: list[str]) -> str:
    """What the graph takes besides the example's sizes: another batch, and a third size."""
    if not captured.is_whole:
        return "operation by operation"
    example, _, third = one.sizes
    found = []
    for word, batch, size in (("batch", 5, example), ("size", 2, third)):
        why = captured.takes(*_call(one.inputs(batch, size)))
        if why:
            notes.append(f"{word}: {why}")
        elif word == "batch" or third != example:
            found.append(word)
    notes += [
        f"sizes are fixed in {fixed.mode} mode: {fixed.reason}" for fixed in captured.fixed_sizes
    ]
    return " and ".join(found) or "none"


def _eager(report: RunReport) -> str:
    found = report.inference.eager_plan if report.inference else None
    if found is None or found.reason:
        return found.reason if found else NOTHING
    return "same bits" if found.identical else f"{found.rel_l2:.1e} apart"


def _gradients(report: RunReport, notes: list[str]) -> str:
    if isinstance(report.training, TrainingParity):
        return f"{report.training.gradients.total.rel_l2:.1e}"
    notes.append(f"training: {report.training.reason}")
    return NOTHING


def _onnx(report: RunReport, notes: list[str]) -> str:
    if not isinstance(report.onnx, OnnxSection):
        notes.append(f"ONNX: {report.onnx.reason}")
        return NOTHING
    runs = {run.arm: run for run in report.onnx.parity.runs}
    run = runs["optimised"]
    if run.failure:
        notes.append(f"ONNX: {run.failure}")
        return "written"
    return _worst(output.against_fp32 for output in run.outputs)


def _archive(report: RunReport, notes: list[str]) -> str:
    found = report.archive
    if isinstance(found, Unchecked):
        notes.append(f"archive: {found.reason}")
        return NOTHING
    if found.failure:
        notes.append(f"archive: {found.failure}")
        return "written"
    return "same bits" if found.identical else _worst(found.outputs)


def _loaded(one: Architecture, run: Run, notes: list[str]) -> str:
    """Saved to train on, and loaded into a model of other weights: is it the same?"""
    args, kwargs = _call(one.inputs(2, one.sizes[0]))
    mixed = run.converted.eval()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            amp.save(mixed, path)
            other = copy.deepcopy(mixed.captured.model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            evals = [one.inputs(3, one.sizes[0], 1), one.inputs(2, one.sizes[1], 2)]
            again = amp.load(path, other, args, kwargs, calibration=evals).eval()
        with torch.no_grad():
            torch.manual_seed(0)
            want = pytree.tree_leaves(dict(named_leaves(mixed(*args, **kwargs))))
            torch.manual_seed(0)
            have = pytree.tree_leaves(dict(named_leaves(again(*args, **kwargs))))
    except AmpConvertError as error:
        notes.append(f"load: {error}")
        return NOTHING
    pairs = [(a, b) for a, b in zip(want, have, strict=True) if isinstance(a, torch.Tensor)]
    return "same bits" if all(torch.equal(a, b) for a, b in pairs) else "other bits"


def markdown(rows: Sequence[Row], _: str) -> str:
    """The table as a page."""
    same = sum(row.eager == "same bits" for row in rows)
    lines = [
        "# Public architectures",
        "",
        f"What amp-convert does for {len(rows)} architectures in tiny configurations with random "
        "weights, which stand in `tests/benchmarks/architectures_models/`.",
        "",
        f"Made on a CPU, to {str(DTYPE).removeprefix('torch.')}, with PyTorch {torch.__version__}, "
        f"by `make architectures`. The plan on the eager model gives the converted model's bits on "
        f"{same} of them.",
        "",
        "Errors are relative L2 errors against FP32, of the worst output or of all gradients "
        "together. The loss is the mean square of all outputs, which has no gradient where an "
        "output is normalised; batches of 2 are amplified by BatchNorm. *Autocast's* is that of "
        "native `torch.autocast`. *Sizes that vary* are those that the graph takes besides the "
        "example's: another batch size, and a size that nobody has seen before; other calls run "
        "operation by operation. *ONNX* is the error of the file in ONNX Runtime, optimised. "
        "*Archive* is the saved `torch.export` archive, read back, beside the frozen model; *load* "
        "the saved converted model, loaded into one of other weights.",
        "",
        *table(HEADS, [row.cells for row in rows]),
        "",
        "## Notes",
        "",
    ]
    lines += [f"- **{row.model}**: {note}" for row in rows for note in dict.fromkeys(row.notes)]
    return "\n".join([*lines, ""])


def text(row: Row) -> str:
    """A row for the terminal."""
    return "\n    ".join([line(row.cells), *row.notes])


def main() -> int:
    """Judge, print and write; 1 where there is a fault."""
    return run(
        "tests.benchmarks.architectures",
        {one.name: partial(judged, one) for one in ARCHITECTURES},
        text,
        markdown,
        lambda row: any(note.startswith(FAULT) for note in row.notes),
    )


if __name__ == "__main__":
    sys.exit(main())
