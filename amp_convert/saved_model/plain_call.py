"""A frozen model -> a module that `torch.export` can take and anyone can load.

What the exported program must not have is what its reader would lack: classes of the user's code or
of a library among inputs and outputs, a switch of grad mode, masks looked at by value, calls of our
own functions. So the frozen graph runs here in its `deployed` form, and containers become dicts,
lists and tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.export_call import explicit
from amp_convert.capture.graph_call import by_keyword
from amp_convert.capture.graph_signature import Signature, Source
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.rewrite.frozen_model import FrozenModel, place
from amp_convert.rewrite.kernels.tuned_graph import deployed
from amp_convert.rewrite.original_signature import show

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PlainModule(nn.Module):
    """The graph of a frozen model, over the same tensors, which need no gradients unless the plan
    asks for PyTorch's own bits: matmul takes another path for weights that do."""

    def __init__(self, frozen: FrozenModel) -> None:
        super().__init__()
        runner, exact = frozen.runner(""), frozen.plan.exact
        self._signature: Signature = runner.signature
        self._graph = [deployed(runner.graph_module, runner.signature, exact=exact)]
        self._changes = len(self._signature.buffer_outputs) + len(self._signature.input_outputs)
        for name, tensor in frozen.named_parameters(remove_duplicate=False):
            grad = tensor.requires_grad and exact
            place(self, name, nn.Parameter(tensor.detach(), requires_grad=grad))
        for name, buffer in frozen.named_buffers(remove_duplicate=False):
            place(self, name, buffer)
        self.eval()
        show(self, explicit(self._signature.call, frozen.example[1]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the frozen model gives, in plain containers; buffers and inputs are written as the
        original does."""
        signature = self._signature
        given = pytree.tree_leaves(list(arguments(signature, args, kwargs).values()))
        self._test_guards(given)
        leaves = iter(given)
        inputs = [
            next(leaves) if spec.source is Source.USER else self._tensor(spec.target)
            for spec in signature.inputs
        ]
        outputs = self._graph[0](*inputs)
        changed = iter(outputs[: self._changes])
        for name in signature.buffer_outputs:
            self._tensor(name).copy_(next(changed))
        for index in signature.input_outputs:
            inputs[index].copy_(next(changed))
        return plain(pytree.tree_unflatten(outputs[self._changes :], signature.out_spec))

    def _test_guards(self, leaves: list[Any]) -> None:
        """Test the conditions on sizes under which the graph is the model: a program takes over
        what it sees being tested. They are written for the containers of the original."""
        signature = self._signature
        if signature.guards:
            values = pytree.tree_unflatten(leaves, signature.in_spec)
            named = by_keyword(signature.call, dict(zip(signature.names, values, strict=True)))
            for guard in signature.guards:
                if not guard.holds(named):
                    raise ValueError(f"{guard.text} does not hold for the example")

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, key = name.rpartition(".")
        found = getattr(self.get_submodule(path), key)
        assert isinstance(found, torch.Tensor)
        return found


def arguments(
    signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, those alone that were given at capture, in that order; one that
    was given as None may be left out."""
    given = signature.call.bind(*args, **kwargs).arguments
    for name, parameter in signature.call.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in given:
            given[name] = dict(sorted(given[name].items()))
    return {name: given.get(name) for name in signature.names}


def plain_call(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A call with plain containers and without what is None: no program would see that a tensor
    is given in its place. Raises UnsupportedModelError where an input is in a container whose order
    would be lost."""
    call = _without_none(
        signature,
        tuple(plain(value) for value in args),
        {k: plain(v) for k, v in kwargs.items()},
    )
    before = pytree.tree_leaves(list(arguments(signature, args, kwargs).values()))
    after = pytree.tree_leaves(list(arguments(signature, *call).values()))
    if [id(leaf) for leaf in before] != [id(leaf) for leaf in after]:
        raise UnsupportedModelError(
            "an input is in a container of a class that no file can hold",
            mend="Give the model its tensors in tuples, lists or dicts.",
        )
    return call


def _without_none(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The same call; arguments behind one that is None are given by keyword, where they can be."""
    kept = {name: value for name, value in kwargs.items() if value is not None}
    if all(value is not None for value in args):
        return args, kept
    first = next(i for i, value in enumerate(args) if value is None)
    names = list(signature.call.parameters.values())[first : len(args)]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in names):
        return args, kept
    behind = {p.name: v for p, v in zip(names, args[first:], strict=True) if v is not None}
    return args[:first], {**behind, **kept}


def plain(value: Any) -> Any:
    """A value with dicts, lists and tuples in place of all other containers: a dict where the
    class's entries have names, as those of dataclasses and of transformers' outputs do."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    if pytree.tree_is_leaf(value):
        return value
    node = pytree.SUPPORTED_NODES[type(value)]
    if node.flatten_with_keys_fn is None:
        return tuple(plain(each) for each in node.flatten_fn(value)[0])
    entries = node.flatten_with_keys_fn(value)[0]
    names = [_name(key) for key, _ in entries]
    if None in names:
        return tuple(plain(each) for _, each in entries)
    return {name: plain(each) for name, (_, each) in zip(names, entries, strict=True)}


def _name(key: Any) -> str | None:
    if isinstance(key, pytree.GetAttrKey):
        return key.name
    return key.key if isinstance(key, pytree.MappingKey) and isinstance(key.key, str) else None
