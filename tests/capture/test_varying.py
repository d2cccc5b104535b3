"""Dimensions that vary besides the first: learnt from further calls, and other sizes give what the
eager model gives. Oracle: eager PyTorch, bit for bit, under FP32 rules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture.export_call import varying
from amp_convert.capture.regions import capture
from amp_convert.cli.main import main
from amp_convert.core.mode import Mode
from tests.bits import assert_same_bits
from tests.zoo import build, fused_transformer


class Tagger(nn.Module):
    """Pools over a length, with a mask, as padded batches have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        hidden = self.mix(self.embed(ids), src_key_padding_mask=~mask)
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)) * scale


def call(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.arange(batch * length).reshape(batch, length) % 30
    return (ids,), {"mask": torch.arange(length)[None] < length - ids[:, :1] % 2}


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


def test_what_differs_between_calls_varies() -> None:
    model = tagger()
    assert varying(model, call(2, 5), [call(3, 5)]) == frozenset()
    assert varying(model, call(2, 5), [call(2, 5), call(2, 7)]) == {(0, 1), (1, 1)}
    other = (call(2, 7)[0], {**call(2, 5)[1], "scale": 2.0})  # of another structure
    assert varying(model, call(2, 5), [other]) == frozenset()


def test_any_length_gives_the_eager_models_bits() -> None:
    """In FP32, and in both modes; the first dimension varies besides."""
    model = tagger()
    captured = capture(model, *call(2, 5), others=[call(2, 7)])
    for mode in Mode:
        graph = captured.regions[0].graphs[mode]
        assert [given.shape for given in graph.signature.user_inputs] == [(None, None)] * 2
        model.train(mode.is_training)
        for batch, length in ((2, 5), (2, 7), (3, 2), (1, 11)):
            args, kwargs = call(batch, length)
            with torch.no_grad(), fused_transformer(enabled=False):
                assert_same_bits(model(*args, **kwargs), graph.runner(model)(*args, **kwargs))


def test_without_further_calls_the_length_is_fixed() -> None:
    captured = capture(tagger(), *call(2, 5), train=False)
    shapes = [g.shape for g in captured.regions[0].graphs[Mode.EVAL].signature.user_inputs]
    assert shapes == [(None, 5)] * 2


def test_the_library_learns_it_from_calibration() -> None:
    model = tagger()
    args, kwargs = call(2, 5)
    inputs = [{"ids": a[0], **k} for a, k in (call(2, 5), call(4, 9))]
    mixed = amp.convert(model, args, kwargs, calibration=iter(inputs), train=False)
    args, kwargs = call(3, 13)
    with torch.no_grad():
        found, want = mixed(*args, **kwargs), model(*args, **kwargs)
        assert_same_bits(found, mixed.freeze()(*args, **kwargs))
    assert mixed.__dict__["_unfit"] == set()
    assert (found - want).abs().max() < 1e-2


class Parted(nn.Module):
    """Its top level has control flow, so that it is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        return self.head(hidden if hidden.sum() > 0 else -hidden)


def test_parts_vary_with_the_model() -> None:
    torch.manual_seed(0)
    model = Parted().eval()
    mixed = amp.convert(
        model, torch.ones(2, 5, 8), calibration=[torch.ones(2, n, 8) for n in (5, 7)], train=False
    )
    assert [region.path for region in mixed.captured.regions] == ["body", "head"]
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        assert (mixed(x) - model(x)).abs().max() < 1e-2


# --- what no graph takes -------------------------------------------------------------------------


def test_a_call_that_no_graph_takes_runs_under_the_plan(caplog: Any) -> None:
    """An LSTM's length is burnt into its graph."""
    model, args, kwargs = build("lstm")
    model.eval()
    mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16, train=False)
    ids = torch.cat([args[0], args[0][:, :3]], 1)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "amp_convert"):
        found = mixed(ids)
        mixed(ids)
        with mixed.plan.autocast(model):
            assert_same_bits(found, model(ids))
    told = [r.message for r in caplog.records if "under the plan" in r.message]
    assert len(told) == 1
    assert "has shape (2, 13), but the graph takes (any, 10)" in told[0]


def test_arguments_that_were_left_out_may_be_given() -> None:
    model = tagger()
    mixed = amp.convert(model, *call(2, 5), train=False)
    args, kwargs = call(2, 5)
    with torch.no_grad():
        doubled, once = mixed(*args, **kwargs, scale=2.0), mixed(*args, **kwargs)
    assert (doubled - 2 * once).abs().max() < 1e-2


def test_wrong_inputs_are_refused_by_the_model_itself() -> None:
    mixed = amp.convert(tagger(), *call(2, 5), train=False)
    with pytest.raises(IndexError, match="index out of range"):
        mixed(torch.full((2, 6), 99), mask=torch.ones(2, 6, dtype=torch.bool))


# --- the command ---------------------------------------------------------------------------------


FILE = """
import torch
from torch import nn

class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
    def forward(self, x):
        return self.head(self.body(x).mean(1))

def build_model():
    torch.manual_seed(0)
    return Pool()

example_inputs = torch.randn(16, 5, 8)

def eval_batches():
    for length in (5, 6, 9):
        yield torch.randn(16, length, 8, generator=torch.Generator().manual_seed(length)), None
"""


def test_the_command_learns_it_from_the_batches(tmp_path: Path) -> None:
    file = tmp_path / "pooling_of_lengths.py"
    file.write_text(FILE)
    with pytest.raises(SystemExit) as ended:
        main([str(file), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The plan on the eager model: the converted model's bits" in report


class Named(nn.Module):
    """Takes what it has no names for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, *xs: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return self.a(torch.stack(xs).sum(0)) - self.a(more["z"]) + more["b"].mean()


def test_what_goes_into_kwargs_may_vary() -> None:
    """PyTorch 2.13 refuses dynamic sizes that are given by the name of a `**kwargs`."""

    def call(size: int, other: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        xs = (torch.randn(size, 8), torch.randn(size, 8))
        return xs, {"z": torch.randn(size, 8), "b": torch.randn(2, other)}

    model = Named().eval()
    others = [call(2, 5)]
    captured = capture(model, *call(2, 3), train=False, others=others)
    [region] = captured.regions
    signature = region.graphs[Mode.EVAL].signature
    assert {each.path: each.shape for each in signature.user_inputs} == {
        "xs[0]": (None, 8),
        "xs[1]": (None, 8),
        "more['b']": (None, None),
        "more['z']": (None, 8),
    }
    for given in (call(2, 3), call(7, 4)):
        args, kwargs = given
        assert captured.takes(args, kwargs) == ""
        assert_same_bits(region.runner(Mode.EVAL)(*args, **kwargs), model(*args, **kwargs))
    args, kwargs = call(4, 3)
    assert "size()" in captured.takes((*args[:1], args[1][:2]), kwargs)
