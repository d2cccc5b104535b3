"""Digests of a model's objects, as pickle walks them: nothing is unpickled, the bytes are digested
and dropped.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import pickle
import sys
import types
import weakref
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import nn

from amp_convert.capture.kept.origins import (
    NoFingerprintError,
    has_name,
    is_users,
    stands_in_a_file,
)
from amp_convert.core.files import digests


class _Sink(io.RawIOBase):
    """A file that keeps the digest of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


class Digester:
    """One digest; remembers what it has begun to look at, for what refers back to it."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}
        self._alive: list[Any] = []

    def digest(self, value: Any) -> str:
        sink = _Sink()
        pickler = _Pickler(sink, self)
        try:
            pickler.dump(value)
        except NoFingerprintError:
            raise
        except Exception as error:  # whatever refuses to be pickled, in as many ways
            raise NoFingerprintError(f"{type(error).__name__}: {error}") from error
        return sink.hash.hexdigest()

    def reference(self, value: Any) -> Any:
        """What stands for a value that pickle cannot see, or would not see the same each time; None
        where it can."""
        kind = type(value)
        if kind is str:
            return "str:" + value  # else it matters which equal text is the same object
        if isinstance(value, torch.Tensor):
            return self._once(value, self._of_tensor)
        if kind in (set, frozenset):
            return (kind.__name__, sorted(self.digest(item) for item in value))
        if kind is types.BuiltinFunctionType and not _is_method(value):
            return ("builtin", str(value.__module__), value.__qualname__)
        if isinstance(value, types.ModuleType):  # `torch.ops.aten` is one, too
            return ("module", value.__name__)
        if isinstance(value, torch._ops.OperatorBase | torch._ops.OpOverloadPacket):
            return ("operator", str(value))
        if kind is types.FunctionType and _may_change(value):
            return self._once(value, self._of_function)
        if isinstance(value, type) and _may_change(value):
            return self._once(value, self._of_class)
        if kind is types.MappingProxyType:
            return ("mapping", self.digest(dict(value)))
        if kind is types.CodeType:
            return ("code", self.digest(_parts_of_code(value)))
        return None

    def _once(self, value: Any, describe: Any) -> Any:
        number = self._begun.get(id(value))
        if number is not None:
            return ("again", number)
        self._begun[id(value)] = len(self._begun)
        self._alive.append(value)
        return describe(value)

    def _of_function(self, function: types.FunctionType) -> Any:
        """What a function was made with; where its text is in no file of the digest of code, its
        code as well, and the globals that it reads."""
        parts: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
        for cell in function.__closure__ or ():
            try:
                parts.append(cell.cell_contents)
            except ValueError:  # not filled yet
                parts.append(None)
        if not has_name(function):
            read = set(names_read_by(function.__code__)) & function.__globals__.keys()
            known = stands_in_a_file(function.__module__)
            parts.append(function.__code__)
            parts.append([] if known else [(n, function.__globals__[n]) for n in sorted(read)])
        return ("function", function.__module__, function.__qualname__, self.digest(parts))

    def _of_class(self, cls: type) -> Any:
        """What was set on a class; its methods too where their text is in no file of the digest of
        code."""
        named = has_name(cls)
        parts = []
        for name, value in sorted(vars(cls).items()):
            is_c = isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)
            if name not in _OF_CLASSES and not is_c:
                parts.append((name, seen_through(value)))
        return (
            "class",
            cls.__module__,
            cls.__qualname__,
            named,
            self.digest((cls.__bases__, parts)),
        )

    def _of_tensor(self, tensor: torch.Tensor) -> Any:
        known = (
            type(tensor).__qualname__, str(tensor.dtype), tuple(tensor.shape), str(tensor.layout),
            tensor.stride() if tensor.layout is torch.strided else (), str(tensor.device),
            tensor.requires_grad, tensor.is_inference(), self.digest(tensor.__dict__),
        )  # fmt: skip
        if tensor.is_meta:
            return ("tensor", *known)
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise NoFingerprintError(f"a tensor of the class {type(tensor).__qualname__}")
        return ("tensor", *known, digests.of_tensors([("", tensor)]))


_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__annotations_cache__", "_abc_impl",
               "__slotnames__")  # fmt: skip
"""Attributes that Python keeps on classes for itself."""


class _Pickler(pickle.Pickler):
    def __init__(self, sink: Any, digester: Digester) -> None:
        super().__init__(sink, protocol=4)
        self._digester = digester

    def persistent_id(self, obj: Any) -> Any:
        return self._digester.reference(obj)

    def reducer_override(self, obj: Any) -> Any:
        """A module, or an object of a class of the user's, is its class and all its attributes,
        whatever it says of itself."""
        if type(obj) is types.MethodType:
            return _bound, (obj.__func__, obj.__self__)
        if type(obj) is weakref.ref:
            return weakref.ref, (obj(),)
        if isinstance(obj, nn.Module):
            return copyreg.__newobj__, (type(obj),), _without_numbers(_attributes(obj))  # type: ignore[attr-defined]
        if is_users(type(obj).__module__) and not isinstance(obj, (*_BUILT_IN, type)):
            return copyreg.__newobj__, (type(obj),), _attributes(obj)  # type: ignore[attr-defined]
        return NotImplemented


def _bound(function: Any, owner: Any) -> types.MethodType:
    return types.MethodType(function, owner)


_BUILT_IN = (
    dict, list, tuple, set, frozenset, str, bytes, int, float, complex, BaseException, Enum,
)  # fmt: skip
"""What holds more than attributes."""
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def _attributes(obj: Any) -> dict[str, Any]:
    """All attributes of an object: in its `__dict__` and in slots."""
    slots: dict[str, Any] = {}
    for cls in type(obj).__mro__:
        for name, value in vars(cls).items():
            if isinstance(value, types.MemberDescriptorType) and hasattr(obj, name):
                slots[name] = getattr(obj, name)
    return {**slots, **getattr(obj, "__dict__", {})}


def _without_numbers(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module; its hooks, which are numbered through the whole process, by their
    order."""
    numbers = sorted({n for table in _HOOKS & attributes.keys() for n in attributes[table]})
    return {
        name: [(numbers.index(n), hook) for n, hook in value.items()] if name in _HOOKS else value
        for name, value in attributes.items()
    }


def seen_through(value: Any) -> Any:
    """What a class holds, without the wrappers that pickle refuses."""
    if isinstance(value, staticmethod | classmethod):
        return (type(value).__name__, value.__func__)
    if isinstance(value, property):
        return ("property", value.fget, value.fset, value.fdel)
    if isinstance(value, functools.cached_property):
        return ("cached_property", value.func)
    return value


def _may_change(value: Any) -> bool:
    """Whether a function or class is more than its name in an installed package."""
    name = value.__module__ or ""
    if name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return False
    return is_users(name) or not has_name(value)


def _is_method(function: types.BuiltinFunctionType) -> bool:
    """Whether a function of C's belongs to a value: pybind11 keeps something of its own there."""
    owner = type(function.__self__).__name__
    return not (owner in ("module", "NoneType", "PyCapsule") or owner.startswith("pybind11"))


def names_read_by(code: types.CodeType) -> Iterable[str]:
    """The names of globals and attributes that code reads, that of functions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_read_by(constant)


def _parts_of_code(code: types.CodeType) -> tuple[Any, ...]:
    return (
        code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars,
        code.co_cellvars, code.co_filename, code.co_firstlineno,
    )  # fmt: skip
