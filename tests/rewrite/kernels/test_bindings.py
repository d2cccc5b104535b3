"""Eager's binding and the operator are one function: on PyTorch's own samples, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.rewrite.kernels.bindings import BINDINGS, cast
from amp_convert.rewrite.kernels.in_place import in_place_form
from tests.bits import assert_same_bits
from tests.op_samples import Call, calls_of, calls_of_modules, database

_FORMS = {in_place_form(op): op for op in BINDINGS if in_place_form(op) is not None}
"""In-place operators are bound too; samples of the functional ones serve for them."""


@functools.cache
def calls() -> dict[torch._ops.OpOverload, list[Call]]:
    """Up to six calls of each operator that has a binding."""
    names = {op._opname for op in BINDINGS}
    found: dict[torch._ops.OpOverload, list[Call]] = {}
    infos = [
        info
        for info in database()
        if names & {info.name, info.name.rpartition(".")[2], *(a.name for a in info.aliases)}
    ]
    recorded = [call for info in infos for call in calls_of(info, 12)] + calls_of_modules(2)
    for call in recorded:
        held = found.setdefault(call.op, [])
        if len(held) < 6:
            held.append(call.fresh())
    return found


aten = torch.ops.aten
_ONES = torch.ones(3)
_MADE = {  # what no sample reaches: it gives a number, or is decomposed while samples are recorded
    aten.sym_size.int: Call(aten.sym_size.int, (torch.ones(2, 3), 1), {}),
    aten.reshape.default: Call(aten.reshape.default, (torch.randn(2, 6), [3, -1]), {}),
    aten.batch_norm.default: Call(
        aten.batch_norm.default,
        (torch.randn(4, 3, 5), _ONES, _ONES, _ONES, 2 * _ONES, False, 0.1, 1e-3, True),
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", BINDINGS, ids=str)
def test_a_binding_is_the_operator(op: torch._ops.OpOverload) -> None:
    given = calls().get(_FORMS.get(op, op), [])
    if op in _FORMS:
        given = [call for call in given if _may_be_written(call)]
    given = given or [_MADE[op]]
    for call in given:
        one, other = call.fresh(), call.fresh()
        want = _result(op, one)
        assert_same_bits(want, _result(BINDINGS[op], other))
        assert_same_bits(one.args, other.args)


def _result(function: Callable[..., Any], call: Call) -> Any:
    """What a function gives for a call, from one random state; a list as the tuple that it is."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        result = function(*call.args, **call.kwargs)
    return tuple(result) if isinstance(result, list) else result


def _may_be_written(call: Call) -> bool:
    """Whether the first argument has the result's shape and dtype."""
    result, first = call.run(), call.args[0]
    return (result.shape, result.dtype) == (first.shape, first.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_a_cast_is_to_copy(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5).t()
    made = cast(x, dtype)
    assert_same_bits(torch.ops.aten._to_copy.default(x, dtype=dtype), made)
    assert made.stride() == x.stride()
    assert pytree.tree_leaves(made)[0] is not x
