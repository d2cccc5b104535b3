"""What the submodules of a model are called with: one eager run that looks on."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.node_info import is_library_frame, short_path
from amp_convert.core import device as devices
from amp_convert.core.errors import (
    AmpConvertError,
    ModelError,
    first_line,
)
from amp_convert.core.random_state import preserved_rng

ModuleCall = tuple[tuple[Any, ...], dict[str, Any]]


def observed_calls(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    paths: Collection[str] | None = None,
) -> list[tuple[str, ModuleCall]]:
    """(path, inputs) of every call of the submodules at `paths` (all, if None), in order, from one
    eager run in eval mode. Inputs are copies: the caller may write to its own later."""
    calls: list[tuple[str, ModuleCall]] = []

    def watch(path: str) -> Any:
        def hook(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
            calls.append((path, _cloned((a, k))))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
        and (paths is None or path in paths)
        and not isinstance(module, torch.jit.ScriptModule)  # it takes no such hooks
    ]
    device = devices.of_model(model)
    args, kwargs = _cloned((args, dict(kwargs)))
    try:
        with in_mode(model, training=False), torch.no_grad(), preserved_rng(device):
            model(*args, **kwargs)
    except AmpConvertError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model refuses its inputs: {type(error).__name__}: {first_line(error)}",
            where=user_line(error),
            mend="Give example inputs that the model takes.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def calls_by_path(
    model: nn.Module, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
) -> dict[str, list[ModuleCall]]:
    """What the submodules are called with in these calls of the model."""
    found: dict[str, list[ModuleCall]] = {}
    for args, kwargs in calls:
        for path, call in observed_calls(model, tuple(args), kwargs):
            found.setdefault(path, []).append(call)
    return found


def _cloned(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)


def user_line(error: BaseException) -> str:
    """`file:line` of the deepest frame that is neither PyTorch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_library_frame(frame.filename):
            return f"{short_path(frame.filename)}:{frame.lineno}"
    return ""
