"""All that a capture depends on, as one digest: code, weights, shapes, and what runs them.

- *Code*: the text of every file of the user's that is imported, and what its global names hold, as
  far as some function of the user's reads a name like that; of installed packages each imported
  file's size and time; the versions of Python, PyTorch and amp-convert's own text.
- *The model*: each module's class and attributes, as pickle sees them, so with whatever a config
  object holds; of tensors the values. Functions that pickle knows no name for, such as lambdas,
  are digested by their code and all that they close over, and so are classes that stand in no
  file. What cannot be seen through (a generator, a lock) leaves the model without a digest.
- *The call*: inputs with their values and strides, and what is set in PyTorch.

Nothing is ever unpickled here: the bytes are digested and dropped.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import os
import pickle
import platform
import site
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import amp_convert
from amp_convert.core.files import digests

_OWN = os.path.dirname(os.path.abspath(amp_convert.__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class NoFingerprintError(Exception):
    """Something that no digest can be made of; the message says what."""


def of_call(module: Any, inputs: Any, *others: object) -> str:
    """The digest of a module, the inputs of a call of it, what is set in PyTorch, and plain values
    that say what is asked. Raises NoFingerprintError."""
    return _Digester().digest((module, inputs, _set_in_pytorch(), others))


def _set_in_pytorch() -> tuple[Any, ...]:
    device = str(torch.get_default_device())
    chosen = {k: v for k, v in os.environ.items() if k.startswith(("TORCH_", "PYTORCH"))}
    return (
        torch.get_default_dtype(),
        device,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        sorted(chosen.items()),
    )


# --- code ----------------------------------------------------------------------------------------


def of_code() -> str:
    """The digest of all code that is loaded. Raises NoFingerprintError where a global value that it
    reads has none."""
    parts: list[Any] = [_own_text(), sys.version, platform.platform(), torch.__version__]
    files = sorted(_loaded_files())
    parts += [(name, of_file(file)) for name, file in files]
    own = [sys.modules[name] for name, file in files if not _installed(file)]
    read = frozenset().union(*(_names_read(module) for module in own))
    digester = _Digester()
    for module in own:
        for name, value in sorted(vars(module).items()):
            if name in read and name[:2] != "__" and not _is_code(value):
                try:
                    parts.append((module.__name__, name, digester.digest(value)))
                except NoFingerprintError as error:
                    what = f"{module.__name__}.{name}: {error}"
                    raise NoFingerprintError(what) from error
    return digests.of_text(repr(parts))


def _is_code(value: Any) -> bool:
    """Whether a global is a module, or a function or class that stands in a file."""
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return True
    return isinstance(value, types.FunctionType | type) and _has_name(value)


def _names_read(module: types.ModuleType) -> frozenset[str]:
    """The names of globals and attributes that the functions of a module read."""
    key = (module.__name__, id(module))
    if key not in _NAMES_READ:
        found: set[str] = set()
        pending: list[Any] = [*vars(module).values()]
        while pending:
            value = pending.pop()
            if isinstance(value, types.CodeType):
                found.update(value.co_names)
                pending += value.co_consts
            elif isinstance(value, types.FunctionType):
                pending.append(value.__code__)
            elif isinstance(value, type) and value.__module__ == module.__name__:
                pending += [_seen_through(v) for v in vars(value).values() if v is not value]
            elif isinstance(value, tuple):  # of what was seen through
                pending += [v for v in value if isinstance(v, types.FunctionType)]
        _NAMES_READ[key] = frozenset(found)
    return _NAMES_READ[key]


_NAMES_READ: dict[tuple[str, int], frozenset[str]] = {}


def loaded_code() -> frozenset[str]:
    """The files whose code is loaded."""
    return frozenset(file for _, file in _loaded_files())


def of_file(file: str) -> str:
    """The digest of a file of code: of its text, or for an installed one of its size and time."""
    path = Path(file)
    try:
        if not path.is_file():
            return "none"
        if not _installed(file):
            return digests.of_file(path)
        state = path.stat()
    except (OSError, ValueError):
        return "none"
    return f"{state.st_size} {state.st_mtime_ns}"


def _loaded_files() -> Iterable[tuple[str, str]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")  # __getattr__ may be a user's
        if not isinstance(file, str) or name.partition(".")[0] in sys.stdlib_module_names:
            continue
        if not file.startswith((_OWN, _TORCH)):
            yield name, file


@functools.cache
def _packages() -> tuple[str, ...]:
    return tuple(f + os.sep for f in (*site.getsitepackages(), site.getusersitepackages()))


def _installed(file: str) -> bool:
    return file.startswith(_packages())


@functools.cache
def _own_text() -> str:
    files = sorted(Path(_OWN).rglob("*.py"))
    return digests.of_text("".join(digests.of_file(file) for file in files))


# --- objects -------------------------------------------------------------------------------------


class _Sink(io.RawIOBase):
    """A file that keeps the digest of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


class _Digester:
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
        """What stands for a value that pickle cannot, or would not the same each time; None where
        it can."""
        kind = type(value)
        if kind is str:
            return "str:" + value  # else it matters which equal text is the same object
        if isinstance(value, torch.Tensor):
            return self._once(value, _of_tensor)
        if kind in (set, frozenset):
            return (kind.__name__, sorted(self.digest(item) for item in value))
        if kind is weakref.ref:
            return ("weakref", self.digest(value()))
        if kind is types.BuiltinFunctionType and not _is_method(value):
            return ("builtin", str(value.__module__), value.__qualname__)
        if kind is types.ModuleType:
            return ("module", value.__name__)
        if kind is types.FunctionType and not _has_name(value):
            return self._once(value, self._of_function)
        if isinstance(value, type) and not _has_name(value):
            return self._once(value, self._of_class)
        if kind is types.CodeType:
            return _of_code_object(value, self)
        return None

    def _once(self, value: Any, describe: Any) -> Any:
        number = self._begun.get(id(value))
        if number is not None:
            return ("again", number)
        self._begun[id(value)] = len(self._begun)
        self._alive.append(value)
        return describe(value)

    def _of_function(self, function: types.FunctionType) -> Any:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # not filled yet
                cells.append(None)
        parts = (function.__code__, function.__defaults__, function.__kwdefaults__, cells)
        return ("function", function.__qualname__, function.__module__, self.digest(parts))

    def _of_class(self, cls: type) -> Any:
        held = {
            name: value
            for name, value in vars(cls).items()
            if not isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)
        }
        parts = [(n, _seen_through(v)) for n, v in sorted(held.items()) if n not in _OF_CLASSES]
        return ("class", cls.__qualname__, self.digest((cls.__bases__, parts)))


_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__annotations_cache__", "_abc_impl")


class _Pickler(pickle.Pickler):
    def __init__(self, sink: Any, digester: _Digester) -> None:
        super().__init__(sink, protocol=4)
        self._digester = digester

    def persistent_id(self, obj: Any) -> Any:
        return self._digester.reference(obj)

    def reducer_override(self, obj: Any) -> Any:
        """A module is its class and all its attributes, whatever it says of itself; its hooks are
        numbered through the whole process."""
        if not isinstance(obj, nn.Module):
            return NotImplemented
        state = {n: list(v.values()) if n in _HOOKS else v for n, v in obj.__dict__.items()}
        return copyreg.__newobj__, (type(obj),), state  # type: ignore[attr-defined]


_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def _seen_through(value: Any) -> Any:
    """What a class holds, without the wrappers that pickle refuses."""
    if isinstance(value, staticmethod | classmethod):
        return (type(value).__name__, value.__func__)
    if isinstance(value, property):
        return ("property", value.fget, value.fset, value.fdel)
    if isinstance(value, functools.cached_property):
        return ("cached_property", value.func)
    return value


def _is_method(function: types.BuiltinFunctionType) -> bool:
    """Whether a function of C's belongs to a value: pybind11 keeps something of its own there."""
    owner = type(function.__self__).__name__
    return not (owner in ("module", "NoneType", "PyCapsule") or owner.startswith("pybind11"))


def _has_name(value: Any) -> bool:
    """Whether a function or class is found by its name in a module that stands in a file, whose
    text is in the digest of code."""
    name = value.__module__ or ""
    found: Any = sys.modules.get(name)
    if getattr(found, "__file__", None) is None and name not in sys.builtin_module_names:
        return False
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _of_code_object(code: types.CodeType, digester: _Digester) -> Any:
    parts = (
        code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars,
        code.co_cellvars, code.co_filename, code.co_firstlineno,
    )  # fmt: skip
    return ("code", digester.digest(parts))


def _of_tensor(tensor: torch.Tensor) -> Any:
    known = (
        type(tensor).__qualname__, str(tensor.dtype), tuple(tensor.shape), str(tensor.layout),
        tensor.stride() if tensor.layout is torch.strided else (), str(tensor.device),
        tensor.requires_grad, tensor.is_inference(),
    )  # fmt: skip
    if tensor.is_meta:
        return ("tensor", *known)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise NoFingerprintError(f"a tensor of the class {type(tensor).__qualname__}")
    return ("tensor", *known, digests.of_tensors([("", tensor)]))


def loaded_since(before: frozenset[str]) -> Mapping[str, str]:
    """The digests of the files whose code was loaded after `before` was taken."""
    return {file: of_file(file) for file in sorted(loaded_code() - before)}
