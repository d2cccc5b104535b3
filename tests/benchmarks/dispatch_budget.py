"""What a model may dispatch, frozen and in training, as `dispatch_budget.toml` says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".toml")
HEAD = """\
# One forward pass of each frozen model of `counted_models` in BF16 on a CPU: kernel calls, casts,
# bytes moved, stored, and held at the peak. None may exceed its number; `write_budget` writes them.
#
# `regions` says why a model has an FP32 region that the model in BF16 has not, one sentence each,
# separated by semicolons, "7 x" before one of seven alike: each may cost two casts. `tables` says
# why a table is stored in FP32.
#
# `step` is one forward and backward pass of the converted model in training mode: its kernel calls
# and the bytes that it moves. `step_regions` says why it may move more than autocast does.
"""


def regions(text: str) -> int:
    """How many FP32 regions a budget names."""
    found = 0
    for sentence in filter(None, map(str.strip, text.split(";"))):
        times = re.match(r"(\d+) x ", sentence)
        found += int(times[1]) if times else 1
    return found


def budget() -> dict[str, dict[str, Any]]:
    """The budget of each model, by its name."""
    if not FILE.exists():
        return {}
    return tomllib.loads(FILE.read_text())
