"""Why PyTorch does not trace a part of a model, in words that its author can use.

PyTorch's own messages speak of the inside of its tracer. `refusal_of` puts in front what they mean
for the model and what can be done about it, and keeps the first line of the original behind, to be
searched for. The kinds are told by the exception's class or by words that PyTorch has had in its
messages for several releases; what is not known is said to be so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from amp_convert.core.errors import first_line

_LONGEST = 160
"""Characters of PyTorch's own words that are shown."""


@dataclass(frozen=True)
class Refusal:
    """What stands in the way, as a clause, and a sentence that says what to do."""

    reason: str
    mend: str


@dataclass(frozen=True)
class _Kind:
    """`signs` is looked for in the exception's class and words."""

    signs: re.Pattern[str]
    what: str
    mend: str


def _kind(signs: str, what: str, mend: str) -> _Kind:
    return _Kind(re.compile(signs), what, mend)


_KINDS = (
    _kind(
        "GuardOnDataDependentSymNode|DataDependentOutputException|data-dependent",
        "its control flow, or a size, depends on the values of a tensor, which a graph cannot hold",
        "Use torch.where or torch.cond there, or move that code out of the model.",
    ),
    _kind(
        r"\.numpy\(\) is not supported|Cannot access data pointer|data_ptr",
        "it takes a tensor out of PyTorch, to NumPy or to a pointer, where no graph can follow",
        "Compute that with PyTorch's own functions, or outside of the model.",
    ),
    _kind(
        "not a known type|pytree-flatten|flatten_with_keys|is not supported as pytree",
        "it takes or returns an object that PyTorch cannot take apart into tensors",
        "Use tensors, tuples, lists, dicts or dataclasses, or register the class with "
        "torch.utils._pytree.register_pytree_node or torch.export.register_dataclass.",
    ),
    _kind(
        "no fake impl|register_fake",
        "it uses a custom operator that PyTorch cannot trace, since nothing says what it returns",
        "Register that with torch.library.register_fake.",
    ),
    _kind(
        "SparseCsr|Sparse[CB]s[rc]|sparse",
        "it holds a sparse tensor in a format that PyTorch cannot trace",
        "Use a dense one, or the COO format, to have it converted.",
    ),
    _kind(
        "UnsupportedOperatorException",
        "it uses an operator that PyTorch cannot trace, on a sparse or nested tensor as a rule",
        "Use dense tensors there to have it converted.",
    ),
    _kind(
        "__obj_flatten__|ScriptObject|custom_obj|CustomObjArgument",
        "it holds or makes an object of TorchScript, such as a quantised layer or a generator of "
        "random numbers, which a graph cannot hold",
        "Convert the model before it is quantised, and make generators outside of it.",
    ),
    _kind(
        "fake tensor in the exported program constant",
        "it does something that a graph cannot hold, such as torch.autograd.grad inside of the "
        "forward pass, a write to `.data`, or work in another thread",
        "Move that out of the model to have the rest converted as a whole.",
    ),
    _kind(
        "does not require grad and does not have a grad_fn",
        "it asks for gradients inside of the forward pass, which inference switches off",
        "Put that part under torch.enable_grad().",
    ),
    _kind(
        "Tensor subclass|tensor subclass|nested",
        "it makes a tensor of another class, which PyTorch cannot trace",
        "Use plain tensors inside of the model.",
    ),
    _kind(
        "parameter_mutation|mutates a parameter|leaf Variable that requires grad",
        "it writes to its parameters in the forward pass, which a graph cannot hold",
        "Register what is written to as a buffer.",
    ),
    _kind(
        "were assigned during export|assigned during export",
        "it keeps a tensor in an attribute, which a graph cannot hold",
        "Register it as a buffer, or return it.",
    ),
)
_UNKNOWN = _kind(
    "", "PyTorch cannot trace it", "See what torch.export.export says of that part alone."
)


def refusal_of(error: BaseException) -> Refusal:
    """What an exception of torch.export means for the model."""
    said = first_line(error)
    text = f"{type(error).__name__}: {error}"
    kind = next((kind for kind in _KINDS if kind.signs.search(text)), _UNKNOWN)
    short = said if len(said) <= _LONGEST else f"{said[:_LONGEST].rstrip()} ..."
    return Refusal(f"{kind.what} ({type(error).__name__}: {short})", kind.mend)
