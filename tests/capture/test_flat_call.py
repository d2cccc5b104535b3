"""The generated check of arguments: it gives what the slow way gives, or leaves the call to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amp_convert as amp
from amp_convert.capture.flat_call import flat_call
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.core.errors import ModelError
from amp_convert.core.mode import Mode


class Model(nn.Module):
    """Tensors, a flag and what is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, flag: bool = True, extra: Any = None, *, s: Any
    ) -> torch.Tensor:
        return self.linear(x) * mask + s


def runner(model: nn.Module, *args: Any, **kwargs: Any) -> GraphRunner:
    captured = amp.convert(model.eval(), args, kwargs, rules="fp32", train=False).captured
    return captured.regions[0].runner(Mode.EVAL)


@pytest.fixture(scope="module")
def ours() -> GraphRunner:
    return runner(Model(), torch.randn(3, 4), torch.ones(3, 4), s=torch.ones(4))


GOOD = {"x": torch.randn(5, 4), "mask": torch.ones(5, 4), "s": torch.ones(4)}
VALUES = [
    torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 3), torch.randn(4), torch.ones(5, 4).int(),
    nn.Parameter(torch.randn(5, 4)), None, True, 1, "x", [torch.randn(5, 4)],
    torch.randn(5, 4).double(),
]  # fmt: skip


def test_a_call_that_fits_takes_the_fast_way(ours: GraphRunner) -> None:
    for args, kwargs in (
        ((GOOD["x"], GOOD["mask"]), {"s": GOOD["s"]}),
        ((GOOD["x"],), {"s": GOOD["s"], "mask": GOOD["mask"]}),
        ((), dict(reversed(GOOD.items()))),
    ):
        flat = ours._flat(*args, **kwargs)
        assert [id(leaf) for leaf in flat] == [id(leaf) for leaf in ours._leaves(args, kwargs)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    positional=st.integers(0, 4),
    changes=st.dictionaries(
        st.sampled_from(["x", "mask", "flag", "extra", "s", "more"]),
        st.sampled_from(range(len(VALUES))),
        max_size=3,
    ),
    left_out=st.sets(st.sampled_from(["x", "mask", "s"]), max_size=1),
)
def test_it_accepts_nothing_that_the_slow_way_refuses(
    ours: GraphRunner, positional: int, changes: dict[str, int], left_out: set[str]
) -> None:
    given = {**GOOD, **{name: VALUES[index] for name, index in changes.items()}}
    for name in left_out:
        given.pop(name, None)
    order = ["x", "mask", "flag", "extra"]
    args: list[Any] = []
    while len(args) < positional and order[len(args)] in given:
        args.append(given.pop(order[len(args)]))
    flat = ours._flat_leaves(args, given)
    if flat is not None:
        slow = ours._leaves(args, given)
        assert [id(leaf) for leaf in flat] == [id(leaf) for leaf in slow]


def test_a_constant_is_the_one_that_was_captured() -> None:
    made = runner(Model(), torch.randn(3, 4), torch.ones(3, 4), flag=False, s=torch.ones(4))
    assert made._flat(*list(GOOD.values())[:2], False, s=GOOD["s"]) is not None
    assert made._flat(*list(GOOD.values())[:2], 0, s=GOOD["s"]) is None
    with pytest.raises(ModelError, match="flag"):
        made.inputs(list(GOOD.values())[:2], {"flag": True, "s": GOOD["s"]})


def test_what_was_assumed_of_sizes_is_asked() -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] > 2 else x

    made = runner(_with_weight(Sized()), torch.randn(4, 4))
    assert made.signature.guards
    assert made._flat(torch.randn(3, 4)) is not None
    assert made._flat(torch.randn(2, 4)) is None
    with pytest.raises(ModelError, match="takes another path"):
        made.inputs((torch.randn(2, 4),), {})


@pytest.mark.slow
def test_what_holds_more_than_tensors_is_left_to_the_slow_way() -> None:
    class Pair(nn.Module):
        def forward(self, pair: Any) -> torch.Tensor:
            return pair[0] + pair[1]

    class Many(nn.Module):
        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return xs[0] + xs[1]

    class Named(nn.Module):
        def forward(self, _x: torch.Tensor) -> torch.Tensor:
            return _x + 1

    x = torch.randn(4, 4)
    for model, args in ((Pair(), ((x, x),)), (Many(), (x, x)), (Named(), (x,))):
        made = runner(_with_weight(model), *args)
        assert flat_call(made.signature) is None, model
        assert made(*args) is not None


def _with_weight(model: nn.Module) -> nn.Module:
    model.register_parameter("weight", nn.Parameter(torch.ones(1)))
    return model
