"""Sizes that the user says vary: they do, or it is said that they do not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import ModelError
from tests.command import amp as command
from tests.command import write

X, MASK = torch.randn(2, 5, 8), torch.ones(2, 5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.a(x) * mask[..., None]).sum(1)


class Fixed(nn.Module):
    """Flattens: its length is in a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(40, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x.flatten(1))


LENGTH = {"x": {1: "length"}, "mask": {1: "length"}}


def shapes(mixed: amp.ConvertedModel) -> dict[str, Any]:
    signature = mixed.captured.regions[0].graphs["eval"].signature  # type: ignore[index]
    return {each.path: each.shape for each in signature.user_inputs}


def test_what_is_said_varies() -> None:
    mixed = amp.convert(Masked().eval(), (X, MASK), train=False, dynamic=LENGTH)
    assert shapes(mixed) == {"x": (None, None, 8), "mask": (None, None)}
    assert mixed.captured.fixed_sizes == ()
    other = torch.randn(3, 9, 8), torch.ones(3, 9)
    assert mixed.captured.takes(other, {}) == ""
    frozen = mixed.freeze()
    with torch.no_grad():
        assert torch.equal(mixed(*other), frozen(*other))
    silent = amp.convert(Masked().eval(), (X, MASK), train=False)
    assert shapes(silent) == {"x": (None, 5, 8), "mask": (None, 5)}


def test_an_example_of_size_one_may_vary() -> None:
    """Export would burn in a size of 1."""
    example = X[:, :1].clone(), MASK[:, :1].clone()
    mixed = amp.convert(Masked().eval(), example, train=False, dynamic=LENGTH)
    assert shapes(mixed) == {"x": (None, None, 8), "mask": (None, None)}
    frozen = mixed.freeze()
    for given in (example, (torch.randn(3, 9, 8), torch.ones(3, 9))):
        assert mixed.captured.takes(given, {}) == ""
        with torch.no_grad():
            assert torch.equal(mixed(*given), frozen(*given))


def test_what_the_model_fixes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "amp_convert"):
        mixed = amp.convert(Fixed().eval(), X, train=False, dynamic={"x": {1: "length"}})
    [fixed] = mixed.captured.fixed_sizes
    assert fixed.reason.startswith("sizes do not vary as was said: ")
    assert fixed.reason in [record.getMessage() for record in caplog.records]
    with torch.no_grad():
        assert mixed(X).shape == (2, 4)


class Multiples(nn.Module):
    """Halves and doubles, as a U-Net does: the length has to be even."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.a(x[..., ::2]).repeat_interleave(2, -1)


def test_a_size_that_has_to_be_a_multiple_varies() -> None:
    model, x = Multiples().eval(), torch.randn(2, 3, 8)
    mixed = amp.convert(model, x, rules="fp32", train=False, dynamic={"x": {2: "length"}})
    assert mixed.captured.fixed_sizes == ()
    other = torch.randn(2, 3, 12)
    assert mixed.captured.takes((other,), {}) == ""
    with torch.no_grad():
        assert torch.equal(mixed(other), model(other))


@pytest.mark.parametrize(
    ("dynamic", "why"),
    [
        ({"y": {1: "length"}}, "names the input y, which is not there"),
        ({"masks": {1: "length"}}, "Did you mean mask?"),
        ({"x": {3: "length"}}, r"dimension 3 of x, of shape \(2, 5, 8\)"),
        ({"x": {-1: "length"}}, "dimension -1 of x"),
        ({"x": {1: "n", 2: "n"}}, r"calls both x\[1\] and x\[2\] 'n', and they are 5 and 8"),
        ({"x": [1]}, "dynamic is"),
        ({"x": {"1": "length"}}, "dynamic is"),
        ({"x": {True: "length"}}, "dynamic is"),
        (7, "dynamic is 7"),
    ],
)
def test_what_is_wrong_is_named(dynamic: Any, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        amp.convert(Masked().eval(), (X, MASK), train=False, dynamic=dynamic)


MODEL = """
import torch
from torch import nn

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 4)
    def forward(self, x):
        return self.a(x).sum(1)

torch.manual_seed(0)
model = Masked().eval()
example_inputs = torch.randn(8, 5, 8)
dynamic = {DYNAMIC}
"""


@pytest.mark.slow
def test_a_model_file_says_it(tmp_path: Path) -> None:
    write(tmp_path, MODEL.replace("{DYNAMIC}", "{'x': {1: 'length'}}"))
    outcome = command(tmp_path, "model.py", "--json", "--save")
    assert outcome.code == 0
    assert outcome.json["archive"]["file"]["inputs"][0]["shape"] == [None, None, 8]
    write(tmp_path, MODEL.replace("{DYNAMIC}", "{'z': {1: 'length'}}"))
    outcome = command(tmp_path, "model.py")
    assert outcome.code == 2
    assert "dynamic names the input z, which is not there" in outcome.err
