"""One check of a verdict: a question with an answer, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import wraps
from typing import ParamSpec

_P = ParamSpec("_P")


class CheckStatus(StrEnum):
    """What came of a question."""

    PASS = "pass"  # noqa: S105  no password
    FAIL = "fail"
    UNCHECKED = "unchecked"
    """It could not be looked at, or has no answer."""


@dataclass(frozen=True)
class Check:
    """One answer. `value` was measured and `threshold` is its limit, where there are numbers. While
    a check that is `required` is unchecked, no verdict may pass."""

    name: str
    status: CheckStatus
    value: float | str | None
    threshold: float | str | None
    reason: str
    required: bool = True


def severity(error: float) -> float:
    """Sort key of an error: NaN, and a size below 0, is the worst there is."""
    return error if error >= 0 else math.inf


def optional(check: Callable[_P, Check]) -> Callable[_P, Check]:
    """For a check that can fail, and that a verdict may pass without."""

    @wraps(check)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Check:
        return replace(check(*args, **kwargs), required=False)

    return made
