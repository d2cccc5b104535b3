"""Calling the functions of a model file: its batches and its metrics, checked as they come."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.core.errors import ModelError
from amp_convert.core.tree_paths import map_tensors
from amp_convert.loading.model_file import Case, as_call, kind_of, refuse_unwritable
from amp_convert.loading.user_code import defined_at, placed, user_code

_END = object()


def user_batches(
    what: str, make: Callable[[], Iterable[tuple[Any, Any]]], path: str, at_most: int | None = None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """The first `at_most` batches of `make()`, or all, each as (args, kwargs, target).

    `what` is the user's name for `make`, "eval_batches" or "train_batches". Raises ModelError
    when the user's code does, when it gives no batch at all, or when a batch is not a pair.
    """
    what, where = f"{what}()", defined_at(make, path)
    mend = "Let it give (inputs, target) pairs, anew at each call."
    with user_code(what, path), torch.enable_grad():
        batches = iter(make())
    for index in itertools.count():
        if index == at_most:
            return
        with user_code(what, path), torch.enable_grad():  # targets may be gradients
            batch: Any = next(batches, _END)
        if batch is _END and index:
            return
        if batch is _END:
            raise ModelError(f"{what} gives no batches", where=where, mend=mend)
        said = f"batch {index} of {what}"
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ModelError(f"{said} is {kind_of(batch)}, not a pair", where=where, mend=mend)
        with placed(where):
            args, kwargs = as_call(batch[0], said)
        yield args, kwargs, batch[1]


def copied(value: Any) -> Any:
    """A copy of nested outputs or targets that a user's function may write to: containers, tensors
    and arrays are new."""
    tensors = map_tensors(lambda tensor: tensor.detach().clone(), value)
    return pytree.tree_map(
        lambda leaf: leaf.copy() if type(leaf).__module__ == "numpy" else leaf, tensors
    )


def score(case: Case, outputs: Any, target: Any) -> dict[str, float]:
    """The user's metrics of one batch, as plain floats; empty when the file defines none. They are
    given copies, which they may write to.

    Raises ModelError when metrics() fails or gives anything but a dict of numbers.
    """
    if case.metrics is None:
        return {}
    with user_code("metrics()", case.path):
        values: Any = case.metrics(*copied((outputs, target)))
        found: dict[str, float] | None = None
        if isinstance(values, Mapping):
            found = {str(name): float(value) for name, value in values.items()}
    if found is not None:
        refuse_unwritable(found, "a metric", os.path.basename(case.path))
        return found
    what, where = f"metrics() gives {kind_of(values)}", defined_at(case.metrics, case.path)
    mend = 'Return a dict of numbers, such as {"accuracy": 0.98}.'
    raise ModelError(f"{what}, not a dict", where=where, mend=mend)
