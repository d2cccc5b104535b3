"""What was not looked at never passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from tests.fooling import checks, failed, in_fp32, seeded, small_net


def late(count: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    """Those after the 8th overflow FP16."""
    g = seeded(1)
    for i in range(count):
        yield torch.randn(32, 16, generator=g) * (1 if i < 8 else 3e5), torch.zeros(32)


# --- what was not looked at ----------------------------------------------------------------------


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


# --- routers -------------------------------------------------------------------------------------


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
