"""The original's own methods, called on the converted model.

No graph holds what `generate` or `encode` does besides `forward`. They run on the original, with
the plan applied operation by operation (see `eager`), so that nothing runs in FP32 in silence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from amp_convert.core.errors import UnsupportedModelError
from amp_convert.eager import EagerPlan


def under_plan(method: Callable[..., Any], plan: EagerPlan) -> Callable[..., Any]:
    """`method` under `plan`; what it gives is in the original's dtypes. A generator runs step by
    step. Raises UnsupportedModelError, when called, for a method that is asynchronous."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise UnsupportedModelError(
                f"{method.__name__} is asynchronous, and no plan can be applied to that",
                mend="Call it on the original, inside of `with mixed.plan.autocast(model)`.",
            )
        with plan:
            result = plan.restored(method(*args, **kwargs))
        return _stepped(result, plan) if inspect.isgenerator(result) else result

    return called


def _stepped(steps: Iterator[Any], plan: EagerPlan) -> Iterator[Any]:
    while True:
        with plan:
            try:
                step = plan.restored(next(steps))
            except StopIteration:
                return
        yield step
