"""`Signature` of a captured graph, from what torch.export says of it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from amp_convert.core.tree_paths import leaves_by_path

_T = TypeVar("_T")


class Source(StrEnum):
    """Where an input of a captured graph comes from."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    USER = "user"


@dataclass(frozen=True)
class InputSpec:
    """One placeholder: its source and, for all but the user's, the name of the tensor there."""

    source: Source
    target: str
    mutated: bool = False


@dataclass(frozen=True)
class UserInput:
    """What the graph expects of one leaf of the user's inputs.

    `shape` holds None for a dimension that may vary; it is None for a leaf that is no tensor, and
    then `value` is the value that the graph was captured with.
    """

    path: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None
    value: Any = None


@dataclass(frozen=True)
class SizeGuard:
    """A condition on input sizes that the model tested while it was traced, and its outcome.

    `holds` takes the arguments by name. Where it is false, the model would take another path than
    the one in the graph.
    """

    text: str
    holds: _Condition


@dataclass(frozen=True)
class Signature:
    """How a captured graph's flat inputs and outputs map to a module's.

    `call` is the signature of the module's `forward`, `names` are its arguments that were given at
    capture, `guards` what tracing assumed of their sizes. `inputs` has one entry a placeholder, in
    order. The graph returns the new values of `buffer_outputs`, then of the user inputs numbered in
    `input_outputs`, then the user's outputs.
    """

    call: inspect.Signature
    guards: tuple[SizeGuard, ...]
    inputs: tuple[InputSpec, ...]
    names: tuple[str, ...]
    user_inputs: tuple[UserInput, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    buffer_outputs: tuple[str, ...]
    input_outputs: tuple[int, ...]

    def placeholders(self, graph: fx.Graph) -> dict[fx.Node, InputSpec]:
        """What each placeholder of a captured graph, or of a rewritten copy of it, stands for."""
        return dict(zip(graph.find_nodes(op="placeholder"), self.inputs, strict=True))

    def users(self, values: Iterable[_T]) -> list[tuple[UserInput, _T]]:
        """Those of all inputs that the user gives, each with what the graph expects of it; `values`
        has one for each input."""
        given = [v for v, s in zip(values, self.inputs, strict=True) if s.source is Source.USER]
        return list(zip(self.user_inputs, given, strict=True))


def size_guard(code: str) -> SizeGuard:
    """A guard from its text, as torch.export writes it."""
    return SizeGuard(re.sub(r"L\['(\w+)'\]", r"\1", code), _Condition(code))


def _guards(program: torch.export.ExportedProgram) -> tuple[SizeGuard, ...]:
    """What the model's own conditions on sizes came out as."""
    return tuple(size_guard(code) for code in getattr(program, "_guards_code", ()))


class UncheckableSizesError(Exception):
    """What tracing assumed of sizes cannot be checked at a call; the message says why."""


def check_guards(program: torch.export.ExportedProgram, arguments: Mapping[str, Any]) -> None:
    """Raises UncheckableSizesError where this PyTorch does not tell what tracing assumed of sizes,
    or in words that are not known: a graph whose conditions nobody can check could be wrong for
    other sizes, so it may take none."""
    if not hasattr(program, "_guards_code"):
        raise UncheckableSizesError("this PyTorch does not tell what tracing assumed of sizes")
    for guard in _guards(program):
        if not guard.holds(arguments):
            raise UncheckableSizesError(f"the example inputs themselves break {guard.text}")


class _Condition:
    """A condition on the arguments by name, from its text. One that cannot be evaluated, since a
    size that divides others is 0 or since it uses words that are not known, does not hold."""

    def __init__(self, code: str) -> None:
        self.code = code
        self._compiled = compile(code, "<guard>", "eval")

    def __call__(self, arguments: Mapping[str, Any]) -> bool:
        names = {"L": arguments, "torch": torch, "math": math}
        try:
            return bool(eval(self._compiled, names))  # noqa: S307  torch.export wrote it
        except Exception:  # noqa: BLE001  whatever goes wrong, nothing is known to hold
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Condition, (self.code,)


_SOURCES = {
    InputKind.PARAMETER: Source.PARAMETER,
    InputKind.BUFFER: Source.BUFFER,
    InputKind.CONSTANT_TENSOR: Source.CONSTANT,
    InputKind.USER_INPUT: Source.USER,
}


def signature_of(
    program: torch.export.ExportedProgram,
    module: nn.Module,
    call: inspect.Signature,
    arguments: Mapping[str, Any],
    out_spec: pytree.TreeSpec,
) -> Signature:
    declared = program.graph_signature
    owned = {n for n, _ in [*module.named_parameters(remove_duplicate=False),
                            *module.named_buffers(remove_duplicate=False)]}  # fmt: skip
    held = _held_tensors(module)
    mutated = set(declared.buffers_to_mutate.values())
    inputs = []
    for spec in declared.input_specs:
        if spec.kind not in _SOURCES:
            raise ValueError(f"a {spec.kind.name.lower()} input is not supported")
        source, target = _SOURCES[spec.kind], spec.target or ""
        if source is Source.BUFFER and target not in owned:
            source = Source.CONSTANT
        if source is Source.CONSTANT:
            source, target = held.get(_memory(program.constants.get(target)), (source, target))
        inputs.append(InputSpec(source, target, mutated=target in mutated))
    buffers, changed = [], []
    for output in declared.output_specs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            buffers.append(output.target or "")
        elif output.kind is OutputKind.USER_INPUT_MUTATION:
            names = [s.arg.name for s in declared.input_specs]
            changed.append(names.index(output.target))
        elif output.kind is not OutputKind.USER_OUTPUT:
            raise ValueError(f"a {output.kind.name.lower()} output is not supported")
    leaves, in_spec = pytree.tree_flatten(list(arguments.values()))
    user_inputs, guards = _pinned(_user_inputs(program, arguments, leaves), _guards(program))
    return Signature(
        call=call,
        guards=guards,
        inputs=tuple(inputs),
        names=tuple(arguments),
        user_inputs=user_inputs,
        in_spec=in_spec,
        out_spec=out_spec,
        buffer_outputs=tuple(buffers),
        input_outputs=tuple(changed),
    )


_PIN = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\] == (\d+)")


def _pinned(
    inputs: Sequence[UserInput], guards: Iterable[SizeGuard]
) -> tuple[tuple[UserInput, ...], tuple[SizeGuard, ...]]:
    """The inputs with a size in place of one that a guard holds to a number, and other guards."""
    left, sizes = [], dict[tuple[str, int], int]()
    for guard in guards:
        if found := _PIN.fullmatch(guard.holds.code):
            sizes[found[1], int(found[2])] = int(found[3])
        else:
            left.append(guard)
    pinned = [
        replace(each, shape=tuple(sizes.get((each.path, d), n) for d, n in enumerate(each.shape)))
        if each.shape is not None
        else each
        for each in inputs
    ]
    known = {each.path for each in inputs}
    left += [g for g in guards if (f := _PIN.fullmatch(g.holds.code)) and f[1] not in known]
    return tuple(pinned), tuple(left)


def _held_tensors(module: nn.Module) -> dict[object, tuple[Source, str]]:
    """The module's tensors by where they lie. A model may reach for its parameters elsewhere than
    in its modules, as Keras does through its variables; export then takes them for constants."""
    buffers = {_memory(t): (Source.BUFFER, name) for name, t in module.named_buffers()}
    parameters = {_memory(t): (Source.PARAMETER, name) for name, t in module.named_parameters()}
    return {key: found for key, found in {**buffers, **parameters}.items() if key is not None}


def _memory(tensor: Any) -> object:
    """Equal for tensors that are the same values in memory; None for what holds none."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _user_inputs(
    program: torch.export.ExportedProgram, arguments: Mapping[str, Any], leaves: Sequence[Any]
) -> tuple[UserInput, ...]:
    paths = [name + path for name, value in arguments.items() for path, _ in leaves_by_path(value)]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    found = []
    for path, leaf, spec in zip(paths, leaves, specs, strict=True):
        value = None if isinstance(spec.arg, ConstantArgument) else values[spec.arg.name]
        if isinstance(value, torch.Tensor):
            sizes: list[int | torch.SymInt] = list(value.shape)
            shape = tuple(size if isinstance(size, int) else None for size in sizes)
            found.append(UserInput(path, shape, value.dtype))
        else:
            found.append(UserInput(path, None, None, leaf))
    return tuple(found)
