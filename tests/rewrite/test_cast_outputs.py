"""Outputs of a rewritten graph, and both graphs of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.rewrite.listing import listing
from tests.small_models import EXAMPLES, example, ramp
from tests.staged import (
    Recorder,
    Staged,
    decisions_of,
    rule,
    rules_with,
    same_bits,
)


class Returning(nn.Module):
    """Outputs that are inputs, weights, numbers, nothing, views of one value, low and not."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor, n: int = 3) -> Any:
        h = self.lin(x)
        return {
            "low": h,
            "parts": [h.split(4, -1), None, n],
            "input": x,
            "weight": self.lin.weight,
            "double": h.double(),
            "half": h.half(),
            "best": h.argmax(-1),
            "mask": h > 0,
        }


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "autocast", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_keep_dtype_shape_and_structure(preset: str, dtype: torch.dtype) -> None:
    staged = Staged.of(Returning(), ramp(2, 8))
    want = staged.model.eval()(*staged.args)
    have = staged.convert(preset, dtype).eval()(*staged.args)
    assert list(want) == list(have)
    left, right = have["parts"][0]
    assert (left.dtype, left.shape, right.dtype) == (torch.float32, (2, 4), torch.float32)
    assert have["parts"][1:] == [None, 3]
    assert torch.equal(have["input"], staged.args[0])
    assert torch.equal(have["weight"], want["weight"])
    for name in ("low", "double", "half", "best", "mask", "input", "weight"):
        assert (have[name].dtype, have[name].shape) == (want[name].dtype, want[name].shape), name
    assert torch.equal(have["low"], have["double"].float())
    assert not torch.equal(have["low"], want["low"])


class Averaging(nn.Module):
    """A buffer that the forward pass updates from a low value."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        self.average.mul_(0.5).add_(h.detach())
        return h


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "half"])
def test_a_changed_buffer_keeps_its_dtype(preset: str) -> None:
    staged = Staged.of(Averaging(), ramp(2, 8))
    mixed = staged.convert(preset)
    mixed.train()(*staged.args)
    mixed.eval()(*staged.args)
    average = dict(mixed.named_buffers())["average"]
    assert average.dtype == torch.float32
    want = 1.5 * staged.model.lin(*staged.args)
    torch.testing.assert_close(average, want, rtol=2e-3, atol=2e-3)
    assert not torch.equal(average, want)


class Direct(nn.Module):
    """The one output is what a pinned layer makes of a low value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.lin(x))


def test_an_fp32_output_is_not_cast_again() -> None:
    staged = Staged.of(Direct(), ramp(2, 8))
    rewritten = staged.rewritten(staged.plan(rules_with(rule("deny", layer="act"))))
    assert listing(rewritten)[-3:] == [
        "linear0.f32 = linear0",
        "tanh0 = tanh(linear0.f32)",
        "return tanh0",
    ]


# --- both graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", EXAMPLES)
def test_eval_and_train_are_rewritten_from_their_own_decisions(model: str) -> None:
    staged = example(model)
    plan = staged.plan()
    for mode in ("eval", "train"):
        rewritten = staged.rewritten(plan, mode)
        planned = decisions_of(plan, mode)
        assert [rewritten.values[d.name].name for d in planned] == [d.name for d in planned]
        values = Recorder(rewritten.graph_module).record(staged.inputs(mode))
        again = Recorder(rewritten.graph_module).record(staged.inputs(mode))
        assert same_bits(list(values.values()), list(again.values()))
