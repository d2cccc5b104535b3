"""A converted model for inference alone: weights in low precision, nothing left to cast."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amp_convert.capture.captured import Region
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.node_info import class_path
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import name_of
from amp_convert.core.tree_paths import map_tensors
from amp_convert.eager import no_plan
from amp_convert.plan.batch_norm_folds import batch_norm_folds
from amp_convert.plan.plan import BatchNormFold, Plan
from amp_convert.rewrite.fold_constants import Folded, fold
from amp_convert.rewrite.graph_execution import runner_of
from amp_convert.rewrite.insert_casts import Rewritten
from amp_convert.rewrite.kernels.tuned_graph import RunningGraph
from amp_convert.rewrite.original_signature import show

if TYPE_CHECKING:
    from amp_convert.rewrite.converted_model import ConvertedModel

MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What makes one module stand for another: the tables of its tensors and submodules."""


class FrozenModel(nn.Module):
    """A converted model for inference: weights in low precision, nothing left to cast.

    Its tensors are its own, named as the original's were. It stays in eval mode.
    """

    plan: Plan
    batch_norm_folds: tuple[BatchNormFold, ...]
    """Which BatchNorms are folded, and why others are not; none where that was not asked for."""
    model_class: str
    """The original's class, with its module."""
    example: tuple[tuple[Any, ...], dict[str, Any]]
    """The example inputs as (args, kwargs), without their values."""

    def __init__(self, converted: ConvertedModel, *, fold_batch_norm: bool = False) -> None:
        super().__init__()
        captured = converted.captured
        self.__dict__["plan"] = converted.plan
        by_node = {decision.node: decision for decision in self.plan.eval}
        folds = {
            r.path: tuple(batch_norm_folds(r, by_node)) if fold_batch_norm else ()
            for r in captured.regions
        }
        self.__dict__["batch_norm_folds"] = tuple(f for each in folds.values() for f in each)
        self.__dict__["model_class"] = class_path(type(captured.model))
        call = (captured.args, dict(captured.kwargs))
        self.__dict__["example"] = map_tensors(lambda t: t.to("meta"), call)
        folded = {
            r.path: fold_weights(
                r,
                converted.rewritten[r.path][Mode.EVAL],
                batch_norms=folds[r.path],
                fold_products=not self.plan.exact,
            )
            for r in captured.regions
        }
        self.__dict__["_runners"] = runners = {}
        if captured.is_whole:
            hold(self, folded[""].tensors)
            runners[""] = _runner(folded[""], self, exact=self.plan.exact)
            self.__dict__["_callee"] = runners[""]
        else:
            # What was not captured runs as it is, on a copy of its own.
            model = _copied(captured.model)
            shared = _shared(model, folded)
            for number, (path, part) in enumerate(folded.items()):
                module = owner = model.get_submodule(path)
                if path in shared:  # what another part reads as well is not replaced
                    owner = nn.Module()
                    model.add_module(f"frozen_part_{number}", owner)
                hold(owner, part.tensors)
                runners[path] = _runner(part, owner, exact=self.plan.exact)
                module.__dict__["forward"] = runners[path]
            for name in MODULE_STATE:
                self.__dict__[name] = model.__dict__[name]
            model.training = False
            self.__dict__["_callee"] = model
        self.__dict__["_call"] = inspect.signature(captured.model.forward)
        self.eval()
        show(self, self.__dict__["_call"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the original does, in the original's dtypes; no gradients."""
        if torch.compiler.is_exporting():  # a switch of grad mode could not be saved
            return self.__dict__["_callee"](*args, **kwargs)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self.__dict__["_callee"](*args, **kwargs)
        with torch.no_grad(), no_plan():
            return self.__dict__["_callee"](*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenModel.__new__, (FrozenModel,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        show(self, self.__dict__["_call"])

    @property
    def is_whole(self) -> bool:
        """Whether one graph holds the whole model."""
        return "" in self.__dict__["_runners"]

    def runner(self, path: str) -> GraphRunner:
        """What is called for the captured part at `path`."""
        found: GraphRunner = self.__dict__["_runners"][path]
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        refuse_other_dtypes(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> FrozenModel:
        """Refuse training mode: raises UnsupportedModelError when `mode` is true."""
        if mode:
            raise UnsupportedModelError(
                "a frozen model is for inference only", mend="Train the converted model instead."
            )
        super().train(False)
        return self


def _runner(folded: Folded, owner: nn.Module, *, exact: bool) -> GraphRunner:
    running = RunningGraph(folded.graph_module, folded.signature, exact=exact)
    return GraphRunner(folded.graph_module, folded.signature, {}, owner, running)


def _shared(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """The parts that have a module in common with another part."""
    holders: dict[nn.Module, set[str]] = {}
    for path in paths:
        for module in model.get_submodule(path).modules():
            holders.setdefault(module, set()).add(path)
    return {path for found in holders.values() if len(found) > 1 for path in found}


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy. PyTorch copies no tensors in compressed sparse formats, so they are cloned."""
    tensors = chain(model.parameters(), model.buffers())
    compressed = {id(t): t.clone() for t in tensors if t.layout not in _COPIED_LAYOUTS}
    return copy.deepcopy(model, memo=compressed)


_COPIED_LAYOUTS = (torch.strided, torch.sparse_coo)


def refuse_other_dtypes(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise UsageError where `change`, which `.to()`, `.half()` and such apply to every tensor of
    `module`, would give its weights another dtype than the plan's."""
    tensors = chain(module.parameters(), module.buffers())
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        if dtype.is_floating_point and (made := change(torch.empty(0, dtype=dtype)).dtype) != dtype:
            raise UsageError(
                f"the weights of a converted model keep the dtypes of its plan: {name_of(dtype)} "
                f"would become {name_of(made)}",
                mend="Convert to another dtype, or take .freeze() for weights in low precision.",
            )


def hold(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Store copies of `tensors` in `module` under their dotted names, in place of what is there."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            # matmul takes another path for a weight that requires grad, even under no_grad: only
            # the same flag gives the bits that were validated.
            place(module, name, nn.Parameter(tensor.detach().clone()))
        else:
            place(module, name, tensor.clone())


def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make a tensor a parameter of `module`, or a buffer where it is none, under a dotted name, in
    place of what is there."""
    path, _, key = name.rpartition(".")
    owner = module
    for part in filter(None, path.split(".")):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner._parameters.pop(key, None)
    owner._buffers.pop(key, None)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(key, tensor)
    else:
        owner.register_buffer(key, tensor)


def fold_weights(
    region: Region,
    rewritten: Rewritten,
    *,
    wide: bool = False,
    batch_norms: Iterable[BatchNormFold] = (),
    fold_products: bool = False,
) -> Folded:
    """The graph for inference, with the weights that the region's module has now; `wide`,
    `batch_norms` and `fold_products` as in `fold`."""
    runner = runner_of(rewritten, region.module)
    placeholders = runner.signature.placeholders(rewritten.graph_module.graph)
    held = zip(placeholders, runner.tensors(), strict=True)
    tensors = {node.name: tensor for node, tensor in held if tensor is not None}
    return fold(rewritten, tensors, wide=wide, batch_norms=batch_norms, fold_products=fold_products)
