"""Python values as JSON and back: numbers, text, containers, PyTorch's own constants, and the
dataclasses and enums of a closed list.

Nothing is imported or called by a name that stands in the data, so a foreign file can at worst
hold wrong values. What no rule covers is refused when it is written.

A list is a list. All else that JSON has not is an object with one key: `{"tuple": [...]}`,
`{"dict": [[key, value], ...]}`, `{"dtype": "float16"}`, `{"Range": [fields in order]}`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch


class NotPlainError(ValueError):
    """A value that cannot be written, or data that no value was written as."""


def _constant(kind: type, prefix: str = "torch.") -> tuple[Callable[[Any], str], Any]:
    known = {str(v).removeprefix(prefix): v for v in vars(torch).values() if isinstance(v, kind)}
    return (lambda value: str(value).removeprefix(prefix)), known.__getitem__


_CONSTANTS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    torch.dtype: ("dtype", *_constant(torch.dtype)),
    torch.layout: ("layout", *_constant(torch.layout)),
    torch.memory_format: ("memory_format", *_constant(torch.memory_format)),
    torch.device: ("device", str, torch.device),
}
_CONTAINERS: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_NOT_FINITE = ("nan", "inf", "-inf")


class PlainData:
    """Writes and reads values; `classes` are the dataclasses and enums that may be among them."""

    def __init__(self, *classes: type) -> None:
        self._classes = {cls.__name__: cls for cls in classes}
        self._known = frozenset(classes)
        self._constants = {name: read for name, _, read in _CONSTANTS.values()}
        self._containers = {name: kind for kind, name in _CONTAINERS.items()}

    def write(self, value: Any) -> Any:
        """`value` as what JSON has. Raises NotPlainError."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is complex:
            return {"complex": [self.write(value.real), self.write(value.imag)]}
        if isinstance(value, list):
            return [self.write(item) for item in value]
        if kind is torch.Size:
            return {"tuple": list(value)}
        if kind in _CONTAINERS:
            return {_CONTAINERS[kind]: [self.write(item) for item in value]}
        if isinstance(value, Mapping) and kind is not dict:
            kind, value = dict, dict(value)
        if kind is dict:
            return {"dict": [[self.write(k), self.write(v)] for k, v in value.items()]}
        if kind in _CONSTANTS:
            name, write, _ = _CONSTANTS[kind]
            return {name: write(value)}
        if kind in self._known and isinstance(value, Enum):
            return {kind.__name__: value.value}
        if kind in self._known:
            held = [getattr(value, field.name) for field in dataclasses.fields(value)]
            return {kind.__name__: [self.write(item) for item in held]}
        raise NotPlainError(f"a {kind.__module__}.{kind.__qualname__} is no plain value")

    def read(self, data: Any) -> Any:
        """The value that was written as `data`. Raises NotPlainError."""
        try:
            return self._read(data)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise NotPlainError(f"no value was written like this: {error}") from error

    def _read(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self._read(item) for item in data]
        if not isinstance(data, dict):
            return data
        [(name, held)] = data.items()
        if name == "float" and held in _NOT_FINITE:
            return float(held)
        if name == "complex":
            return complex(*map(self._read, held))
        if name == "dict":
            return {self._read(key): self._read(value) for key, value in held}
        if name in self._containers:
            return self._containers[name](self._read(item) for item in held)
        if name in self._constants:
            return self._constants[name](held)
        cls: Any = self._classes[name]
        if issubclass(cls, Enum):
            return cls(held)
        return cls(*(self._read(item) for item in held))
