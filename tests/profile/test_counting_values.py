"""Which values may count, so that no rounding of them is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.capture.regions import capture
from amp_convert.profile.calibrate import profile


class Counter(nn.Module):
    """Integers made into floats in several ways, beside floats that happen to be whole."""

    whole: torch.Tensor
    fractions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.tensor([0.0, 5.0, 9.0]))
        self.register_buffer("fractions", torch.tensor([0.5, 1.0, 2.0]))
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = ids.float()
        places = torch.arange(3, dtype=torch.float32)
        return {
            "converted": steps.neg(),
            "counted": places.unsqueeze(0),
            "both": (steps - places).abs(),
            "scaled": steps.mul(4),
            "halved": steps.div(2),
            "buffer": self.whole.sign(),
            "fractions": self.fractions.ceil(),
            "weight": self.weight.square(),
            "given": x.round(),
            "mixed": x + steps,
            "of integers": (ids + 1).float().tanh(),
        }


def counting(*batches: tuple[torch.Tensor, torch.Tensor]) -> dict[str, bool]:
    """Which values count, by operator; inputs and tensors of the model by their names."""
    captured = capture(Counter(), (torch.ones(2, 3), torch.tensor([[0, 2, 4], [1, 3, 8]])), {})
    stats = profile(captured, [(batch, {}) for batch in batches])
    return {
        name.rpartition("/")[2].removeprefix("aten.").removesuffix("#0"): seen.integral
        for name, seen in stats.ranges.items()
    }


EVEN, WHOLE = torch.tensor([[0, 2, 4]]), torch.full((1, 3), 7.0)


@pytest.mark.slow
def test_what_is_made_of_integers_alone_counts_and_a_buffer_does() -> None:
    found = counting((WHOLE, EVEN))
    made = {"_to_copy", "_to_copy#1", "neg", "arange", "unsqueeze", "sub", "abs", "mul", "div"}
    assert {name for name, integral in found.items() if integral} >= made | {"whole"}


@pytest.mark.slow
def test_what_is_made_of_a_buffer_that_counts_counts() -> None:
    assert counting((WHOLE, EVEN))["sign"]


def test_what_the_user_gives_and_what_is_trained_never_count() -> None:
    """However whole the numbers are: `x` is 7 and the weight is 1, 2 and 3."""
    found = counting((WHOLE, EVEN))
    assert not any(found[name] for name in ("weight", "square", "round", "add"))
    assert not next(integral for name, integral in found.items() if name.endswith("input x"))


def test_a_fraction_ends_counting() -> None:
    found = counting((WHOLE, EVEN))
    assert not found["fractions"]
    assert not found["ceil"], "nor does what is rounded after it"
    assert not found["tanh"]


@pytest.mark.slow
def test_one_batch_with_a_fraction_is_enough() -> None:
    odd = torch.tensor([[1, 3, 5]])
    assert counting((WHOLE, EVEN))["div"]
    assert not counting((WHOLE, EVEN), (WHOLE, odd), (WHOLE, EVEN))["div"]
    assert counting((WHOLE, EVEN), (WHOLE, odd))["mul"]
