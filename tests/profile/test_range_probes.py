"""Ranges on inputs unlike those of calibration: what is tried, kept, and made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.profile import range_probes
from amp_convert.profile.calibrate import Range, profile
from amp_convert.profile.range_probes import probed_extremes
from amp_convert.rules.load import load_rules


def probed(model: nn.Module, *args: Any) -> dict[str, tuple[float, float]]:
    """What the probes find, "aten." left out of the names."""
    found = probed_extremes(capture(model.eval(), args, {}, train=False), args, {})
    return {name.replace("aten.", ""): seen for name, seen in found.items()}


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().neg()


@pytest.mark.slow
def test_the_largest_of_both_probes_are_kept() -> None:
    """100 times 3 is 300, less than the spike of 1e4; 100 times 200 is more."""
    assert probed(Square(), torch.full((2, 3), 3.0)) == {
        " input x": (1e4, 1e4),
        "/square#0": (1e8, 1e8),
        "/neg#0": (1e8, 0.0),
    }
    assert probed(Square(), torch.full((2, 3), 200.0))["/square#0"] == (4e8, 4e8)


def test_a_normalisation_bounds_what_comes_after_it() -> None:
    found = probed(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)), torch.randn(4, 16))
    assert found["0/layer_norm#0"][0] <= 16**0.5 < 1e4
    assert found["1/linear#0"][0] < 16


def test_what_fp32_cannot_hold_asks_nothing() -> None:
    class Exp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()

    args = (torch.tensor([[1.0, 0.5, 0.2], [2.0, -1.0, 0.1]]),)
    found = probed(Exp(), *args)["/exp#0"][0]
    assert found == float(torch.tensor(50.0).exp())  # e**100 and e**10000 are infinite


def test_masks_flags_and_integers_are_left_as_they_are() -> None:
    class Masked(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return ids * (1 - mask) * -1e4

    assert probed(Masked(), torch.arange(4), torch.tensor([1.0, 1.0, 0.0, 0.0])) == {}


def test_an_example_of_zeros_is_no_flag() -> None:
    assert probed(Square(), torch.zeros(2, 3))["/square#0"] == (1e8, 1e8)


class Looked(nn.Module):
    """Counts where its input is, and looks that up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x.square().floor().long()).exp()


def test_an_index_out_of_bounds_ends_a_probe_and_nothing_else() -> None:
    found = probed(Looked(), torch.tensor([0.5, 1.2, 0.7]))
    assert found["/square#0"] == (1e8, 1e8)
    assert "table/embedding#0" not in found


@pytest.mark.slow
def test_on_a_gpu_nothing_is_computed_that_could_be_an_index() -> None:
    """There an index out of bounds ends the process, and no `except` helps."""
    args = (torch.tensor([0.5, 1.2, 0.7]),)
    captured = capture(Looked().eval(), args, {}, train=False)
    with mock.patch.object(Captured, "device", torch.device("cuda")):
        found = probed_extremes(captured, args, {})
    assert found["/aten.square#0"] == (1e8, 1e8)
    assert not [name for name in found if "embedding" in name]

    class Drawn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bernoulli(x.neg()).exp()

    args = (torch.tensor([-0.5, -0.2]),)
    captured = capture(Drawn().eval(), args, {}, train=False)
    with mock.patch.object(Captured, "device", torch.device("cuda")):
        found = probed_extremes(captured, args, {})
    assert [*found] == [" input x", "/aten.neg#0"]


def test_nothing_is_left_behind() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand(()) * self.norm(x)

    model, args = Counts().eval(), (torch.randn(4, 3),)
    kept = args[0].clone()
    captured = capture(model, args, {}, train=False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    profile(captured, [(args, {})], [])
    assert torch.equal(args[0], kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_parts_are_probed_with_what_the_model_hands_them() -> None:
    class Parts(nn.Module):
        """Data-dependent control flow between two layers, and a state in an attribute."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = self.first(x)
            if x.sum() > 1e9:
                raise ValueError("far too much")
            return self.last(x)

    model, args = Parts().eval(), (torch.full((2, 4), 2.0),)
    captured = capture(model, args, {}, train=False)
    calls = model.calls
    found = probed_extremes(captured, args, {})
    assert {name for name in found if "/" in name} == {"first/aten.linear#0", "last/aten.linear#0"}
    assert model.calls == calls


def test_only_the_first_batch_is_probed() -> None:
    captured = capture(Square().eval(), (torch.ones(2, 3),), {}, train=False)
    batches = [((torch.full((2, 3), value),), {}) for value in (2.0, 1000.0)]
    with mock.patch.object(range_probes, "SPIKE", 1.0):
        ranges = profile(captured, batches, []).ranges
    assert ranges["/aten.square#0"] == Range(1e6, 1e6, probed=Range(4e4, 4e4))


def test_the_range_on_probes_moves_with_scaling_and_merging() -> None:
    small, large = Range(1.0, 1.0, probed=Range(8.0, 4.0)), Range(2.0, 2.0, probed=Range(16.0, 2.0))
    assert small.scaled(0.5).probed == Range(4.0, 2.0)
    assert small.merged(large).probed == Range(16.0, 4.0)
    assert small.merged(Range(3.0, 3.0)).probed == small.probed
    assert Range(3.0, 3.0).merged(small).probed == small.probed


# --- the plan ------------------------------------------------------------------------------------


class Cube(nn.Module):
    """A layer, and the cube of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) ** 3)


@pytest.mark.parametrize("larger", [1.0, 100.0])
def test_a_model_stays_finite_on_inputs_that_calibration_saw_nothing_like(larger: float) -> None:
    torch.manual_seed(0)
    model, x = Cube().eval(), torch.randn(4, 8)
    mixed = amp.convert(model, x, train=False)
    with torch.no_grad():
        want, have = model(x * larger), mixed(x * larger)
    torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_the_plan_says_which_inputs_and_how_to_do_without() -> None:
    torch.manual_seed(0)
    model, x = Cube().eval(), torch.randn(4, 8)
    found = {d.node: d for d in amp.convert(model, x, train=False).plan.eval}
    cubed = found["/aten.pow#0"]
    assert (cubed.guard, cubed.precision, cubed.limit) == ("probed-range", "float32", 65504.0)
    assert cubed.measured is not None
    assert cubed.measured > 65504
    assert cubed.reason == (
        "on inputs 100 times larger than those of calibration, or with a value of 10000, its "
        "result passes the largest float16 number (probe_headroom = false in [guards] allows that)"
    )
    default = load_rules(["default"])
    rules = replace(default, guards=replace(default.guards, probe_headroom=False))
    assert amp.convert(model, x, rules=rules, train=False).plan.share_macs_low() == 1.0
