"""The check of a call's arguments, as one generated function.

Binding a call, flattening it and holding each leaf against what was captured takes 60 µs for a
model of two inputs. Most models take tensors and nothing around them. For those, this writes a
function with the parameters of the model's `forward` that looks at each tensor's class, dtype and
sizes and gives the leaves in order: 2 µs. It answers None for whatever else it is given, and the
slow way then says what does not fit, or finds that it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from amp_convert.capture.graph_signature import Signature, UserInput

_PLAIN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_CONSTANTS = (type(None), bool, int, str)


def flat_call(signature: Signature) -> Callable[..., list[Any] | None] | None:
    """A function of a call's arguments that gives their leaves, or None where it cannot tell; None
    for a model that takes more than tensors."""
    parameters = signature.call.parameters
    inputs = signature.user_inputs
    if [given.path for given in inputs] != list(signature.names):
        return None
    if any(p.kind not in _PLAIN for n, p in parameters.items() if n in signature.names):
        return None
    names: dict[str, Any] = {"_tensors": _TENSORS, "_left": object()}
    names.update({f"_guard_{i}": guard.holds for i, guard in enumerate(signature.guards)})
    heads, tests, keyword_only = [], [], False
    for name, parameter in parameters.items():
        if parameter.kind not in _PLAIN:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            heads.append("*")
        heads.append(f"{name}=_left")
        if name in signature.names:
            tests += _tests(name, inputs[signature.names.index(name)], names)
        else:
            tests.append(f"{name} is not _left")
    if None in tests or any(name.startswith("_") for name in parameters):
        return None
    arguments = "{" + ", ".join(f"{name!r}: {name}" for name in signature.names) + "}"
    lines = [
        f"def flat({', '.join(heads)}):",
        *(f"    if {test}: return None" for test in tests),
        *(f"    if not _guard_{i}({arguments}): return None" for i in range(len(signature.guards))),
        f"    return [{', '.join(signature.names)}]",
    ]
    exec("\n".join(lines), names)  # noqa: S102  of names that Python takes for parameters
    found: Callable[..., list[Any] | None] = names["flat"]
    return found


def _tests(name: str, given: UserInput, names: dict[str, Any]) -> list[Any]:
    """Conditions under which this argument is left to the slow way; [None] if that is always."""
    if given.shape is None:
        if not isinstance(given.value, _CONSTANTS):
            return [None]
        names[f"_is_{name}"] = given.value
        return [f"{name} is not _is_{name}"]
    names[f"_dtype_{name}"] = given.dtype
    tests = [
        f"{name}.__class__ not in _tensors",
        f"{name}.dtype is not _dtype_{name}",
        f"{name}.dim() != {len(given.shape)}",
    ]
    fixed: Mapping[int, int] = {i: n for i, n in enumerate(given.shape) if n is not None}
    if fixed:
        tests.append(f"(_s := {name}.shape)[{(i := next(iter(fixed)))}] != {fixed[i]}")
        tests += [f"_s[{i}] != {n}" for i, n in list(fixed.items())[1:]]
    return tests
