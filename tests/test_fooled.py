"""Small models over which amp-convert once said PASS, or blamed the wrong thing; and what is right.

Each stands for a kind. Figures are those of eager FP32, or of FP64 where it says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.verdict.check import Check
from tests.zoo import both_dtypes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checks(run: amp.Run) -> dict[str, Check]:
    return {check.name: check for check in run.verdict.checks}


def failed(run: amp.Run) -> list[str]:
    return [check.name for check in run.verdict.checks if check.status == "fail"]


def in_fp32(run: amp.Run, guard: str) -> set[str]:
    """The nodes that a guard keeps in FP32."""
    return {decision.node for decision in run.plan.eval if decision.guard == guard}


# --- outputs whose norm hides what matters -------------------------------------------------------


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


# --- structure -----------------------------------------------------------------------------------


class Finds(nn.Module):
    """The indices of what is found: in FP32 nothing, where 3.9999 is not 4."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        nn.init.eye_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nonzero(self.net(x).amax(1) >= 4.0)


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


# --- what the metrics show -----------------------------------------------------------------------


def identity(size: int = 8) -> nn.Module:
    layer = nn.Linear(size, size, bias=False)
    nn.init.eye_(layer.weight)
    return nn.Sequential(layer, nn.ReLU())


def edge(i: int) -> tuple[Tensor, Tensor]:
    """1.0004, which FP16 rounds to 1, in every second batch."""
    x = torch.rand(64, 8, generator=seeded(i))
    found = x[:, 0] > 0.5
    x[:, 3] = torch.where(found, 1.0004 if i % 2 else 5.0, 0.2)
    return x, found


def f1_if_any(outputs: Tensor, target: Tensor) -> dict[str, float]:
    found = outputs[:, 3] > 1.0002
    if not found.any():
        return {}
    return {"f1": float(2 * (found & target).sum() / (found.sum() + target.sum()))}


@pytest.mark.slow
def test_a_metric_that_one_arm_lacks_on_some_batches() -> None:
    batches = [edge(i) for i in range(8)]
    run = amp.check(identity(), batches[0][0], eval_batches=batches, metrics=f1_if_any)
    assert failed(run) == ["metrics.f1"]
    assert "on 4 batch(es) only one of the two has it" in checks(run)["metrics.f1"].reason


def error_rate(outputs: Tensor, target: Tensor) -> dict[str, float]:
    return {"error_rate": float(((outputs[:, 3] > 1.0002) != target).float().mean())}


@pytest.mark.slow
def test_a_name_in_lower_is_better_that_no_metric_has() -> None:
    batches = [edge(i) for i in range(8)]
    given: dict[str, Any] = {"eval_batches": batches, "metrics": error_rate}
    with pytest.raises(amp.ModelError, match=r"error-rate.*Did you mean error_rate\?"):
        amp.check(identity(), batches[0][0], lower_is_better=("error-rate",), **given)
    run = amp.check(identity(), batches[0][0], lower_is_better=("error_rate",), **given)
    assert failed(run) == ["metrics.error_rate"]


@pytest.mark.slow
def test_metrics_that_refuse_what_the_mixed_model_gives() -> None:
    """As scikit-learn's do where there is NaN: that is the mixed model's fault, and no error."""

    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * 1e4 * 1e4
            return (y - y.mean()) / y.std()

    def refuses(outputs: Tensor, target: Tensor) -> dict[str, float]:
        if outputs.isnan().any():
            raise ValueError("Input contains NaN")
        return {"mean": float(outputs.mean())}

    batches = [edge(i) for i in range(2)]
    run = amp.check(Overflows(), batches[0][0], rules="half", eval_batches=batches, metrics=refuses)
    assert {"outputs.finite", "metrics.mean"} <= set(failed(run))


@dataclass
class Outputs:
    logits: Tensor
    hidden: Tensor


class Named(nn.Module):
    """It returns a class that PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = identity()

    def forward(self, x: Tensor) -> Outputs:
        y = self.net(x)
        return Outputs(y, 2 * y)


@pytest.mark.slow
def test_metrics_of_a_class_of_the_users_are_tried_too() -> None:
    batches = [edge(2 * i) for i in range(4)]
    run = amp.check(
        Named(),
        batches[0][0],
        eval_batches=batches,
        metrics=lambda o, t: f1_if_any(o.logits, t),
    )
    assert checks(run)["metrics.f1"].status == "pass"


class Running:
    """A metric that forgets nothing."""

    def __init__(self) -> None:
        self.right = self.all = 0

    def __call__(self, outputs: Tensor, target: Tensor) -> dict[str, float]:
        self.right += int(((outputs[:, 3] > 1.0) == target).sum())
        self.all += len(target)
        return {"accuracy": self.right / self.all}


@pytest.mark.slow
def test_metrics_that_judge_nothing() -> None:
    batches = [edge(2 * i) for i in range(4)]
    given: dict[str, Any] = {"eval_batches": batches}
    kept = amp.check(identity(), batches[0][0], metrics=Running(), **given)
    assert checks(kept)["metrics.accuracy"].status == "unchecked"
    assert "Let it keep no state" in checks(kept)["metrics.accuracy"].reason
    same = amp.check(identity(), batches[0][0], metrics=lambda o, t: {"score": 0.98}, **given)
    assert checks(same)["metrics.score"].status == "unchecked"
    assert kept.verdict.status == same.verdict.status == "inconclusive"


@pytest.mark.slow
def test_metrics_that_write_to_what_they_are_given_spoil_nothing() -> None:
    batches = [edge(2 * i) for i in range(4)]

    def writes(outputs: Tensor, target: Tensor) -> dict[str, float]:
        found = float(((outputs[:, 3] > 1.0) == target).float().mean())
        outputs.zero_()
        target.fill_(False)
        return {"accuracy": found}

    run = amp.check(identity(), batches[0][0], eval_batches=batches, metrics=writes)
    assert run.verdict.status == "pass"
    (pair,) = run.report.inference.metrics  # type: ignore[union-attr]
    assert pair.fp32 == pair.mixed == pair.autocast == 1.0


# --- what was not looked at ----------------------------------------------------------------------


def late(count: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    """Those after the 8th overflow FP16."""
    g = seeded(1)
    for i in range(count):
        yield torch.randn(32, 16, generator=g) * (1 if i < 8 else 3e5), torch.zeros(32)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


@pytest.mark.slow
def test_hard_batches_that_come_late() -> None:
    run = amp.check(small_net(), torch.randn(8, 16), eval_batches=late)
    assert "outputs.finite" in failed(run)
    assert run.report.inference.batches == 20  # type: ignore[union-attr]
    few = amp.check(small_net(), torch.randn(8, 16), eval_batches=late, batches=8)
    assert few.verdict.status == "pass"
    assert checks(few)["batches.all"].reason == ("8 of 20 batches were seen, as --batches asks for")
    short = amp.check(small_net(), torch.randn(8, 16), eval_batches=late, eval_seconds=1e-9)
    assert short.verdict.status == "inconclusive"
    assert checks(short)["batches.all"].reason.startswith("1 of 20 batches were seen, since the")


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(5, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(self.embed(ids))
        return y if mask is None else y * mask[..., None]


@pytest.mark.slow
def test_zeros_beside_a_mask_of_ones_are_placeholders_and_one_label_is_none() -> None:
    torch.manual_seed(0)
    zeros, ones = torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8)
    for inputs, status in (((zeros, ones), "unchecked"), (torch.tensor([3]), "pass")):
        run = amp.check(Ids(), inputs, rules="half")
        assert checks(run)["batches.inputs"].status == status


class Writes(nn.Module):
    """What matters is written into a tensor of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        y = self.layer(x)
        out.copy_(y * y)
        return y.clamp(-1, 1)


@pytest.mark.slow
def test_what_is_written_to_an_input_is_compared_on_every_batch() -> None:
    def batches() -> Iterator[Any]:
        for i in range(12):
            x = torch.randn(16, 8, generator=seeded(i)) * (1 if i < 8 else 300)
            yield (x, torch.zeros(16, 8)), None

    run = amp.check(Writes().eval(), next(batches())[0], rules="half", eval_batches=batches)
    rows = {row.name: row for row in run.report.inference.outputs}  # type: ignore[union-attr]
    assert rows["input out"].elements == rows["output"].elements == 12 * 128
    assert rows["input out"].nonfinite > 0
    assert "outputs.finite" in failed(run)


class Scores(nn.Module):
    """A number beside a tensor, and one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {"y": y, "size": y.abs().mean().item(), "loss": float("nan")}


@pytest.mark.slow
def test_numbers_among_the_outputs_have_a_tolerance() -> None:
    torch.manual_seed(0)
    run = amp.check(Scores().eval(), torch.randn(16, 8))
    assert run.verdict.status == "pass"
    (row,) = (r for r in run.report.inference.outputs if r.name == "size")  # type: ignore[union-attr]
    assert 0 < row.rel_l2 < 1e-3


@pytest.mark.slow
def test_an_example_of_zeros() -> None:
    run = amp.check(small_net(), torch.zeros(2, 16))
    assert run.exit_code == 3
    assert checks(run)["batches.inputs"].status == "unchecked"
    assert amp.check(small_net(), torch.zeros(2, 16), eval_batches=lambda: late(2)).exit_code == 0


class SwitchesOff(nn.Module):
    """Its author keeps autocast off around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        with torch.autocast(x.device.type, enabled=False):
            h = torch.relu(self.b(h.float()))
        return self.c(h)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["default", "half", "autocast"])
def test_where_the_model_switches_autocast_off(rules: str) -> None:
    torch.manual_seed(0)
    mixed = amp.convert(SwitchesOff(), torch.randn(8, 16), rules=rules)
    for decisions in (mixed.plan.eval, mixed.plan.train):
        low = {d.node: d.low for d in decisions}
        assert (low["a/aten.linear#0"], low["b/aten.linear#0"], low["c/aten.linear#0"]) == (
            True, False, True
        )  # fmt: skip
        (inside,) = (d for d in decisions if d.node == "b/aten.linear#0")
        assert (inside.rule, inside.source) == ("autocast off", "model")
    if rules == "autocast":
        x = torch.randn(8, 16)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            want = mixed.captured.model(x)
        assert torch.equal(mixed.eval()(x), want.float())
    override = amp.convert(SwitchesOff(), torch.randn(8, 16), rules="half", train=False)
    assert override.plan.share_macs_low() < 1


class Spectrum(nn.Module):
    """Its only output is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)) * 100) * 5000
        return torch.complex(h[:, :16].float(), h[:, 16:].float())


@pytest.mark.slow
def test_a_complex_output_is_counted_by_its_elements() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, generator=seeded(0))
    run = amp.check(Spectrum().eval(), x, rules="half")
    with torch.no_grad():
        lost = int((~torch.isfinite(run.converted(x))).sum())
    assert 0 < lost < 128
    one = checks(run)["outputs.finite"]
    assert (one.status, one.value) == ("fail", lost)
    assert f"{lost} of 128 elements" in one.reason
    fine = amp.check(Spectrum().eval(), x)
    assert fine.verdict.status == "pass"
    rows = {row.op: row for row in fine.report.inference.nodes}  # type: ignore[union-attr]
    assert rows["aten.complex"].accumulated_rel_l2 < 1e-2


# --- routers -------------------------------------------------------------------------------------


class Router(nn.Module):
    """Experts that are alike: the scores of the best are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.randn(1, 32) + 0.02 * torch.randn(16, 32))
        self.up = nn.Parameter(torch.randn(16, 32, 64) / 32**0.5)
        self.down = nn.Parameter(torch.randn(16, 64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.gate).sigmoid()
        weights, where = scores.topk(4, -1)
        gates = torch.zeros_like(scores).scatter(1, where, weights / weights.sum(-1, keepdim=True))
        hidden = F.silu(torch.einsum("td,edf->tef", x, self.up))
        return (torch.einsum("tef,efd->ted", hidden, self.down) * gates[..., None]).sum(1)


@pytest.mark.slow
def test_the_gates_of_a_router_stay_fp32() -> None:
    batches = [(torch.randn(256, 32, generator=seeded(i)), None) for i in range(3)]
    run = amp.check(Router().eval(), batches[0][0], eval_batches=batches)
    assert "/aten.linear#0" in in_fp32(run, "choice-error")
    assert run.plan.share_macs_low() > 0.98
    (topk,) = (d for d in run.report.inference.nodes if d.op == "aten.topk")  # type: ignore[union-attr]
    assert topk.choices_changed is not None
    without = amp.check(Router().eval(), batches[0][0], rules="half", eval_batches=batches)
    assert checks(without)["nodes.choices"].status == "unchecked"
    assert "routes changed" in checks(without)["nodes.choices"].reason


# --- training ------------------------------------------------------------------------------------


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 16, generator=seeded(seed))
    return x, x[:, :4].argmax(1)


def labelled_batches(seed: int, count: int = 400) -> Iterator[tuple[Tensor, Tensor]]:
    return (labelled(64, seed * 10000 + i) for i in range(count))


@pytest.mark.slow
def test_where_nothing_was_learnt_nothing_was_tested() -> None:
    run = amp.check(
        small_net(),
        labelled(8, 0)[0],
        eval_batches=lambda: labelled_batches(7, 4),
        train_batches=labelled_batches,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, 1e-7),
    )
    assert (run.exit_code, run.report.training.run.steps) == (3, 200)  # type: ignore[union-attr]
    assert checks(run)["training.learnt"].status == "unchecked"
    assert "too little was learnt for the mixed model to fail at" in (
        checks(run)["training.learnt"].reason
    )


class Draws(nn.Module):
    """It draws from NumPy in eval mode, or leaves layers out by Python's in train mode."""

    def __init__(self, *, in_eval: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head, self.in_eval = nn.Linear(16, 4), in_eval

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() < 0.7:
                x = torch.relu(layer(x)) + x
        factor = float(np.random.uniform(0.5, 1.5)) if self.in_eval else 1.0
        return self.head(x) * factor  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("in_eval", [True, False])
def test_random_numbers_from_outside_of_torch(in_eval: bool) -> None:
    torch.manual_seed(0)
    run = amp.check(
        Draws(in_eval=in_eval).eval(),
        labelled(8, 0)[0],
        eval_batches=lambda: labelled_batches(7, 3),
        train_batches=lambda seed: labelled_batches(seed, 8),
        loss=F.cross_entropy,
    )
    assert (run.exit_code, failed(run)) == (3, [])
    names = ["fidelity.eval", "fidelity.batches"] if in_eval else ["training.random"]
    for name in names:
        assert checks(run)[name].status == "unchecked"
        assert f"{'NumPy' if in_eval else 'Python'}'s random numbers" in checks(run)[name].reason


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.r = (
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.p(x), F.normalize(self.r(x), dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss_scale": "64"}], ids=["dynamic", "static"])
def test_a_head_whose_gradients_vanish_beside_the_others(settings: dict[str, Any]) -> None:
    """Its loss has a weight of 1e-10: many of its gradients are zeroed; all at a scale of 64."""

    def batches(seed: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for i in range(8):
            x = torch.randn(128, 16, generator=seeded(1000 * seed + i))
            yield x, (x[:, :3], F.normalize(x[:, 3:6], dim=-1))

    def loss(outputs: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        away = (1 - (outputs[1] * target[1]).sum(-1)).mean()
        return F.mse_loss(outputs[0], target[0]) + 1e-10 * away

    torch.manual_seed(0)
    x = next(batches(0))[0]
    run = amp.check(TwoHeads().eval(), x, train_batches=batches, loss=loss, **settings)
    one = checks(run)["training.gradients"]
    assert one.status == "fail"
    assert "of those of r.0 are 0, which FP32's are not" in one.reason
    layers = {row.layer: row for row in run.report.training.gradients.layers}  # type: ignore[union-attr]
    assert (layers["r.0"].zeroed_share or 0) > (0.99 if settings else 0.2)
    assert (layers["r.0"].noise_rel_l2 or 1) < 1e-3
