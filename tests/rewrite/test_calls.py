"""How a converted model is called, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.errors import ModelError
from tests.bits import leaves
from tests.rewrite.small_net import net
from tests.zoo import both_dtypes, converted, every_model, example, mode


@every_model
def test_outputs_keep_structure_dtype_and_shape(name: str) -> None:
    original, args, kwargs = example(name)
    mixed = converted(name)
    with mode(original, mixed), torch.no_grad():
        want, have = original(*args, **kwargs), mixed(*args, **kwargs)
    assert type(want) is type(have)
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    for path, expected in leaves(want).items():
        found = leaves(have)[path]
        assert type(found) is type(expected), path
        if isinstance(expected, torch.Tensor):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@dataclass
class Boxed:
    """An output class of the user's own."""

    logits: torch.Tensor
    note: str


pytree.register_dataclass(Boxed)


class Structured(nn.Module):
    """Returns all that models return: nested, integer, boolean, wide, half, absent, the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.linear(x) * scale
        return {
            "pair": (y, [y.argmax(-1), y > 0]),
            "wide": y.double(),
            "half": y.half(),
            "box": Boxed(y.relu(), "linear"),
            "none": None,
            "count": 3,
            "input": x,
        }


@both_dtypes
def test_every_kind_of_output_survives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Structured().eval(), torch.randn(5, 4)
    mixed = amp.convert(model, x, dtype=dtype)
    want, have = model(x), mixed(x)
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    dtypes = [getattr(leaf, "dtype", leaf) for leaf in pytree.tree_leaves(have)]
    assert dtypes == [getattr(leaf, "dtype", leaf) for leaf in pytree.tree_leaves(want)]
    assert isinstance(have["box"], Boxed)
    assert have["box"].note == "linear"
    assert torch.equal(have["input"], x)
    torch.testing.assert_close(have["wide"], want["wide"], rtol=2e-2, atol=2e-2)
    assert any(d.low for d in mixed.plan.eval)


@every_model
def test_other_batch_sizes(name: str) -> None:
    """Twice the batch gives twice the outputs; the example inputs fixed nothing but the rest."""
    original, args, kwargs = example(name)
    mixed = converted(name, "fp32")

    def doubled(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat([leaf, leaf.flip(0)])

    args, kwargs = pytree.tree_map_only(torch.Tensor, doubled, (args, kwargs))
    with mode(original, mixed), torch.no_grad():
        want, have = original(*args, **kwargs), mixed(*args, **kwargs)
    for path, expected in leaves(want).items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(leaves(have)[path], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_batch_of_one_as_example(size: int) -> None:
    model, x = net()
    mixed = amp.convert(model.eval(), x[:1])
    y = torch.randn(size, 6)
    assert mixed(y).shape == (size, 3)
    torch.testing.assert_close(mixed(y), model(y), rtol=2e-2, atol=2e-2)


REFUSED = {
    "another dtype": ((torch.ones(4, 6, dtype=torch.float16),), {}, "input x has dtype.*float16"),
    "no tensor": ((3.0,), {}, "input x is a float, but the graph was captured with a tensor"),
    "too many": ((torch.ones(4, 6), 1, 2), {}, "too many positional arguments"),
    "unknown keyword": ((torch.ones(4, 6),), {"y": 1}, "unexpected keyword argument 'y'"),
    "missing": ((), {}, "missing a required argument: 'x'"),
}  # fmt: skip


class WithDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x if other is None else x + other)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_do_not_fit(case: str) -> None:
    args, kwargs, message = REFUSED[case]
    mixed = amp.convert(WithDefault(), torch.ones(2, 6))
    with pytest.raises(ModelError, match=message) as caught:
        mixed(*args, **kwargs)
    assert caught.value.mend
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_what_the_original_takes_and_the_graph_does_not_runs_under_the_plan() -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    model = WithDefault()
    mixed = amp.convert(model, x)
    with torch.no_grad():
        for args in ((x[:, None],), (x, x), (x[0],)):
            found, want = mixed(*args), model(*args)
            assert found.dtype is torch.float32
            assert 0 < (found - want).abs().max() < 1e-2
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            mixed(torch.ones(4, 7))
        with pytest.raises(TypeError, match="must be Tensor, not list"):
            mixed([x])


@pytest.mark.slow
def test_defaults_may_be_given_or_left_out() -> None:
    x = torch.ones(2, 6)
    mixed = amp.convert(WithDefault(), x)
    assert torch.equal(mixed(x), mixed(x, None))
    assert torch.equal(mixed(x), mixed(x=x, other=None))
    explicit = amp.convert(WithDefault(), (x, None))
    assert torch.equal(explicit(x), explicit(other=None, x=x))
