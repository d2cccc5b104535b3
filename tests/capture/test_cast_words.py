"""What a model's own casts ask for: FP32, or the dtype that the model works in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture.cast_words import cast_words
from amp_convert.core.mode import Mode
from tests.bits import assert_same_bits
from tests.zoo import both_dtypes


class Net(nn.Module):
    """A product, what is done with it, and a product."""

    def __init__(
        self, between: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self._between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self._apply_it(self.first(x), x))

    def _apply_it(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._between(self, y, x)


CASES: dict[str, tuple[Callable[..., torch.Tensor], list[str]]] = {
    "float()": (lambda m, y, x: torch.tanh(y.float()), ["float32"]),
    "to(float32)": (lambda m, y, x: torch.tanh(y.to(torch.float32)), ["float32"]),
    "to(dtype=float32)": (lambda m, y, x: torch.tanh(y.to(dtype=torch.float32)), ["float32"]),
    "type(float32)": (lambda m, y, x: torch.tanh(y.type(torch.float32)), ["float32"]),
    "to(y.dtype)": (lambda m, y, x: torch.tanh(y.to(y.dtype)), ["float16"]),
    "to(device)": (lambda m, y, x: torch.tanh(y.to(x.device)), []),
    "to(device, y.dtype)": (lambda m, y, x: torch.tanh(y.to(x.device, y.dtype)), ["float16"]),
    "to(other)": (lambda m, y, x: torch.tanh(y.to(y)), ["float16"]),
    "type_as": (lambda m, y, x: torch.tanh(y.type_as(y)), ["float16"]),
    "to a weight's": (lambda m, y, x: torch.tanh(y.to(m.scale.dtype)), ["float16"]),
    "there and back": (
        lambda m, y, x: torch.tanh(y.float() * 2).to(y.dtype) * m.scale, ["float32", "float16"]
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_what_a_cast_asks_for(what: str) -> None:
    between, expected = CASES[what]
    torch.manual_seed(0)
    model, x = Net(between).eval(), torch.randn(4, 8)
    mixed = amp.convert(model, x, train=False)
    casts = [d.dtype for d in mixed.plan.eval if d.op == "aten.to"]
    assert casts == expected
    # What follows a request for FP32 is FP32, and what follows the working dtype is low.
    after = [d.precision for d in mixed.plan.eval if d.op == "aten.tanh"]
    assert after == ["float32" if "float32" in expected else "float16"]
    exact = amp.convert(model, x, rules="fp32", train=False)
    with torch.no_grad():
        assert_same_bits(model(x), exact(x))


@both_dtypes
@pytest.mark.parametrize("what", CASES)
def test_under_autocast_a_cast_does_what_autocast_does(what: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net(CASES[what][0]).eval(), torch.randn(4, 8)
    mixed = amp.convert(model, x, dtype=dtype, rules="autocast", train=False)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            want = model(x).float()
        assert_same_bits(want, mixed(x))


def test_a_residual_does_not_pass_through_the_cast() -> None:
    """`h = x.float()` gives back x itself in FP32: to a trace, one tensor with two names."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            h = x.float()
            h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1)).to(x.dtype)
            return self.last(x + h)

    captured = amp.convert(Normed().eval(), torch.randn(4, 8), train=False).captured
    graph = captured.regions[0].graphs[Mode.EVAL].graph_module.graph
    [residual] = [
        n for n in graph.nodes if str(n.target) == "aten.add.Tensor" and len(n.all_input_nodes) == 2
    ]
    assert str(residual.args[0].target) == "aten.linear.default"


def test_a_rule_that_denies_everything_has_the_last_word() -> None:
    model, x = Net(CASES["to(y.dtype)"][0]).eval(), torch.randn(4, 8)
    denied = amp.convert(model, x, rules="fp32", train=False)
    assert [d.precision for d in denied.plan.eval if d.op == "aten.to"] == ["float32"]


@pytest.mark.slow
def test_lines_are_paired_by_order_and_left_alone_where_their_numbers_differ() -> None:
    class Loops(nn.Module):
        def __init__(self, tracing: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self._tracing = tracing

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                for dtype in (torch.float32, y.dtype):
                    y = torch.tanh(y.to(dtype))
                x = y
            if self._tracing and torch.compiler.is_exporting():
                for dtype in (x.dtype,):
                    x = torch.tanh(x.to(dtype))
            return x

    x = torch.randn(4, 8)
    plan = amp.convert(Loops(tracing=False).eval(), x, train=False).plan
    assert [d.dtype for d in plan.eval if d.op == "aten.to"] == ["float32", "float16"] * 2
    plan = amp.convert(Loops(tracing=True).eval(), x, train=False).plan
    assert [d.dtype for d in plan.eval if d.op == "aten.to"] == [
        *["float32", "float16"] * 2,
        "float32",
    ]


def test_a_model_that_does_not_run_low_says_nothing_and_is_left_as_it_is() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.linear.weight.dtype != torch.float32:
                raise ValueError("FP32 only")
            return torch.tanh(self.linear(x).to(x.dtype))

    model, x = Picky().eval(), torch.randn(4, 8)
    methods = {name: getattr(torch.Tensor, name) for name in ("to", "float", "type")}
    state = torch.get_rng_state()
    words = cast_words(model, (x,), {}, Mode.EVAL)
    [[word]] = words.values()
    assert (word.all_low, word.autocast) == (False, False)  # under autocast x is FP32
    assert float(model.calls) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert methods == {name: getattr(torch.Tensor, name) for name in methods}
    assert not {"to", "float"} & set(vars(torch.Tensor))
