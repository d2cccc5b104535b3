"""Training that would hide what is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from tests.fooling import checks, failed, seeded, small_net


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
