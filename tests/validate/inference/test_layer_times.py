"""Times by layer: with a clock that counts operators, each layer takes as long as it has some."""

from __future__ import annotations

import html
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amp_convert as amp
from amp_convert.core.mode import Mode
from amp_convert.report.sections.layer_times import time_rows
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference import layer_times as timing
from amp_convert.validate.inference.layer_times import layer_times
from amp_convert.validate.inference.results import LayerTime


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.up(self.norm(x)))


def stack() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second from one operator to the next."""
    ticks = itertools.count()
    monkeypatch.setattr(timing._Timer, "_now", lambda _: next(ticks))


def operators(converted: ConvertedModel) -> Counter[str]:
    """The operators of the captured graph by layer; its output is one of the model's own."""
    [region] = converted.captured.regions
    return Counter({"": 1}) + Counter(i.layer for i in region.graphs[Mode.EVAL].nodes.values())


def seconds(rows: tuple[LayerTime, ...], arm: str) -> dict[str, float]:
    return {row.layer: round(getattr(row, arm) / 1e3) for row in rows}


@pytest.mark.usefixtures("clock")
def test_each_layer_takes_as_long_as_its_operators() -> None:
    model, x = stack()
    converted = amp.convert(model, x, train=False)
    rows = layer_times(converted, (x,), {})
    assert seconds(rows, "fp32") == seconds(rows, "autocast") == operators(converted)
    assert [row.fp32 for row in rows] == sorted((row.fp32 for row in rows), reverse=True)
    frozen = converted.freeze().runner("")
    nodes = [n for n in frozen.run.tuned.graph.nodes if n.op != "placeholder"]  # type: ignore[attr-defined]
    found = seconds(rows, "frozen")
    assert sum(found.values()) == len(nodes)
    # What came in between, such as casts, counts for the layers that are there.
    assert set(found) == set(operators(converted))
    assert all(found.values())


@pytest.mark.usefixtures("clock")
def test_parts_count_each_time_they_are_called() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            steps = 0
            while float(x.abs().sum().detach()) < 1e6 and steps < 3:  # no graph holds this
                x, steps = self.block(x), steps + 1
            return x

    torch.manual_seed(0)
    model, x = Loop().eval(), torch.randn(3, 8)
    converted = amp.convert(model, x, train=False)
    assert not converted.captured.is_whole
    once = operators(converted)
    rows = layer_times(converted, (x,), {})
    assert seconds(rows, "fp32") == {layer: 3 * n for layer, n in once.items()}
    assert all(row.frozen > 0 for row in rows)


def test_nothing_is_changed_by_it() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x.add_(1)
            return self.layer(x)

    torch.manual_seed(0)
    model, x = Writes().train(), torch.randn(3, 4)
    kept = x.clone()
    converted = amp.convert(model, x)
    state = torch.get_rng_state()
    rows = layer_times(converted, (x,), {})
    assert torch.equal(x, kept)
    assert float(model.calls) == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.layer for row in rows} == {"", "layer"}


def test_only_the_branch_that_is_taken_counts() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.one, self.other, (x,))

    torch.manual_seed(0)
    model, x = Either().eval(), torch.ones(2, 4)
    times = layer_times(amp.convert(model, x, train=False), (x,), {})
    rows = {row.layer: row for row in times}
    assert rows.keys() == {"", "one"}
    assert rows["one"].fp32 > 0
    assert rows["one"].frozen > 0


def test_a_model_that_autocast_cannot_run_has_no_time_there() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(4, 8).index_add(0, torch.arange(4), self.layer(x))

    torch.manual_seed(0)
    run = amp.check(Adds().eval(), torch.randn(4, 8), profile=True)
    assert run.report.inference is not None
    times = run.report.inference.layer_times
    assert {row.autocast for row in times} == {None}
    assert all(row.fp32 > 0 and row.frozen > 0 for row in times)
    assert [row.times[1] for row in time_rows(times)] == [""] * (len(times) + 1)


def of(layer: str, fp32: float, frozen: float, module: str = "Linear") -> LayerTime:
    return LayerTime(layer, module, fp32, 2.0, 3.0, frozen)


def test_layers_that_differ_in_an_index_are_one_row() -> None:
    times = [of("a.0.up", 4, 1), of("a.1.up", 4, 1), of("head", 1, 2), of("", 9, 4, "")]
    times += [of("a.2.up", 1, 0, "Conv2d")]
    first, second, *rest = time_rows(times, most=2)
    assert (first.layer, first.times) == ("(top level)", ("9 ms", "2 ms", "3 ms", "4 ms"))
    assert (first.share, first.slower) == ("50.0 %", False)
    assert (second.layer, second.times) == (
        "a.*.up, Linear (2 layers)",
        ("8 ms", "4 ms", "6 ms", "2 ms"),
    )
    assert [row.layer for row in rest] == ["2 other layers", "all"]
    assert rest[-1].times == ("19 ms", "10 ms", "15 ms", "8 ms")
    assert time_rows([]) == []


def test_the_report_has_them_where_they_are_asked_for(tmp_path: Path) -> None:
    model, x = stack()
    given: dict[str, Any] = {"out": tmp_path / "report", "rules": "default"}
    run = amp.check(model, x, profile=True, **given)
    assert run.report.inference is not None
    assert {row.layer for row in run.report.inference.layer_times} >= {"0.up", "1.up", "2"}
    text = html.unescape((tmp_path / "report" / "report.md").read_text())
    assert "## Time by layer" in text
    assert "| *.up, Linear (2 layers) |" in text
    assert "Time by layer" in (tmp_path / "report" / "report.html").read_text()
    plain = amp.check(model, x)
    assert plain.report.inference is not None
    assert plain.report.inference.layer_times == ()
