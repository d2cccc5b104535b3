"""Captures that come from a cache are those that a trace would make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture import traced_region
from amp_convert.capture.captured import Captured
from amp_convert.capture.kept.answers import kept_in
from amp_convert.capture.kept.graphs import _arithmetic, _check_call
from amp_convert.capture.regions import capture
from amp_convert.capture.stored_graph import FunctionRef, OperatorRef, StoredGraph, restored
from amp_convert.core.files.cache import Cache
from tests.bits import assert_same_bits
from tests.zoo import build

pytestmark = pytest.mark.usefixtures("no_other_tests")
X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    found = Cache(tmp_path)
    with kept_in(found):
        yield found


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that something is traced."""
    seen: list[Any] = []
    own = traced_region.export_graph

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0])
        return own(*args, **kwargs)

    monkeypatch.setattr(traced_region, "export_graph", watched)
    return seen


def assert_same(one: Captured, two: Captured) -> None:
    assert one.uncaptured == two.uncaptured
    assert one.fidelity == two.fidelity
    for a, b in zip(one.regions, two.regions, strict=True):
        assert (a.path, a.train_failure, a.traces) == (b.path, b.train_failure, b.traces)
        assert a.graphs.keys() == b.graphs.keys()
        for mode, graph in a.graphs.items():
            other = b.graphs[mode]
            assert str(graph.graph_module.graph) == str(other.graph_module.graph)
            nodes = [g.graph_module.graph.nodes for g in (graph, other)]
            assert [n.meta for n in nodes[0]] == [n.meta for n in nodes[1]]
            assert graph.nodes == other.nodes
            assert graph.fixed_sizes == other.fixed_sizes
            s, t = graph.signature, other.signature
            assert [g.text for g in s.guards] == [g.text for g in t.guards]
            for name in ("call", "inputs", "names", "user_inputs", "in_spec", "out_spec",
                         "buffer_outputs", "input_outputs"):  # fmt: skip
                assert getattr(s, name) == getattr(t, name), name
            assert_same_bits(dict(graph.constants), dict(other.constants))


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["cnn", "lstm", "bert", "llama", "whisper"])
def test_the_second_capture_is_the_first_without_a_trace(name: str, traces: list[Any]) -> None:
    captured = []
    for _ in range(2):
        model, args, kwargs = build(name)
        captured.append(capture(model, args, kwargs))
    assert len(traces) == 2  # eval and train
    assert_same(*captured)
    assert captured[1].model is model
    with torch.no_grad():
        want = captured[0].regions[0].runner("eval")(*args, **kwargs)  # type: ignore[arg-type]
        have = captured[1].regions[0].runner("eval")(*args, **kwargs)  # type: ignore[arg-type]
    assert_same_bits(want, have)


class Failing(nn.Module):
    """Training fails as long as something is away."""

    away = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and Failing.away:
            raise OSError("the server is down")
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture(Failing(), (X,), {}).regions[0].train_failure
    monkeypatch.setattr(Failing, "away", False)
    assert not capture(Failing(), (X,), {}).regions[0].train_failure


CRAFTED: list[tuple[str, Any]] = [
    ("call_method", "__reduce__"),
    ("get_attr", "__globals__"),
    ("call_function", OperatorRef(("aten", "from_file", "default"))),
    ("call_function", OperatorRef(("aten", "add_", "Tensor"))),
    ("call_function", OperatorRef(("inductor", "_alloc_from_pool", "default"))),
    ("call_function", print),
]


@pytest.mark.parametrize(("op", "target"), CRAFTED)
def test_a_graph_from_a_file_can_only_compute(op: str, target: Any) -> None:
    with pytest.raises(ValueError, match="no operator that is kept"):
        _check_call(op, target)


@pytest.mark.parametrize("name", ["_operator.attrgetter", "_operator.call", "torch.load"])
def test_functions_by_name_are_a_closed_list(name: str) -> None:
    graph = StoredGraph((("call_function", "f", FunctionRef(name), (), {}, {}),), {})
    with pytest.raises(KeyError):
        restored(graph)


class Scaled(nn.Module):
    factor: Any = 2.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 100:
            return x
        return self.layer(x) * self.factor


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_another_model_is_traced(traces: list[Any]) -> None:
    for factor in (2.0, 3.0):
        model = Scaled()
        model.factor = factor
        run = capture(model, (X,), {}).regions[0].runner("eval")  # type: ignore[arg-type]
        assert torch.equal(run(X), model(X))
    assert len(traces) == 4


@pytest.mark.usefixtures("cache")
def test_conditions_on_sizes_come_back() -> None:
    for _ in range(2):
        run = capture(Scaled(), (X,), {}).regions[0].runner("eval")  # type: ignore[arg-type]
        with pytest.raises(Exception, match="another path for inputs of this size"):
            run(torch.zeros(200, 4))


@pytest.mark.parametrize(
    "code", ["__import__('os')", "L['x'].__class__", "(lambda: 0)()", "[x for x in L]",
             "torch.load('f')", "L['x'].size()[0] > f'{1}'", "exec('1')", "L.pop('x')", "1; 2",
             "9**9 > 1"],
)  # fmt: skip
def test_a_condition_from_a_file_can_only_compute(code: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        _arithmetic(code)


def test_what_torch_export_writes_is_a_condition() -> None:
    text = "((480*L['a'].size()[0]) % (16*L['b'].size()[0])) == 0 and math.ceil(2) <= 2"
    assert _arithmetic(text) == text


def test_a_fidelity_may_come_from_the_cache_where_no_verdict_follows(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amp_convert.capture import fidelity

    checks: list[Any] = []
    own = fidelity.check
    monkeypatch.setattr(fidelity, "check", lambda *a, **k: (checks.append(a), own(*a, **k))[1])
    for proofs, count in ((False, 2), (False, 2), (True, 4), (True, 6)):
        found = capture(Scaled(), (X,), {}, proofs=proofs)
        assert [f.status for f in found.fidelity] == ["identical"] * 2
        assert len(checks) == count
    assert cache is not None
