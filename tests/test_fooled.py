"""Small models over which amp-convert once said PASS, or blamed the wrong thing; and what is right.

Each stands for a kind. Figures are those of eager FP32, or of FP64 where it says so.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from tests.fooling import checks, failed, in_fp32, seeded
from tests.zoo import both_dtypes


def years(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    x = torch.randn(count, 8, generator=g)
    return x, 2005 + 0.3 * torch.sin(x[:, :1]) + 0.2 * x[:, 1:2] * x[:, 2:3]


@pytest.fixture(scope="module")
def regression() -> nn.Module:
    """Years, really learnt: R² is 0.99."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    nn.init.constant_(model[4].bias, 2005.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = years(2048, 1)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


# --- outputs whose norm hides what matters -------------------------------------------------------


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("rules", ["default", "half"])
def test_a_regression_of_a_year(regression: nn.Module, rules: str, dtype: torch.dtype) -> None:
    """Rounded, every prediction is a whole year in FP16 (R² 0.23), and 2008 in BF16 (-111)."""

    def r2(outputs: Tensor, target: Tensor) -> float:
        return float(1 - ((outputs - target) ** 2).sum() / ((target - target.mean()) ** 2).sum())

    batches = [years(64, 10 + i) for i in range(8)]
    run = amp.check(regression, years(8, 2)[0], dtype=dtype, rules=rules, eval_batches=batches)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        fp32, mixed = r2(regression(x), y), r2(run.converted(x), y)
    assert fp32 > 0.98
    if rules == "half":
        assert mixed < 0.5
        assert failed(run) == ["outputs.max_abs", "outputs.channels", "outputs.untuned"]
        assert "error 0.9" in checks(run)["outputs.channels"].reason or dtype == torch.bfloat16
    else:
        assert mixed == pytest.approx(fp32, abs=1e-3)
        assert run.verdict.status == "pass"
        assert in_fp32(run, "output-error") == {"4/aten.linear#0"}


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["default", "half"])
def test_two_channels_that_are_tiny(rules: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[2].weight[6:] *= 1e-8
        model[2].bias[6:] *= 1e-8
    g = seeded(1)
    batches = [(torch.randn(32, 16, generator=g), None) for _ in range(8)]
    run = amp.check(model, batches[0][0], rules=rules, eval_batches=batches)
    x = batches[0][0]
    with torch.no_grad():
        exact = model.double()(x.double())[:, 6:]
        model.float()
        error = float((run.converted(x)[:, 6:].double() - exact).norm() / exact.norm())
    if rules == "half":
        assert error > 0.9
        assert failed(run) == ["outputs.channels", "outputs.untuned"]
        reason = checks(run)["outputs.channels"].reason
        assert reason.startswith(("channel 6 of dimension 1", "channel 7 of dimension 1"))
        assert "it hardly varies beside the others" in reason
    else:
        assert error < 1e-3
        assert run.verdict.status == "pass"


class Euler(nn.Module):
    """Ten explicit steps of 1e-3 from about 100."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, y: Tensor) -> Tensor:
        t = torch.zeros(y.shape[0], 1, dtype=y.dtype)
        for _ in range(10):
            y = y + 0.02 * self.f(torch.cat([y / 100, t], 1))
            t = t + 1e-3
        return y


@pytest.mark.slow
@both_dtypes
def test_increments_under_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    """All of them lost, what the model does is off by 0.93 in FP16 and 2.74 in BF16."""
    torch.manual_seed(0)
    model = Euler().eval()
    batches = [(torch.randn(8, 8, generator=seeded(s)) * 5 + 100, None) for s in range(2)]
    run = amp.check(model, batches[0][0], dtype=dtype, eval_batches=batches)
    assert run.verdict.status == "pass"
    lost = {f"/aten.add#{i}" for i in range(0, 20, 2)}
    assert lost <= {d.node for d in run.plan.eval if not d.low}
    assert in_fp32(run, "increment-loss")
    x = batches[1][0]
    with torch.no_grad():
        mixed = run.converted(x).double() - x
        exact = model.double()(x.double()) - x
    assert float((mixed - exact).norm() / exact.norm()) < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 8])
def test_too_few_samples_for_a_spread_never_pass_over_an_error(size: int) -> None:
    """Every prediction of a year is 2005.0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)).eval()
    nn.init.constant_(model[2].bias, 2005.0)
    run = amp.check(model, torch.randn(size, 8), rules="half")
    assert run.verdict.status == ("inconclusive" if size < 8 else "fail")
    assert checks(run)["outputs.channels"].status == ("unchecked" if size < 8 else "fail")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
def test_few_samples_are_no_false_alarm(size: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
        assert amp.check(model, torch.randn(size, 8)).verdict.status == "pass"


class PassesOn(nn.Module):
    """It hands a tensor of the user's through, in FP64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), t


@pytest.mark.slow
def test_comparing_leaves_the_users_own_data_alone() -> None:
    times = torch.randn(16, dtype=torch.float64) + 2000
    batches = [((torch.randn(16, 8), times.clone()), None) for _ in range(2)]
    assert (
        amp.check(PassesOn().eval(), batches[0][0], eval_batches=batches).verdict.status == "pass"
    )
    assert all(torch.equal(batch[0][1], times) for batch in batches)


class Flat(nn.Module):
    """Two logits of which the second is always a little larger, in any layout."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = nn.Linear(4, 1), axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + 10
        return torch.cat([y, y + 2e-4], 2).movedim(2, self.axis)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, 2])
def test_a_class_that_rounding_takes_is_lost(axis: int) -> None:
    run = amp.check(Flat(axis).eval(), torch.randn(8, 50, 4), rules="half")
    assert "outputs.classes" in failed(run)


class Finds(nn.Module):
    """The indices of what is found: in FP32 nothing, where 3.9999 is not 4."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        nn.init.eye_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nonzero(self.net(x).amax(1) >= 4.0)


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_detections_of_one_arm_alone() -> None:
    def batch(i: int) -> Tensor:
        x = torch.rand(16, 8, generator=seeded(i))
        x[:, 3] = 3.9999 if i else 5.0
        return x

    run = amp.check(Finds(), batch(0), eval_batches=[(batch(i), None) for i in range(8)])
    assert failed(run) == ["outputs.structure", "outputs.untuned"]
    one = checks(run)["outputs.structure"]
    assert one.value == 7
    assert one.reason == "the output is 0 x 1 in FP32 and 16 x 1 mixed, on batch 1, and 6 more"


class Ranked(nn.Module):
    """The best of many candidates, in the order of their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.head(x)
        best, where = boxes[..., 5].sigmoid().topk(20, 1)
        rows = boxes[..., :5].gather(1, where[..., None].expand(-1, -1, 5))
        return rows, best


@pytest.mark.slow
def test_rows_that_changed_places_among_near_equal_scores() -> None:
    torch.manual_seed(1)
    run = amp.check(
        Ranked().eval(),
        torch.rand(2, 80, 4),
        rules="half",
        eval_batches=[(torch.rand(2, 80, 4, generator=seeded(i)), None) for i in range(3)],
    )
    rows = {row.name: row for row in run.report.inference.outputs}  # type: ignore[union-attr]
    assert rows["[0]"].rows == 120
    assert 0 < rows["[0]"].moved < 60
    assert "rows of output [0] changed places among near-equal scores" in (
        checks(run)["outputs.rel_l2"].reason
    )
