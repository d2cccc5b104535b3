"""What a node context says of the nodes around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.plan.sites import Module, sites_of

X = torch.linspace(0.5, 1, 8).reshape(2, 4)


def readers(consumers: Any) -> list[tuple[str, str]]:
    return [(consumer.op.removeprefix("aten."), consumer.argument) for consumer in consumers]


# --- neighbours ----------------------------------------------------------------------------------


def test_feeds_are_the_readers_seen_through_what_has_no_numeric_effect() -> None:
    def compute(m: Module, x: torch.Tensor) -> Any:
        h = x.tanh()
        first, second = h.relu().transpose(0, 1).chunk(2)
        return first.exp(), x / h, (second * 2).sum()

    at = sites_of(compute)
    assert readers(at["tanh"].feeds) == [("exp", "self"), ("mul", "self"), ("div", "other")]
    assert readers(at["relu"].feeds) == readers(at["transpose"].feeds)
    assert readers(at["exp"].feeds) == []


def test_a_reader_comes_with_what_it_reads_and_with_what_it_makes() -> None:
    at = sites_of(lambda m, x: (x.tanh().relu() * 2).sigmoid())
    consumer = at["tanh"].feeds[0]
    assert consumer.op == "aten.mul"
    assert consumer.operand == at["relu"].result, "what the product reads, not what tanh makes"
    assert consumer.result == at["mul"].result


@pytest.mark.slow
def test_a_value_that_is_read_twice_has_two_readers() -> None:
    at = sites_of(lambda m, x: torch.atan2(x.tanh(), x.tanh()) + m.layer(x))
    assert readers(at["tanh"].feeds) == [("atan2", "self")]
    at = sites_of(lambda m, x: (lambda h: h * h)(x.tanh()))
    assert readers(at["tanh"].feeds) == [("mul", "self"), ("mul", "other")]


PATHS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "at once": (lambda m, h: h.sin(), ["sin"]),
    "a sum and a product": (lambda m, h: (h * 2 + 1).cos(), ["cos"]),
    "a difference and a quotient": (lambda m, h: (3 - h).neg().div(7).softmax(-1), ["softmax"]),
    "an outer product": (lambda m, h: torch.outer(h[0], h[0]).relu().exp(), ["exp"]),
    "two": (lambda m, h: (h.view(4, 2).sin(), (h - 1).logsumexp(-1)), ["logsumexp", "sin"]),
    "a chunk": (lambda m, h: (h.chunk(2, -1)[0] + 1).log_softmax(-1), ["log_softmax"]),
    "a loss": (lambda m, h: F.cross_entropy(h, torch.tensor([1, 2])), ["cross_entropy_loss"]),
    "to the first only": (lambda m, h: h.sin().exp(), ["sin"]),
    "not a layer": (lambda m, h: m.layer(h).sin(), []),
    "not a matrix product": (lambda m, h: (h @ h.T).softmax(-1), []),
    "not a normalisation": (lambda m, h: m.norm(h).exp(), []),
    "not a reduction": (lambda m, h: h.sum(-1).exp(), []),
    "not another function": (lambda m, h: h.sigmoid().sin(), []),
    "nowhere": (lambda m, h: h + 1, []),
}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "ends"), PATHS.values(), ids=PATHS)
def test_a_value_reaches_sines_and_exponentials_through_arithmetic(
    path: Callable[..., Any], ends: list[str]
) -> None:
    at = sites_of(lambda m, x: path(m, x.tanh()))
    assert sorted(op for op, _ in readers(at["tanh"].reaches)) == ends


@pytest.mark.slow
def test_what_is_reached_comes_with_the_range_that_it_reads() -> None:
    at = sites_of(lambda m, x: (x.tanh() * 100).sin())
    (sine,) = at["tanh"].reaches
    assert (sine.op, sine.argument) == ("aten.sin", "self")
    assert (sine.operand, sine.result) == (at["mul"].result, at["sin"].result)
    assert at["tanh"].reaches == tuple(replace(c, scaled=True) for c in at["mul"].reaches)
    assert at["sin"].reaches == ()
    at = sites_of(lambda m, x: (lambda h: (h.neg() + h).exp())(x.tanh()))
    assert readers(at["tanh"].reaches) == [("exp", "self")], "on two paths, but once"


@pytest.mark.slow
def test_it_is_known_whether_a_product_lies_between() -> None:
    at = sites_of(lambda m, x: (lambda h: (h / 2 + h).exp())(x.tanh()))
    assert {end.scaled for end in at["tanh"].reaches} == {False, True}
    assert {end.scaled for end in at["div"].reaches} == {False}
    at = sites_of(lambda m, x: torch.add(x, x.tanh(), alpha=3).exp())
    assert {end.scaled for end in at["tanh"].reaches} == {True}


HIDDEN = X > 0.7


def hide(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(hidden, -1e9)


def masked(compute: Callable[..., Any], *inputs: torch.Tensor, masks: bool = True) -> list[str]:
    """The nodes whose results are masks."""
    found = sites_of(compute, *inputs or (X, HIDDEN), masks=masks)
    return [name for name, at in found.items() if at.masked]


def attend(m: Module, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return (hide(x.tanh(), hidden).reshape(4, 2) + 1).softmax(-1).sum()


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_ends_in_softmaxes_alone_is_a_mask() -> None:
    assert masked(attend) == ["tanh", "masked_fill", "reshape", "add"]
    assert masked(attend, masks=False) == []
    at = sites_of(attend, X, HIDDEN, masks=True)
    read = {name: [operand.mask for operand in s.operands] for name, s in at.items()}
    assert (read["add"], read["softmax"], read["sum"]) == ([True], [True], [False])


@pytest.mark.slow
def test_what_anything_else_reads_as_well_is_none() -> None:
    assert masked(lambda m, x, h: (lambda y: (y.softmax(-1), y * 2))(hide(x, h))) == []
    assert masked(lambda m, x, h: (hide(x, h) * 2).softmax(-1)) == ["mul"]
    assert masked(lambda m, x, h: hide(x, h)) == [], "an output is read by the user"
