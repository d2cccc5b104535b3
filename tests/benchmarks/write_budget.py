"""`python -m tests.benchmarks.write_budget [MODEL ...]`: write what models dispatch now as their
budget; those of other models stay.

The reasons in the file stay. Look at the difference before it is committed: a number may rise only
for a reason that is written beside it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from tests.benchmarks import counted_models
from tests.benchmarks.dispatch import inference_arms, training_arms
from tests.benchmarks.dispatch_budget import FILE, HEAD, budget

_REASONS = ("regions", "tables", "step_regions")


def main() -> int:
    """Write the file."""
    warnings.simplefilter("ignore")
    lines, wanted = [HEAD], sys.argv[1:] or counted_models.MODELS
    for name in counted_models.MODELS:
        known: dict[str, Any] = budget().get(name, {})
        lines.append(f'["{name}"]' if "/" in name else f"[{name}]")
        if name not in wanted:
            lines += [*(f"{key} = {_toml(value)}" for key, value in known.items()), ""]
            continue
        model, args, kwargs = counted_models.example(name)
        converted = counted_models.converted(name, torch.bfloat16)
        arm = inference_arms(model, converted, args, kwargs)["frozen"]
        step = training_arms(model, converted, args, kwargs)["mixed"]
        lines += [
            f"calls = {arm.count.total}",
            f"casts = {arm.count.casts}",
            f"moved = {arm.count.moved}",
            f"stored = {arm.stored}",
            f"peak = {arm.peak}",
            f"step = {{ calls = {step.total}, moved = {step.moved} }}",
            *(f"{key} = {_toml(known[key])}" for key in _REASONS if key in known),
            "",
        ]
    FILE.write_text("\n".join(lines))
    return 0


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
