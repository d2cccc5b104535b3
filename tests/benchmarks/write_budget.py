"""`python -m tests.benchmarks.write_budget`: write what models dispatch now as their budget.

The reasons in the file stay. Look at the difference before it is committed: a number may rise only
for a reason that is written beside it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from tests import zoo
from tests.benchmarks.dispatch import inference_arms, training_arms
from tests.benchmarks.dispatch_budget import FILE, HEAD, budget

_REASONS = ("regions", "tables", "step_regions")


def main() -> int:
    """Write the file."""
    warnings.simplefilter("ignore")
    lines = [HEAD]
    for name in zoo.BUILDERS:
        model, args, kwargs = zoo.example(name)
        converted = zoo.converted(name, dtype=torch.bfloat16)
        arm = inference_arms(model, converted, args, kwargs)["frozen"]
        step = training_arms(model, converted, args, kwargs)["mixed"]
        known: dict[str, Any] = budget().get(name, {})
        lines += [
            f"[{name}]",
            f"calls = {arm.count.total}",
            f"casts = {arm.count.casts}",
            f"moved = {arm.count.moved}",
            f"stored = {arm.stored}",
            f"peak = {arm.peak}",
            f"step = {{ calls = {step.total}, moved = {step.moved} }}",
            *(f'{key} = "{known[key]}"' for key in _REASONS if key in known),
            "",
        ]
    FILE.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
