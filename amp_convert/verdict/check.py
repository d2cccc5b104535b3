"""One check of a verdict: a question with an answer, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CheckStatus = Literal["pass", "fail", "unchecked"]


@dataclass(frozen=True)
class Check:
    """One answer. `value` was measured and `threshold` is its limit, where there are numbers."""

    name: str
    status: CheckStatus
    value: float | str | None
    threshold: float | str | None
    reason: str
