"""A plan applied to the model as it is, operation by operation.

No graph is needed: whatever the model's code calls is seen by a `TorchFunctionMode` (`plan_mode`),
identified and called in the plan's precision. So any shape, any method, any control flow, hooks and
parts that no graph can hold run as planned. A call that the plan does not have takes the rule for
its operator, and is counted.

What differs from the converted graph: a value that several calls read is cast for each, weights
alone are cast once for each call of the model, as `torch.autocast` does. What writes in place
keeps the dtype of what it writes to. A node that the plan holds scaled runs in FP32. Code that
runs in the backward pass (`torch.utils.checkpoint` computes anew there) wants the context around
that, too. What no `TorchFunctionMode` sees, scripted code, gets and gives FP32; a function that is
scripted by itself may refuse low values.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from amp_convert.core.errors import UsageError
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.eager.plan_mode import Counts, PlanMode
from amp_convert.eager.restored import restored
from amp_convert.eager.treatments import Treatments
from amp_convert.rules.rule import MadeFor
from amp_convert.rules.rule_set import Rules


class _Opened(threading.local):
    """What a thread has opened, the last one last."""

    def __init__(self) -> None:
        self.stacks: list[contextlib.ExitStack] = []


_Wrapped = TypeVar("_Wrapped", bound=Callable[..., Any])


class EagerPlan:
    """Applies a plan while it is open, as a context or as a decorator. `counts` says what it met,
    over all its uses."""

    def __init__(self, rules: Rules, made_for: MadeFor, model: nn.Module | None = None) -> None:
        self.counts = Counts()
        self._model, self._device = model, made_for.device
        self._low = from_name(made_for.dtype)
        self._treatments = {mode: Treatments(rules, made_for, mode) for mode in Mode}
        self._opened = _Opened()

    def __enter__(self) -> EagerPlan:
        with contextlib.ExitStack() as opening:
            # The plan has the last word, as it has in the converted model.
            opening.enter_context(torch.autocast(self._device, enabled=False))
            mode = PlanMode(self.counts, self._treatments, self._low, self._model)
            opening.enter_context(mode.applied())
            self._opened.stacks.append(opening.pop_all())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.stacks.pop().__exit__(kind, error, trace)

    def restored(self, value: Any) -> Any:
        """What a method gives, in the dtypes of the FP32 original: see `restored`."""
        return restored(value, self._low)

    def __call__(self, function: _Wrapped) -> _Wrapped:
        """`function` under the plan; what it yields, if it is a generator, too. Raises UsageError
        for one that is asynchronous: other code runs between its steps."""
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(
                f"{function.__name__} is asynchronous, and no plan can be applied to that",
                mend="Open the context inside of it, around what it does not wait for.",
            )

        @functools.wraps(function)
        def applied(*args: Any, **kwargs: Any) -> Any:
            with self:
                result = function(*args, **kwargs)
            return self.steps(result) if inspect.isgenerator(result) else result

        return applied  # type: ignore[return-value]

    def steps(
        self, generator: Generator[Any, Any, Any], change: Callable[[Any], Any] = lambda step: step
    ) -> Generator[Any, Any, Any]:
        """`generator`, each step of which runs under the plan; `change` is what is made of a step,
        and of what it returns."""
        resume: Callable[[], Any] = functools.partial(next, generator)
        while True:
            with self:
                try:
                    step = change(resume())
                except StopIteration as end:
                    return change(end.value)
            try:
                sent = yield step
                resume = functools.partial(generator.send, sent)
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:  # noqa: BLE001  it is the generator's to handle
                resume = functools.partial(generator.throw, error)
