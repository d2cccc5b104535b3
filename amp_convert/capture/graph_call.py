"""Calling a captured graph as if it were the module it came from.

A captured graph is a function: parameters, buffers and constants are inputs like the user's own,
and a changed buffer is one more output. `Signature` says which input is which; `GraphRunner` binds
them to a module at call time. Looking the tensors up at every call, instead of storing them, is
what lets two graphs (train and eval) and a rewritten copy of each share one set of weights, and
lets `load_state_dict`, `.to()` and optimizers work on that set as usual.

A buffer that the graph changes is cloned before the graph reads it: the backward pass may have
saved the value that was read, and writing the new value over it would make PyTorch refuse to go on.
One that the graph itself writes to (`in_place`) is given to it as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture.flat_call import flat_call
from amp_convert.capture.graph_signature import InputSpec, Signature, Source, UserInput
from amp_convert.capture.stored_graph import restored, stored
from amp_convert.core.errors import ModelError


def bind(
    call: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Match a call with a `forward`; ModelError when it does not fit."""
    try:
        return call.bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"the inputs do not fit the model's forward: {error}",
            mend="Give a tuple for positional inputs or a dict for keywords.",
        ) from None


def by_keyword(call: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` by their own: so export, and its guards, name them."""
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        many = call.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named.update(value if many else {name: value})
    return named


class UnfitCallError(ModelError):
    """A call that the module may take, and its graph does not: of other sizes, another structure,
    or with other constants than it was captured with."""


class GraphRunner:
    """Runs one graph of a module, in the module's own calling convention. `run` is what is called
    in place of the graph: it takes the same flat inputs and gives the same flat outputs; `in_place`
    are the inputs, by number, that it writes to itself."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        constants: Mapping[str, torch.Tensor],
        owner: nn.Module,
        run: Callable[..., Any] | None = None,
        in_place: frozenset[int] = frozenset(),
    ) -> None:
        self.run: Callable[..., Any] = run or graph_module
        self.graph_module, self.signature = graph_module, signature
        self.owner, self._constants = owner, dict(constants)
        self._changes = len(signature.buffer_outputs) + len(signature.input_outputs)
        self._slots = [
            (*self._slot(spec), spec.mutated and i not in in_place)
            for i, spec in enumerate(signature.inputs)
        ]
        self._flat = flat_call(signature)
        self._submodules = [
            (module._modules, name, child, path)
            for path, module in owner.named_modules()
            for name, child in module._modules.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        run = None if self.run is self.graph_module else self.run
        graph = stored(self.graph_module)
        return {**self.__dict__, "graph_module": graph, "run": run, "_flat": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _flat=flat_call(state["signature"]))
        self.graph_module = restored(state["graph_module"])
        self.run = state["run"] or self.graph_module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.inputs(args, kwargs)
        return self.finish(self.run(*inputs), inputs)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's flat inputs: the module's tensors and the leaves of the user's call. Raises
        UnfitCallError for a call that does not fit, ModelError for a module whose parts are not
        what they were."""
        for children, name, child, path in self._submodules:
            if children.get(name) is not child:
                raise ModelError(
                    f"the submodule {name} was replaced after the model was captured",
                    where=path,
                    mend="Convert the model anew.",
                )
        leaves = iter(self._flat_leaves(args, kwargs) or self._leaves(args, kwargs))
        return [
            next(leaves) if store is None else store[key].clone() if cloned else store[key]
            for store, key, cloned in self._slots
        ]

    @property
    def writes(self) -> bool:
        """Whether a call changes buffers or inputs."""
        return self._changes > 0

    def tensors(self) -> list[torch.Tensor | None]:
        """The module's own tensors in the order of the graph's inputs; None for the user's."""
        return [None if store is None else store[key] for store, key, _ in self._slots]

    def finish(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """Write changed buffers and inputs back; return the user's outputs."""
        signature = self.signature
        written = len(signature.buffer_outputs)
        buffers, changed = outputs[:written], outputs[written : self._changes]
        if not self._changes:
            return self.results(outputs)
        with torch.no_grad():
            for name, value in zip(signature.buffer_outputs, buffers, strict=True):
                store, key = _lookup(self.owner, name)
                if value is not store[key]:
                    store[key].copy_(value)
            for index, value in zip(signature.input_outputs, changed, strict=True):
                inputs[index].copy_(value)
        return self.results(outputs)

    def changes(
        self, reference: Sequence[Any], value: Sequence[Any]
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """What two sets of outputs would write: (name of the buffer or input, its two values)."""
        names = [f"buffer {name}" for name in self.signature.buffer_outputs]
        for index in self.signature.input_outputs:
            before = self.signature.inputs[:index]
            position = sum(spec.source is Source.USER for spec in before)
            names.append(f"input {self.signature.user_inputs[position].path}")
        return zip(names, reference, value, strict=False)

    def results(self, outputs: Sequence[Any]) -> Any:
        """The user's outputs in their own structure; nothing is written."""
        return pytree.tree_unflatten(outputs[self._changes :], self.signature.out_spec)

    def _slot(self, spec: InputSpec) -> tuple[dict[str, torch.Tensor] | None, str]:
        if spec.source is Source.USER:
            return None, ""
        if spec.source is Source.CONSTANT:
            return self._constants, spec.target
        return _lookup(self.owner, spec.target)

    def _flat_leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        try:
            return self._flat(*args, **kwargs) if self._flat is not None else None
        except TypeError:  # it does not fit, and the slow way says why
            return None

    def _leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of capture, checked against what was captured.

        An argument that was left out at capture may be given later only with its default value: the
        graph holds the computation for that value and no other.
        """
        arguments = bind(self.signature.call, args, kwargs).arguments
        names, parameters = self.signature.names, self.signature.call.parameters
        for name in arguments.keys() - set(names):
            value = arguments[name]
            if value is not parameters[name].default and not _is_empty(value):
                raise UnfitCallError(
                    f"the argument {name!r} was not given when the model was captured",
                    mend="Convert it with example inputs that hold every argument you will pass.",
                )
        given = {n: arguments[n] if n in arguments else parameters[n].default for n in names}
        for name in names:
            if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given[name] = dict(sorted(given[name].items()))
        leaves, spec = pytree.tree_flatten(list(given.values()))
        self._check(leaves, spec)
        named = by_keyword(self.signature.call, given)
        for guard in self.signature.guards:
            if not guard.holds(named):
                raise UnfitCallError(
                    f"the model takes another path for inputs of this size: {guard.text} is false",
                    mend="Convert it with example inputs of the size you will pass.",
                )
        return leaves

    def _check(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        if spec != self.signature.in_spec:
            raise UnfitCallError(
                "the inputs have another structure than the example inputs",
                mend="Convert the model with inputs of the structure you will pass.",
            )
        for leaf, want in zip(leaves, self.signature.user_inputs, strict=True):
            if other := _other_kind(leaf, want):
                mend = "Give what the example inputs hold there."
                raise ModelError(f"input {want.path} {other}", mend=mend)
            if problem := _mismatch(leaf, want):
                raise UnfitCallError(
                    f"input {want.path} {problem}",
                    mend="Pad it to that size, or convert the model with example inputs, and with "
                    "batches, like those you will pass.",
                )


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple | dict) and not value


def _other_kind(leaf: Any, want: UserInput) -> str:
    """Why a leaf is not what the model takes, whatever its size."""
    if want.shape is None:
        return ""
    if not isinstance(leaf, torch.Tensor):
        return f"is a {type(leaf).__name__}, but the graph was captured with a tensor"
    if leaf.dtype != want.dtype:
        return f"has dtype {leaf.dtype}, but the graph was captured with {want.dtype}"
    return ""


def _mismatch(leaf: Any, want: UserInput) -> str:
    if want.shape is None:
        same = leaf is want.value or (type(leaf) is type(want.value) and leaf == want.value)
        return "" if same else f"is {leaf!r}, but the graph was captured with {want.value!r}"
    fits = len(leaf.shape) == len(want.shape) and all(
        expected is None or size == expected
        for size, expected in zip(leaf.shape, want.shape, strict=True)
    )
    shown = ", ".join("any" if size is None else str(size) for size in want.shape)
    return "" if fits else f"has shape {tuple(leaf.shape)}, but the graph takes ({shown})"


def _lookup(owner: nn.Module, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """The dictionary that holds a module's tensor, and its key there."""
    path, _, key = name.rpartition(".")
    module = owner.get_submodule(path)
    for store in (module._parameters, module._buffers):
        if key in store:
            return store, key  # type: ignore[return-value]
    raise KeyError(name)
