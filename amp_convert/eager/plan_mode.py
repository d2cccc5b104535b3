"""The `TorchFunctionMode` that applies a plan: each function that Python calls is identified (see
`treatments`), and called with its arguments in the plan's dtypes."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from amp_convert.core.folded_linear import folded_linear
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import name_of
from amp_convert.core.precision import Precision, wanted_dtype
from amp_convert.eager.functions import Function, function_of
from amp_convert.eager.layers import Layers
from amp_convert.eager.restored import restored, tensors
from amp_convert.eager.treatments import Treatment, Treatments
from amp_convert.eager.user_lines import line_of


class _Active(threading.local):
    """The modes of a thread, the last one first; None where none is to be applied."""

    def __init__(self) -> None:
        self.stack: list[PlanMode | None] = []


_active = _Active()
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def no_plan() -> Iterator[None]:
    """No plan is applied to what is called while this is open: what is converted already."""
    if not _active.stack:
        yield
        return
    _active.stack.append(None)
    try:
        yield
    finally:
        _active.stack.pop()


@dataclass
class Counts:
    """What a plan met. `calls` counts the calls that read floating point values; `unplanned` those
    of them that are no node of the plan, by (layer, operator), but for those that only move values;
    `held_back` those that write in place to a value of another dtype than the plan has there."""

    calls: int = 0
    unplanned: Counter[tuple[str, str]] = field(default_factory=Counter)
    held_back: Counter[tuple[str, str]] = field(default_factory=Counter)


class PlanMode(TorchFunctionMode):
    """Applies the `treatments` of the mode that `model` is in, and counts what it meets."""

    def __init__(
        self,
        counts: Counts,
        treatments: Mapping[Mode, Treatments],
        low: torch.dtype,
        model: nn.Module | None,
    ) -> None:
        super().__init__()
        self._counts, self._all, self._low = counts, treatments, low
        self._layers = Layers(model, self._enter, self._leave, self._wide)
        self._now = treatments[Mode.EVAL]
        self._folds = not any(each.exact for each in treatments.values())
        # The other low dtype is the model's own choice.
        self._castable = frozenset((torch.float32, low))
        self._most = torch.finfo(low).max
        self._dtypes = {Precision.LOW: low, Precision.FULL: torch.float32}
        self._ordinals: Counter[tuple[str, str, str]] = Counter()
        self._inside: list[Any] = []
        self._functions: dict[Any, Function] = {}
        self._wanted: dict[tuple[Precision, bool, bool], dict[torch.dtype, torch.dtype]] = {}
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the plan while this is open."""
        _active.stack.append(self)
        self._layers.open()
        try:
            with self:
                yield
        finally:
            self._layers.close()
            self._weights.clear()
            _active.stack.pop()

    # --- around the model's calls ----------------------------------------------------------------

    def _enter(self, module: nn.Module, path: str) -> None:
        """Before an outermost call, of the model or of a part of it: its calls are counted anew."""
        root = self._layers.root or module
        self._now = self._all[Mode.of(root.training)]
        for key in [k for k in self._ordinals if not path or f"{k[0]}.".startswith(f"{path}.")]:
            del self._ordinals[key]

    def _leave(self, module: nn.Module, result: Any) -> Any:
        """After the outermost call: the model itself gives what the original gives."""
        self._weights.clear()
        return self._wide(result) if module is self._layers.root else None

    def _wide(self, value: Any) -> Any:
        with no_plan():
            return restored(value, self._low)

    # --- calls of functions ----------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._functions.get(func)
        if known is None:
            known = self._functions[func] = function_of(func)
        if known.as_is or _active.stack[-1] is not self:
            return func(*args, **kwargs)
        if known.body is not None and func not in self._inside:
            self._inside.append(func)
            try:
                with self:
                    return known.body(*args, **kwargs)
            finally:
                self._inside.pop()
        if known.casts:
            return self._own_cast(known, func, args, kwargs)
        return self._call(known, func, args, kwargs) if known.op else func(*args, **kwargs)

    def _call(self, known: Function, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        arriving = {tensor.dtype for tensor in tensors(args, kwargs)} & self._castable
        if not arriving:
            return func(*args, **kwargs)
        treatment = self._treatment(known)
        if known.in_place or kwargs.get("out") is not None:
            return self._written(known, treatment, func, args, kwargs)
        meets_fp32 = torch.float32 in arriving
        args, kwargs = self._cast(known, treatment, args, kwargs, meets_fp32=meets_fp32)
        if func is torch.nn.functional.linear and self._folds:
            func = folded_linear
        result = func(*args, **kwargs)
        if treatment.precision is Precision.LOW and known.facts.delivers_low:
            return result.to(self._low)
        return result

    def _own_cast(self, known: Function, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The model's own cast. One to "the dtype that the model works in" names the dtype of a
        weight, which is FP32 here: the plan says what was meant."""
        result = func(*args, **kwargs)
        value, *asked = args
        if value.dtype not in self._castable:
            return result
        names_a_dtype = func.__name__ not in ("to", "cpu", "cuda") or any(
            isinstance(each, torch.dtype | torch.Tensor) for each in (*asked, *kwargs.values())
        )
        if result is value and not names_a_dtype:
            return result
        planned = self._planned(known)
        want = self._dtypes.get(planned.precision) if planned is not None else None
        return result.to(want) if want is not None and result.dtype in self._castable else result

    def _planned(self, known: Function) -> Treatment | None:
        """What the plan has for this call, counted as one; None where it has nothing."""
        layer, op = key = (self._layers.layer, known.facts.name)
        self._counts.calls += 1
        ordinal = self._count((layer, op, ""))
        if ordinal >= self._now.count(*key) and not (known.casts or known.facts.keeps_values):
            self._counts.unplanned[key] += 1
        planned = self._now.alike(*key)
        if planned is None and self._now.count(*key):
            line = line_of(sys._getframe(2))
            planned = self._now.at(layer, op, line, self._count((layer, op, line)))
        return planned

    def _count(self, key: tuple[str, str, str]) -> int:
        ordinal = self._ordinals[key]
        self._ordinals[key] += 1
        return ordinal

    def _treatment(self, known: Function) -> Treatment:
        """What is done to this call: as planned, or else by the rule for its operator."""
        planned = self._planned(known)
        return planned if planned is not None else self._now.of_op(known.op)

    def _cast(
        self, known: Function, treatment: Treatment, args: Any, kwargs: Any, *, meets_fp32: bool
    ) -> tuple[Any, Any]:
        clamp = treatment.clamp
        changes = self._changes(treatment.precision, False, meets_fp32)
        if not changes and clamp is None and not known.facts.meets_numbers:
            return args, kwargs
        kept, of_kept = frozenset[str](), changes
        if known.facts.keeps_arguments:
            kept = known.facts.kept_arguments(tensors(args, kwargs)[0].device.type)
            of_kept = self._changes(treatment.precision, True, meets_fp32)

        masks = known.facts.passes_masks
        stays_low = treatment.precision is not Precision.FULL and not meets_fp32
        becomes_low = treatment.precision is Precision.LOW
        meets = known.facts.meets_numbers and (becomes_low or stays_low)

        def cast(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                want = (of_kept if name in kept else changes).get(value.dtype)
                return value if want is None else self._in_dtype(value, want, clamp)
            if value.__class__ is list or value.__class__ is tuple:
                return type(value)([cast(name, each) for each in value])
            if value.__class__ is float or value.__class__ is int:
                return self._number(value, clamp, masks=masks) if meets else value
            return value

        args = list(map(cast, known.names, args)) + [cast("", a) for a in args[len(known.names) :]]
        return args, {name: cast(name, a) for name, a in kwargs.items()} if kwargs else kwargs

    def _number(self, value: float, clamp: float | None, *, masks: bool) -> float:
        """A number that meets low values. PyTorch refuses to write a mask of -1e9 into them; any
        other number that they cannot hold makes them infinite, which can be seen."""
        if masks and clamp is None and -math.inf < value < -self._most:
            clamp = -self._most / 2
        return max(value, clamp) if clamp is not None and value > -math.inf else value

    def _changes(
        self, precision: Precision, kept: bool, meets_fp32: bool
    ) -> dict[torch.dtype, torch.dtype]:
        """Each dtype that an argument is cast from, and the one that it is cast to."""
        key = (precision, kept, meets_fp32)
        if key not in self._wanted:
            wanted = {
                have: wanted_dtype(
                    precision, have, original=torch.float32, low=self._low, kept=kept,
                    meets_fp32=meets_fp32,
                )
                for have in self._castable
            }  # fmt: skip
            self._wanted[key] = {have: want for have, want in wanted.items() if want != have}
        return self._wanted[key]

    def _in_dtype(
        self, value: torch.Tensor, dtype: torch.dtype, clamp: float | None
    ) -> torch.Tensor:
        if dtype is self._low and clamp is not None:
            value = torch.where(value == -torch.inf, value, value.clamp_min(clamp))
        # Outside of any module, an optimizer may be at work between two calls.
        if not (torch.is_grad_enabled() and value.is_leaf and value.requires_grad) or (
            not self._layers.is_running
        ):
            return value.to(dtype)
        found = self._weights.get(id(value))
        if found is None or found[1].dtype is not dtype or found[2] != value._version:
            found = self._weights[id(value)] = (value, value.to(dtype), value._version)
        return found[1]

    def _written(
        self, known: Function, treatment: Treatment, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A call that writes to what it is given: all that it reads is brought to that dtype, as
        many kernels want it."""
        goal = kwargs["out"] if kwargs.get("out") is not None else args[0]
        goal = goal[0] if isinstance(goal, tuple | list) else goal
        have = goal.dtype if isinstance(goal, torch.Tensor) else None
        if have not in self._castable:
            return func(*args, **kwargs)
        if have is not self._dtypes.get(treatment.precision, have):
            key = (self._layers.layer, known.facts.name)
            if not self._counts.held_back[key]:
                _log.warning(
                    "%s of %s writes in place to a %s value, where the plan has %s",
                    key[1], key[0] or "the top level", name_of(have), treatment.precision,
                )  # fmt: skip
            self._counts.held_back[key] += 1
        of_goal = Precision.LOW if have is self._low else Precision.FULL
        same = replace(treatment, precision=of_goal)
        args, kwargs = self._cast(known, same, args, kwargs, meets_fp32=have is not self._low)
        return func(*args, **kwargs)
