"""`make attribution`: is the error budget right? Held against converting nodes one at a time.

Each model of the tests is converted to FP16 and to BF16 on the CPU. The predicted error is compared
with the measured one; and each node above a thousandth of the budget is tried alone: its rounding
is put into the FP32 graph, and the error of the outputs measured. The rank correlation is
Spearman's, over these nodes. A prediction that is off by more than a factor of two, without a word
of doubt, is a fault.

`python -m tests.benchmarks.attribution [NAME ...] [--markdown FILE]` takes some of them, and writes
the table to a file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr

from amp_convert.attribute.budget import attribute
from amp_convert.attribute.reference import Reference
from amp_convert.attribute.results import Budget, NodeShare
from amp_convert.core.number_formats import name_of
from amp_convert.core.tree_paths import named_leaves
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.evaluating import evaluating
from tests.benchmarks.table_program import line, run, table
from tests.zoo import BUILDERS, DTYPES, build, converted

LEAST_SHARE = 1e-3
HEADS = (
    "model", "dtype", "predicted", "measured", "ratio", "FP32 owes", "nodes", "rank correlation",
    "a node, predicted over tried", "doubts",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table, as text, and the ratio of predicted to measured."""

    model: str
    dtype: str
    predicted: str
    measured: str
    ratio: str
    floor: str
    nodes: str
    correlation: str
    spread: str
    doubts: str

    @property
    def cells(self) -> list[str]:
        return list(astuple(self))


def judged(name: str, dtype: torch.dtype) -> Row:
    """The row of one model."""
    _, args, kwargs = build(name)
    mixed = converted(name, "default", dtype)
    found = attribute(mixed, args, kwargs)
    nodes = [node for node in found.nodes if node.share > LEAST_SHARE]
    tried = _alone(mixed, args, kwargs, found, nodes)
    ratios = [node.rel_l2 / tried[node.node] for node in nodes if tried[node.node]]
    ranks = "-"
    if len(nodes) > 2:
        mine, theirs = [n.rel_l2 for n in nodes], [tried[n.node] for n in nodes]
        ranks = f"{spearmanr(mine, theirs).statistic:.2f}"
    return Row(
        model=name,
        dtype=name_of(dtype),
        predicted=f"{found.predicted_rel_l2:.2e}",
        measured=f"{found.measured_rel_l2:.2e}",
        ratio=f"{found.additivity:.2f}",
        floor=f"{found.floor_rel_l2:.0e}" if found.floor_rel_l2 is not None else "-",
        nodes=str(len(nodes)),
        correlation=ranks,
        spread=f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-",
        doubts=", ".join(found.doubts) or "none",
    )


def _alone(
    mixed: ConvertedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    found: Budget,
    nodes: Sequence[NodeShare],
) -> dict[str, float]:
    """The error of the outputs with the rounding of each node alone."""
    with evaluating(mixed):
        reference = Reference(mixed, floor=False, casts=False)
        ran = reference.run(args, kwargs)
        wanted = {k: v.detach() for k, v in named_leaves(ran.outputs) if k in found.outputs}
        errors = {}
        for node in nodes:
            sites = [site for site in ran.sites if site.node == node.node]
            have = dict(named_leaves(reference.shifted(args, kwargs, sites)))
            squares = [
                float((have[k].double() - v.double()).norm() / v.double().norm()) ** 2
                for k, v in wanted.items()
            ]
            errors[node.node] = sum(squares) ** 0.5
    return errors


def is_fault(row: Row) -> bool:
    """Whether a prediction is wrong without a doubt."""
    return row.doubts == "none" and not 0.5 < float(row.ratio) < 2


def page(rows: Sequence[Row], command: str) -> str:
    """The page."""
    ratios = [float(row.ratio) for row in rows]
    lines = [
        "# Where the error comes from: is it right?",
        "",
        f"Made on a CPU with PyTorch {torch.__version__}, by `{command}` (`make attribution`).",
        "",
        "The error budget of the models that the tests are made of, in tiny configurations with "
        "random weights. *Predicted* is the root of the sum of the nodes' squares, *measured* the "
        "relative L2 error of the converted model against FP32, *FP32 owes* what FP32's own "
        "rounding adds, from FP64. Each node above a thousandth of the budget was also tried "
        "alone: its rounding put into the FP32 graph, and the error of the outputs measured. The "
        "rank correlation is Spearman's, over these nodes. These batches have two to four samples, "
        "so there are 32 backward passes or more; nodes whose parts are nearly equal change "
        "places.",
        "",
        f"Predicted over measured lies between {min(ratios):.2f} and {max(ratios):.2f}.",
        "",
        *table(HEADS, [row.cells for row in rows]),
        "",
        "For a 4-layer BERT of width 256 at 8 x 128 in BF16, 8 vectors take the floating point "
        "operations of 13 FP32 forward passes, 14 with FP32's own error, and hold 2.5 times what "
        "the activations and gradients of a training step do.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge the models that are named on the command line, or all."""
    judges = {
        f"{name}-{name_of(dtype)}": partial(judged, name, dtype)
        for name in BUILDERS
        for dtype in DTYPES
    }
    return run("tests.benchmarks.attribution", judges, lambda row: line(row.cells), page, is_fault)


if __name__ == "__main__":
    sys.exit(main())
