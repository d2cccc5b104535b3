"""What each function that a `TorchFunctionMode` sees is in the terms of a plan.

A mode sees the functions that Python calls: `torch.nn.functional.layer_norm`, `Tensor.__rsub__`,
`torch.conv2d`. Those of C++ bear the name of an ATen operator. Those written in Python call others:
they are gone into, so that the mode sees what they are made of, as a trace does. For that their
code is run with the question "does something override you?" answered by no, just for that body: the
functions that it calls ask again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from amp_convert.core.op_facts import Family, OpFacts, facts_of


@dataclass(frozen=True)
class Function:
    """One function. `op` is the operator's name, "" where it is none that a plan knows; `facts` are
    those of it, `names` its arguments in order.

    `body` is what it does, seen by the mode, for those written in Python. `as_is` is whether it
    takes its arguments as they come, `in_place` whether it writes to the first, `casts` whether it
    is the model's own request for a dtype."""

    op: str
    facts: OpFacts
    names: tuple[str, ...] = ()
    body: Callable[..., Any] | None = None
    as_is: bool = False
    in_place: bool = False
    casts: bool = False


def function_of(func: Any) -> Function:
    """What is known of a function."""
    name = str(getattr(func, "__name__", ""))
    if isinstance(func, types.FunctionType) and _is_composite(func):
        return Function("", facts_of(""), body=_unasked(func))
    if name == "__setitem__":
        return Function("aten.index_put", facts_of("aten.index_put"), in_place=True)
    if name in _CASTS:
        return Function("aten.to", facts_of("aten.to"), casts=True)
    if isinstance(func, torch._ops.OpOverload):
        op, names = func.overloadpacket, _argument_names(func.overloadpacket)
    else:
        packet = _packet(name)
        if packet is None or name in _NO_OPERATORS or name.startswith("is_"):
            return Function("", facts_of(""), as_is=True)
        op, names = packet, _argument_names(packet)
    short = f"{op._qualified_op_name.replace('::', '.')}"
    facts = facts_of(short)
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _WRITES
    return Function(short, facts, names, None, facts.is_a(*_AS_THEY_COME), in_place)


_AS_THEY_COME = (Family.SHAPE, Family.COPY, Family.RAW_MEMORY, Family.UNWRITTEN)
"""No cast would change what they give."""
_NO_OPERATORS = frozenset((
    "numpy", "tolist", "item", "copy_", "set_", "requires_grad_", "size", "stride", "dim", "numel",
    "data", "storage", "backward", "record_stream", "equal", "allclose", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_tensor", "zeros_like",
    "ones_like", "full_like", "rand_like", "randn_like",
    "randint_like", "result_type", "can_cast", "retain_grad", "resize_", "resize_as_", "__get__",
    "__set__", "__getitem__", "__len__", "__bool__", "__contains__",
))  # fmt: skip
"""They give no values that were computed, or write what they get where it belongs."""
_CASTS = frozenset((
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "byte", "char", "short",
    "int", "long", "cpu", "cuda",
))  # fmt: skip
"""Methods that are casts, all of them one operator in a graph."""
_WRITES = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"})
_DUNDER = {"radd": "add", "rmul": "mul", "truediv": "div", "rtruediv": "div"}
_PYTHON = frozenset((
    "__rsub__", "__rdiv__", "__rtruediv__", "__pow__", "__rpow__", "__rmod__", "__floordiv__",
    "__rfloordiv__", "__rmatmul__", "norm",
))  # fmt: skip
"""Methods of tensors that are written in Python and compute."""


_BACKWARD = frozenset(("backward", "grad"))
"""What runs the backward pass, in which checkpoints compute anew."""


def _is_composite(func: types.FunctionType) -> bool:
    if func.__module__ in ("torch.nn.functional", "torch.functional"):
        return True
    if func.__name__ in _BACKWARD and func.__module__ in ("torch._tensor", "torch.autograd"):
        return True
    return func.__module__ == "torch._tensor" and func.__name__ in _PYTHON


def _packet(name: str) -> Any:
    """The ATen operator of a name that Python has for it."""
    plain = name.strip("_") if name.startswith("__") and name.endswith("__") else name
    for tried in dict.fromkeys((name, _DUNDER.get(plain, plain), plain.rstrip("_"))):
        packet = getattr(torch.ops.aten, tried, None) if tried else None
        if isinstance(packet, torch._ops.OpOverloadPacket):
            return packet
    return None


def _argument_names(packet: Any) -> tuple[str, ...]:
    overloads = [getattr(packet, name) for name in packet.overloads()]
    schemas = [tuple(a.name for a in overload._schema.arguments) for overload in overloads]
    return max(schemas, key=len)


class _Unasked(dict[str, Any]):
    """The globals of a module, but for what asks whether something overrides a function."""

    def __init__(self, module: Mapping[str, Any]) -> None:
        super().__init__({name: _no for name in _QUESTIONS if name in module})
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _no(*_: Any) -> bool:
    return False


def _unasked(func: types.FunctionType) -> Callable[..., Any]:
    body = types.FunctionType(
        func.__code__,
        _Unasked(func.__globals__),
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body
