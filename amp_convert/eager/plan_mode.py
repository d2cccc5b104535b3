"""The `TorchFunctionMode` that applies a plan: each function that Python calls is identified (see
`treatments`), and called with its arguments in the plan's dtypes."""

from __future__ import annotations

import contextlib
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
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.core.op_facts import HEAVY
from amp_convert.core.precision import Precision, wanted_dtype
from amp_convert.eager.functions import Function, function_of
from amp_convert.eager.layers import Layers
from amp_convert.eager.restored import restored, tensors
from amp_convert.eager.treatments import Treatment, Treatments


class _Active(threading.local):
    """The modes of a thread, the last one first; None where none is to be applied."""

    def __init__(self) -> None:
        self.stack: list[PlanMode | None] = []


_active = _Active()
_CASTABLE = frozenset((torch.float32, *LOW_DTYPES))


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
        self._dtypes = {Precision.LOW: low, Precision.FULL: torch.float32}
        self._ordinals: Counter[tuple[str, str]] = Counter()
        self._inside: list[Any] = []
        self._functions: dict[Any, Function] = {}
        self._wanted: dict[tuple[Precision, bool, bool], dict[torch.dtype, torch.dtype]] = {}
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

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

    def _enter(self, module: nn.Module) -> None:
        root = self._layers.root or module
        self._now = self._all[Mode.of(root.training)]
        self._ordinals.clear()

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
        arriving = {tensor.dtype for tensor in tensors(args, kwargs)} & _CASTABLE
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
        if value.dtype not in _CASTABLE:
            return result
        names_a_dtype = func.__name__ not in ("to", "cpu", "cuda") or any(
            isinstance(each, torch.dtype | torch.Tensor) for each in (*asked, *kwargs.values())
        )
        if result is value and not names_a_dtype:
            return result
        planned = self._planned(known)
        want = self._dtypes.get(planned.precision) if planned is not None else None
        return result.to(want) if want is not None and result.dtype in _CASTABLE else result

    def _planned(self, known: Function) -> Treatment | None:
        """What the plan has for this call, counted as one."""
        key = (self._layers.layer, known.facts.name)
        ordinal = self._ordinals[key]
        self._ordinals[key] += 1
        self._counts.calls += 1
        return self._now.of_node(*key, ordinal)

    def _treatment(self, known: Function) -> Treatment:
        """What is done to this call: as planned, or else by the rule for its operator."""
        planned = self._planned(known)
        if planned is not None:
            return planned
        if not known.facts.keeps_values:
            self._counts.unplanned[self._layers.layer, known.facts.name] += 1
        return self._now.of_op(known.op)

    def _cast(
        self, known: Function, treatment: Treatment, args: Any, kwargs: Any, *, meets_fp32: bool
    ) -> tuple[Any, Any]:
        clamp = treatment.clamp
        changes = self._changes(treatment.precision, False, meets_fp32)
        if not changes and clamp is None:
            return args, kwargs
        kept, of_kept = frozenset[str](), changes
        if known.facts.keeps_arguments:
            kept = known.facts.kept_arguments(tensors(args, kwargs)[0].device.type)
            of_kept = self._changes(treatment.precision, True, meets_fp32)

        def cast(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                want = (of_kept if name in kept else changes).get(value.dtype)
                return value if want is None else self._in_dtype(value, want, clamp)
            if value.__class__ is list or value.__class__ is tuple:
                return type(value)([cast(name, each) for each in value])
            if clamp is not None and isinstance(value, float) and value > -torch.inf:
                return max(value, clamp)
            return value

        args = list(map(cast, known.names, args)) + [cast("", a) for a in args[len(known.names) :]]
        return args, {name: cast(name, a) for name, a in kwargs.items()} if kwargs else kwargs

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
                for have in _CASTABLE
            }  # fmt: skip
            self._wanted[key] = {have: want for have, want in wanted.items() if want != have}
        return self._wanted[key]

    def _in_dtype(
        self, value: torch.Tensor, dtype: torch.dtype, clamp: float | None
    ) -> torch.Tensor:
        if dtype is self._low and clamp is not None:
            value = torch.where(value == -torch.inf, value, value.clamp_min(clamp))
        if not (torch.is_grad_enabled() and value.requires_grad and value.is_leaf):
            return value.to(dtype)
        found = self._weights.get(id(value))
        if found is None or found[1].dtype is not dtype:
            found = self._weights[id(value)] = (value, value.to(dtype))
        return found[1]

    def _written(
        self, known: Function, treatment: Treatment, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A call that writes to what it is given. PyTorch brings what it reads to that dtype, but
        for products."""
        goal = kwargs["out"] if kwargs.get("out") is not None else args[0]
        have = goal.dtype if isinstance(goal, torch.Tensor) else None
        if have not in _CASTABLE:
            return func(*args, **kwargs)
        if have is not self._dtypes.get(treatment.precision, have):
            self._counts.held_back[self._layers.layer, known.facts.name] += 1
        if known.facts.is_a(*HEAVY):
            of_goal = Precision.LOW if have is self._low else Precision.FULL
            same = replace(treatment, precision=of_goal)
            args, kwargs = self._cast(known, same, args, kwargs, meets_fp32=True)
        return func(*args, **kwargs)
