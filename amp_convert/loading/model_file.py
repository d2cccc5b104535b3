"""The user's model file -> Case: what the file defines, found by name and checked.

The file is run by `user_code`, which says how, and at what risk. Two names are needed,
`build_model` (or `model`) and `example_inputs`; the rest are optional, and None when absent.
Nothing here converts, and the model's FP32 parameters are left alone: `load_case` only refuses
what could not be converted later, and `check_forward` what could not be compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.core.number_formats import name_of
from amp_convert.core.printable import is_text
from amp_convert.core.spelling import nearest
from amp_convert.loading.source import split_source
from amp_convert.loading.user_code import run_file, run_module, user_code

_INPUTS = "a tensor, a tuple (positional arguments) or a dict (keyword arguments)"
_OPTIONAL = (
    *("eval_batches", "metrics", "train_batches", "loss"),
    *("optimizer", "scheduler", "initial_model"),
)


@dataclass(frozen=True, eq=False)
class Case:
    """One model to convert, with what its file says about using it.

    `name` is the file's stem, `source` what the user typed, `path` the absolute path of the file
    ("" for a model that came from no file), `digest` the SHA-256 of its bytes in hexadecimal.
    `args` and `kwargs` are the example inputs, `dynamic` says which of their dimensions vary, by
    name and dimension, and is None where nothing is said. Call the callables, which are the user's
    own, inside `user_code`, or by `user_batches` and `score`. `model` is in the mode it came in.
    """

    name: str
    source: str
    digest: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    eval_batches: Callable[[], Iterable[tuple[Any, Any]]] | None = None
    metrics: Callable[[Any, Any], dict[str, float]] | None = None
    lower_is_better: frozenset[str] = frozenset()
    train_batches: Callable[[int], Iterable[tuple[Any, Any]]] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    initial_model: Callable[[int], nn.Module] | None = None
    dynamic: Any = None
    path: str = ""

    @property
    def trainable(self) -> bool:
        """Whether there is all that training takes."""
        return self.train_batches is not None and self.loss is not None


def load_case(source: str) -> Case:
    """Run the model file at `source` and collect what it defines.

    `source` is `model.py`, `model.py:attribute` or `package.module:attribute`; the attribute is
    an nn.Module or a callable that returns one, and stands in for build_model.

    Raises UsageError when there is no such file or module, ModelError for anything wrong in it.
    """
    place, attribute = split_source(source)
    is_file = place.endswith(".py") or not attribute
    module, path = run_file(place) if is_file else run_module(place)
    model = _build_model(module, attribute, path)
    args, kwargs = _example_inputs(module, path)
    calls = {name: _optional_callable(module, name, path) for name in _OPTIONAL}
    if calls["metrics"] and not calls["eval_batches"]:
        what = f"{os.path.basename(path)} defines metrics, but not eval_batches"
        raise ModelError(what, mend="Define eval_batches(), which yields (inputs, target) pairs.")
    return Case(
        name=Path(path).stem if is_file else place.rpartition(".")[2],
        source=source,
        digest=digests.of_file(Path(path)),
        model=model,
        args=args,
        kwargs=kwargs,
        lower_is_better=_lower_is_better(module, path),
        dynamic=getattr(module, "dynamic", None),
        path=path,
        **calls,
    )


def as_call(inputs: Any, what: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs): a tensor or tuple is positional, a mapping holds keywords.

    `what` names the source of `inputs` in the ModelError that anything else raises.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return (), dict(inputs)
    if isinstance(inputs, list):
        raise ModelError(f"{what} gives a list", mend="Use a tuple for positional arguments.")
    detail = " with keys that are not strings" if isinstance(inputs, Mapping) else ""
    raise ModelError(f"{what} gives {kind_of(inputs)}{detail}", mend=f"Give {_INPUTS}.")


def refuse_unwritable(names: Iterable[str], what: str, where: str) -> None:
    """Raises ModelError for the first name that cannot be written as UTF-8, `what` being called
    so."""
    for name in names:
        if not is_text(name):
            mend = "Give it a name that can be written as UTF-8."
            raise ModelError(f"{what} is called {name!r}", where=where, mend=mend)


def _build_model(module: ModuleType, attribute: str, path: str) -> nn.Module:
    name = attribute or ("build_model" if hasattr(module, "build_model") else "model")
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part) and attribute:
            near = nearest(attribute, vars(module))
            mend = f"Did you mean {near}?" if near else "Give the name of one that it defines."
            raise UsageError(f"{os.path.basename(path)} does not define {attribute}", mend=mend)
        if not hasattr(value, part):
            raise _missing(["build_model", "model"], module, path)
        value = getattr(value, part)
    said = name
    if callable(value) and not isinstance(value, nn.Module):
        said = f"{name}()"
        with user_code(said, path):
            value = value()
    if not isinstance(value, nn.Module):
        mend = f"Let {said} give the torch.nn.Module to convert."
        raise ModelError(f"{said} gives {kind_of(value)}", where=os.path.basename(path), mend=mend)
    _check_parameters(value, said, path)
    return value


def _check_parameters(model: nn.Module, said: str, path: str) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    found = ", ".join(sorted(map(name_of, dtypes)))
    what = mend = ""
    if isinstance(model, torch.jit.ScriptModule):
        what = f"{said} gives a TorchScript module"
        mend = "Give the nn.Module that it was made from."
    elif any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        what = "the model has lazy parameters without a shape"
        mend = f"Run it once on an input before {said} gives it."
    elif dtypes and dtypes <= {torch.float16, torch.bfloat16}:
        what, mend = f"the model's parameters are already {found}", "Give it in FP32."
    elif torch.float32 not in dtypes:
        held = f"its parameters are {found}" if found else "it has no parameters"
        what = f"the model has no FP32 parameters, so there is nothing to convert: {held}"
        mend = f"Let {said} give a model in FP32."
    if what:
        raise ModelError(what, where=os.path.basename(path), mend=mend)


def _example_inputs(module: ModuleType, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not hasattr(module, "example_inputs"):
        raise _missing(["example_inputs"], module, path)
    value, said = module.example_inputs, "example_inputs"
    if callable(value):
        said = "example_inputs()"
        with user_code(said, path):
            value = value()
    return as_call(value, said)


def _missing(names: list[str], module: ModuleType, path: str) -> ModelError:
    """The error for needed names that the file does not define, with what was meant, perhaps."""
    given = _INPUTS if names == ["example_inputs"] else "the torch.nn.Module to convert"
    mend = f"Define {names[0]}(), which returns {given}."
    values = vars(module).items()
    own = [n for n, v in values if n[0] != "_" and not isinstance(v, type | ModuleType)]
    for name in names:
        if near := nearest(name, own):
            mend = f"Did you mean {near}? Then rename it to {name}."
    what = "does not define" if len(names) == 1 else "defines neither"
    return ModelError(f"{os.path.basename(path)} {what} {' nor '.join(names)}", mend=mend)


def _optional_callable(module: ModuleType, name: str, path: str) -> Any:
    value = getattr(module, name, None)
    if value is None or callable(value):
        return value
    what = f"{name} is {kind_of(value)}, not a function"
    raise ModelError(what, where=os.path.basename(path), mend=f"Write it as def {name}(...).")


def _lower_is_better(module: ModuleType, path: str) -> frozenset[str]:
    value = getattr(module, "lower_is_better", ())
    if isinstance(value, Iterable) and not isinstance(value, str):
        names = list(value)
        if all(isinstance(name, str) for name in names):
            return frozenset(names)
    what, mend = f"lower_is_better is {value!r}", 'Write a tuple of names, such as ("loss",).'
    raise ModelError(what, where=os.path.basename(path), mend=mend)


def kind_of(value: object) -> str:
    """What `value` is, for a message: "None", "a dict", "an int"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
