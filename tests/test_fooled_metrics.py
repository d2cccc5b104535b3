"""Metrics that would hide what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amp_convert as amp
from tests.fooling import checks, failed, seeded


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
