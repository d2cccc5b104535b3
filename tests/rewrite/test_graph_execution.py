"""A graph run a node at a time: what it keeps, and what it says of kernels that refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.rewrite import conversion
from amp_convert.rewrite.graph_execution import GraphExecution, KernelError, try_kernels
from tests.zoo import (
    converted,
    example,
)

X = torch.linspace(-2, 2, 40).reshape(5, 8)


@pytest.mark.slow
def test_a_running_graph_keeps_only_what_is_still_needed() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    mixed = amp.convert(layers, X, rules="fp32")
    runner = mixed.captured.regions[0].runner("eval")
    graph = runner.graph_module
    running, most = GraphExecution(graph, runner.inputs((X,), {})), 0
    with torch.no_grad():
        for node in graph.graph.nodes:
            running.execute(node)
            running.free()
            computed = [n for n in running.values if n.op == "call_function"]
            most = max(most, len(computed))
        assert most == 1
        assert torch.equal(running.values[node][0], layers(X))


def test_a_result_that_nobody_reads_is_dropped_at_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.exp.default, (x,))
    graph.output((x,))
    running = GraphExecution(fx.GraphModule(nn.Module(), graph), [X])
    for node in list(graph.nodes)[:2]:
        running.execute(node)
        running.free()
    assert list(running.values) == [x]


# --- kernels that refuse -------------------------------------------------------------------------


@torch.library.custom_op("amp_convert_tests::fp32_only", mutates_args=())
def fp32_only(x: torch.Tensor) -> torch.Tensor:
    """An operator whose shape function takes what its kernel does not."""
    if x.dtype != torch.float32:
        raise RuntimeError("fp32_only is for FP32\nand a second line")
    return x + 1


@fp32_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


fp32_only.register_autograd(lambda _, gradient: gradient)


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.ops.amp_convert_tests.fp32_only(self.first(x)))


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.default:
            self.seen.append(str([(a.shape, a.dtype) for a in args]))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_layers_that_repeat_are_tried_once() -> None:
    mixed = converted("bert")
    region, rewritten = mixed.captured.regions[0], mixed.rewritten[""]["eval"]
    inputs = region.runner("eval").inputs((), example("bert")[2])
    with torch.no_grad(), Products() as all_of_them:
        try_kernels(rewritten, inputs, {})
    with torch.no_grad(), Products() as tried:
        try_kernels(rewritten, inputs, region.traces["eval"].values)
    assert len(tried.seen) < len(all_of_them.seen) == 13
    assert sorted(tried.seen) == sorted(set(all_of_them.seen))


def test_a_kernel_that_refuses_is_named() -> None:
    mixed = converted("cnn", "half")
    rewritten = mixed.rewritten[""]["eval"]
    region = mixed.captured.regions[0]
    inputs = region.runner("eval").inputs(example("cnn")[1], {})
    with torch.no_grad():
        try_kernels(rewritten, inputs, region.traces["eval"].values)
        wrong = [t.long() if torch.is_tensor(t) and t.dim() == 4 else t for t in inputs]
        with pytest.raises(KernelError) as caught:
            try_kernels(rewritten, [*wrong[:-1], wrong[-1][:, :2]], {})
    error = caught.value
    assert isinstance(error, UnsupportedModelError)
    assert error.info is not None
    assert error.info.layer == "conv1"
    assert "aten.conv2d refuses the dtypes that the plan gives it" in str(error)
    assert 'op = "aten.conv2d"' in error.mend
    assert "\n" not in error.cause


@pytest.mark.slow
def test_an_operator_without_a_low_kernel_is_kept_in_fp32(tmp_path: Any) -> None:
    """Only running it shows: the plan then names what it said as its evidence."""
    mixed = amp.convert(Picky().eval(), X, rules="half")
    kept = next(d for d in mixed.plan.eval if d.op == "amp_convert_tests.fp32_only")
    assert (kept.dtype, kept.low, kept.rule) == ("float32", False, "no kernel")
    assert "fp32_only is for FP32" in kept.evidence
    assert "second line" not in kept.evidence
    assert sum(d.low for d in mixed.plan.eval) == 2
    torch.testing.assert_close(mixed(X), Picky().eval()(X), rtol=1e-2, atol=1e-2)


@torch.library.custom_op("amp_convert_tests::also_fp32_only", mutates_args=())
def also_fp32_only(x: torch.Tensor) -> torch.Tensor:
    """Another such operator."""
    if x.dtype != torch.float32:
        raise RuntimeError("also_fp32_only is for FP32")
    return x * 2


@also_fp32_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Pickier(Picky):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.amp_convert_tests.fp32_only(self.first(x))
        return self.last(torch.ops.amp_convert_tests.also_fp32_only(self.first(y)))


def test_all_that_refuse_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made a second time, and not once for each of them."""
    plans: list[dict[str, str]] = []
    own = conversion.make_plan

    def counted(captured: Any, rules: Any, stats: Any, dtype: Any, refused: Any) -> Any:
        plans.append(dict(refused))
        return own(captured, rules, stats, dtype, refused)

    monkeypatch.setattr(conversion, "make_plan", counted)
    model = Pickier().eval()
    mixed = amp.convert(model, X, rules="half", train=False)
    names = ["amp_convert_tests.also_fp32_only.default", "amp_convert_tests.fp32_only.default"]
    assert [sorted(refused) for refused in plans] == [[], names]
    kept = {d.op: d.evidence for d in mixed.plan.eval if d.rule == "no kernel"}
    assert kept == {
        "amp_convert_tests.fp32_only": "fp32_only is for FP32",
        "amp_convert_tests.also_fp32_only": "also_fp32_only is for FP32",
    }
    torch.testing.assert_close(mixed(X), model(X), rtol=1e-2, atol=1e-2)
