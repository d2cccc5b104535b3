"""The folded model as an arm of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amp_convert as amp
from amp_convert.plan import batch_norm_folds as folding
from amp_convert.rewrite.frozen_model import FrozenModel
from tests.rewrite.pairs import convolution


def checks(run: amp.Run) -> dict[str, Any]:
    return {check.name: check for check in run.verdict.checks}


@pytest.mark.slow
def test_the_folded_model_is_an_arm_of_its_own() -> None:
    model, x = convolution()
    targets = [(x + i, model(x + i).argmax(1)) for i in range(2)]

    def metrics(outputs: Tensor, target: Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == target).float().mean())}

    given: dict[str, Any] = {"eval_batches": targets, "metrics": metrics}
    assert "outputs.folded" not in checks(amp.check(model, x, **given))
    run = amp.check(model, x, fold_batch_norm=True, **given)
    check = checks(run)["outputs.folded"]
    assert check.status == "pass"
    assert check.reason == "the outputs with 1 of 1 BatchNorms folded hold as well"
    found = run.report.inference
    assert found is not None
    [output], [metric] = found.folded_outputs, found.folded_metrics
    assert 0 < output.rel_l2 < 1e-3
    assert output.rel_l2 != found.frozen_outputs[0].rel_l2
    assert (metric.name, metric.mixed > 0.9) == ("accuracy", True)
    assert [cost.arm for cost in found.costs][-2:] == ["frozen", "folded"]


@pytest.mark.slow
def test_a_fold_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    own = FrozenModel.__init__

    def wrong(self: FrozenModel, converted: Any, *, fold_batch_norm: bool = False) -> None:
        own(self, converted, fold_batch_norm=fold_batch_norm)
        if fold_batch_norm:
            self.get_buffer("folded.product_weight")[0] *= 2

    monkeypatch.setattr(FrozenModel, "__init__", wrong)
    model, x = convolution()
    run = amp.check(model, x, fold_batch_norm=True)
    check = checks(run)["outputs.folded"]
    assert (check.status, run.exit_code) == ("fail", 1)
    assert check.reason.startswith("with 1 of 1 BatchNorms folded, outputs.")


def test_nothing_to_fold_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    run = amp.check(model, torch.randn(4, 8), fold_batch_norm=True)
    check = checks(run)["outputs.folded"]
    assert (check.status, check.required) == ("unchecked", False)
    assert "no product has a BatchNorm behind it" in check.reason


def test_the_dimension_of_the_channels_stands_for_every_product() -> None:
    """Each is an operator that takes weight and bias as its second and third argument."""
    for op in folding.CHANNEL:
        names = [argument.name for argument in op._schema.arguments]
        assert names[1:3] == ["weight", "bias"], op
