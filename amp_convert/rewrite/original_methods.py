"""The original's own methods, called on the converted model.

No graph holds what `generate` or `encode` does besides `forward`. They run on the original, with
the plan applied operation by operation (see `eager`), so that nothing runs in FP32 in silence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from amp_convert.core.errors import UnsupportedModelError
from amp_convert.eager import EagerPlan


def under_plan(
    method: Callable[..., Any], plan: EagerPlan, original: object, converted: object
) -> Callable[..., Any]:
    """`method` of `original` under `plan`; what it gives is in the original's dtypes, and is
    `converted` where it gives the original itself. A generator runs step by step. Raises
    UnsupportedModelError, when called, for a method that is asynchronous."""

    def given(result: Any) -> Any:
        return converted if result is original else plan.restored(result)

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise UnsupportedModelError(
                f"{method.__name__} is asynchronous, and no plan can be applied to that",
                mend="Call it on the original, inside of `with mixed.plan.autocast(model)`.",
            )
        with plan:
            result = given(method(*args, **kwargs))
        return plan.steps(result, given) if inspect.isgenerator(result) else result

    return called
