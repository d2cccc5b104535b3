"""Batches for which the model takes another path than the one that was traced: the original takes
them, under the plan; the verdict says that the frozen model does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.validate.inference.compare import compare
from amp_convert.verdict.check import CheckStatus
from amp_convert.verdict.inference_checks import frozen_check


class Paths(nn.Module):
    """Long sequences go through another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.long(x) if x.shape[1] > 6 else self.short(x)
        return self.head(hidden.relu())


def batch(length: int, seed: int) -> torch.Tensor:
    return torch.randn(8, length, 8, generator=torch.Generator().manual_seed(seed))


def converted() -> amp.ConvertedModel:
    torch.manual_seed(0)
    calibration = [batch(5, 1), batch(9, 2)]
    return amp.convert(Paths().eval(), batch(4, 0), calibration=calibration, train=False)


def test_they_are_compared_and_counted() -> None:
    mixed = converted()
    given = [((batch(n, n),), {}, None) for n in (4, 9, 5, 8)]
    found = compare(mixed, given)
    assert (found.batches, found.samples) == (4, 32)
    [unfit] = found.unfit
    assert unfit.batches == 2
    assert "takes another path" in unfit.reason
    assert found.frozen_identical is True
    check = frozen_check(found)
    assert check.status is CheckStatus.UNCHECKED
    assert check.reason.startswith("the frozen model does not take 2 of 4 batches (the model")
    [output] = found.outputs
    assert output.elements == 8 * 4 * (4 + 9 + 5 + 8)
    assert 1e-6 < output.rel_l2 < 2e-3
    [native] = found.autocast_outputs
    assert native.elements == output.elements


def test_an_error_in_them_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other path gives what is wrong under the plan: here, once it is asked again."""
    mixed = converted()
    model = mixed.captured.model
    assert isinstance(model, Paths)
    forward, calls = model.forward, [0]

    def worse(x: torch.Tensor) -> torch.Tensor:
        calls[0] += x.shape[1] > 6
        return forward(x) * (1.5 if x.shape[1] > 6 and calls[0] == 2 else 1)

    monkeypatch.setattr(model, "forward", worse)
    [output] = compare(mixed, [((batch(9, 9),), {}, None)], autocast=False).outputs
    assert output.rel_l2 > 0.3


def test_batches_that_no_graph_takes_alone_prove_no_frozen_model() -> None:
    found = compare(converted(), [((batch(9, 9),), {}, None)])
    assert found.frozen_identical is None
    assert frozen_check(found).status is CheckStatus.UNCHECKED


class InParts(Paths):
    """The same around a look at a value, so that no graph holds it whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head.forward(self.short(x)) if bool(x.sum() > 1e9) else x
        return self.head(self.block(x).relu())


class Block(nn.Module):
    """A part that takes another path for long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(x) if x.shape[1] > 6 else self.short(x)


def test_parts_that_do_not_take_a_batch() -> None:
    torch.manual_seed(0)
    model = InParts()
    model.block = Block()
    mixed = amp.convert(model.eval(), batch(4, 0), train=False)
    assert not mixed.captured.is_whole
    found = compare(mixed, [((batch(n, n),), {}, None) for n in (4, 9)])
    assert [unfit.batches for unfit in found.unfit] == [1]
    assert frozen_check(found).status is CheckStatus.UNCHECKED
    [output] = found.outputs
    assert output.elements == 8 * 4 * (4 + 9)
    assert 1e-6 < output.rel_l2 < 2e-3


@pytest.mark.slow
def test_a_run_ends_inconclusive_with_all_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    evals = [(batch(n, n), None) for n in (4, 9, 5)]
    run = amp.check(
        Paths().eval(), batch(4, 0), eval_batches=evals, out=tmp_path / "report", save=True
    )
    open_ = {c.name for c in run.verdict.checks if c.required and c.status != "pass"}
    assert open_ == {"frozen.identical"}
    assert run.exit_code == 3
    assert run.report.inference is not None
    assert [unfit.batches for unfit in run.report.inference.unfit] == [1]
