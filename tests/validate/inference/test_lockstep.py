"""Two graphs in step: what each node sees, and that both end where they would have ended alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import amp_convert as amp
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.graph_execution import runner_of
from amp_convert.validate.inference import lockstep
from amp_convert.validate.inference.lockstep import NodeValues
from tests.bits import same_bits, tensors
from tests.zoo import both_dtypes, converted, every_model, example, fused_transformer, mode

CPU = torch.device("cpu")
X = torch.linspace(-2, 2, 40).reshape(5, 8)


def in_step(mixed: ConvertedModel, *args: Any, **kwargs: Any) -> tuple[list[NodeValues], Any, Any]:
    """Every step with a local result for every node, and both models' flat outputs."""
    region = mixed.captured.regions[0]
    inputs = region.runner("eval").inputs(args, kwargs)
    steps: list[NodeValues] = []
    with torch.no_grad():
        reference, result = lockstep.run(
            mixed.rewritten[""]["eval"], inputs, inputs, steps.append, lambda _: True, CPU
        )
    return steps, reference, result


def initialised(steps: list[NodeValues]) -> list[NodeValues]:
    """All but those whose value is whatever lay in memory."""
    return [step for step in steps if "empty" not in str(step.node.target)]


def same(a: Any, b: Any) -> bool:
    return all(same_bits(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


class Everything(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def values_of(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    interpreter = Everything(graph_module)
    with torch.no_grad():
        interpreter.run(*inputs, enable_io_processing=False)
    return interpreter.values


# --- against two separate runs -------------------------------------------------------------------


@every_model
@both_dtypes
def test_values_are_those_of_two_separate_runs(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "default", dtype)
    original, args, kwargs = example(name)
    with mode(original, mixed), torch.no_grad(), fused_transformer(False):
        steps, reference, result = in_step(mixed, *args, **kwargs)
        assert same(original(*args, **kwargs), reference)
        region, rewritten = mixed.captured.regions[0], mixed.rewritten[""]["eval"]
        # The graph as it was rewritten; with other kernels, the model that runs has other bits.
        assert same(runner_of(rewritten, original)(*args, **kwargs), result)
        inputs = region.runner("eval").inputs(args, kwargs)
        alone = values_of(region.graphs["eval"].graph_module, inputs)
        mixed_alone = values_of(rewritten.graph_module, inputs)
    assert [s.node.name for s in steps] == list(region.graphs["eval"].nodes)
    for step in initialised(steps):
        assert same(step.reference, alone[step.node.name]), step.node
        holder = rewritten.values[step.node.name]
        assert same(step.accumulated, mixed_alone[holder.name]), step.node


@every_model
def test_local_results_are_the_operator_on_the_references_values(name: str) -> None:
    """Each operator by itself: the FP32 run's values, cast to the dtypes that the mix delivers."""
    mixed = converted(name, "default", torch.bfloat16)
    _, args, kwargs = example(name)
    with mode(mixed), torch.no_grad():
        steps, _, _ = in_step(mixed, *args, **kwargs)
        region, rewritten = mixed.captured.regions[0], mixed.rewritten[""]["eval"]
        inputs = region.runner("eval").inputs(args, kwargs)
        exact = values_of(region.graphs["eval"].graph_module, inputs)
        low = values_of(rewritten.graph_module, inputs)
        decisions = {d.name: d for d in mixed.plan.eval}
        for step in initialised(steps):
            node, decision = step.node, decisions[step.node.name]
            arriving = iter(decision.input_dtypes)

            def argument(
                source: fx.Node, arriving: Any = arriving, clamp: float | None = decision.clamp
            ) -> Any:
                value = exact[source.name]
                if not torch.is_tensor(value):
                    return value
                planned = next(arriving)
                seen = low[rewritten.values[source.name].name].dtype
                if clamp is not None and value.dtype == torch.float32:
                    value = value.where(value == -torch.inf, value.clamp(min=clamp))
                return value.to(seen if planned is None else getattr(torch, planned))

            call_args, call_kwargs = fx.map_arg((node.args, node.kwargs), argument)
            if decision.clamp is not None:
                lowest = decision.clamp
                call_args = tuple(max(a, lowest) if type(a) is float else a for a in call_args)
            expected = node.target(*call_args, **call_kwargs)
            if decision.output_dtype is not None:
                expected = expected.to(getattr(torch, decision.output_dtype))
            assert same(step.local, expected), node


@pytest.mark.slow
def test_a_two_layer_net_by_hand() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(8, 8), nn.Linear(8, 3)
    mixed = amp.convert(nn.Sequential(first, nn.ReLU(), last).eval(), X)
    steps, reference, result = in_step(mixed, X)

    def low(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.half(), layer.weight.half(), layer.bias.half())

    with torch.no_grad():
        hidden = first(X)
        expected = [
            (hidden, low(first, X), low(first, X)),
            (hidden.relu(), low(first, X).relu(), hidden.half().relu()),
            (
                last(hidden.relu()),
                low(last, low(first, X).relu()),
                low(last, hidden.relu()),
            ),
        ]
    found = [(s.reference, s.accumulated, s.local) for s in steps]
    assert len(found) == 3
    for have, want in zip(found, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(have, want, strict=True))
    assert same_bits(reference[0], expected[2][0])
    assert same_bits(result[0], expected[2][1].float())


def test_local_results_only_where_they_are_wanted() -> None:
    mixed = converted("cnn")
    args = example("cnn")[1]
    region = mixed.captured.regions[0]
    inputs = region.runner("eval").inputs(args, {})
    steps: list[NodeValues] = []
    with torch.no_grad():
        lockstep.run(
            mixed.rewritten[""]["eval"],
            inputs,
            inputs,
            steps.append,
            lambda node: "conv2d" in str(node.target),
            CPU,
        )
    have = [s.node.name for s in steps if s.local is not None]
    assert have == [s.node.name for s in steps if "conv2d" in s.node.name]
    assert len(have) == 2


# --- random numbers ------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout that never sleeps, and noise of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(self.first(x), 0.5, training=True)
        y = y + torch.rand(8) + torch.randn(x.shape[0], 8)
        return self.last(y) + torch.bernoulli(torch.full((8,), 0.5))


@pytest.mark.slow
def test_all_three_draw_the_same_numbers() -> None:
    model = Noisy().eval()
    mixed = amp.convert(model, X)
    torch.manual_seed(7)
    steps, reference, result = in_step(mixed, X)
    after = torch.rand(())
    torch.manual_seed(7)
    with torch.no_grad():
        alone = model(X)
        assert torch.equal(torch.rand(()), after), "the random state moves as by one run"
    torch.manual_seed(7)
    with torch.no_grad():
        assert same(mixed(X), result)
    assert same(alone, reference)
    drop = next(s for s in steps if "dropout" in str(s.node.target))
    for outcome in (drop.reference, drop.accumulated, drop.local):
        assert torch.equal(tensors(outcome)[1], tensors(drop.reference)[1])
    assert 0 < int(tensors(drop.reference)[1].sum()) < 40
    torch.testing.assert_close(result[0], alone, rtol=1e-2, atol=1e-2)
