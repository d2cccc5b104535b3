"""Gradient parity at one step, against eager PyTorch, autocast, and figures worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.report.sections.gradient_summary import gradient_remarks
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.gradient_results import GradientParity
from tests.bits import assert_same_bits
from tests.validate.training.gradient_parity import net, of_zoo, parity, staged
from tests.validate.training.gradient_steps import Net
from tests.validate.training.test_gradient_step import REAL
from tests.zoo import both_dtypes, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)


Y = torch.linspace(1, -1, 24).reshape(6, 4)


SCALE = 2.0**16


def by_hand(model: nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor | None]:
    """Unscaled gradients from a plain backward pass in train mode, in FP64."""
    with mode(model, train=True):
        torch.manual_seed(3)
        (F.mse_loss(model(X), Y) * scale).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {n: None if g is None else g.double() / scale for n, g in found.items()}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_a_model_that_is_not_converted_has_no_errors(name: str) -> None:
    found = of_zoo(name, rules="fp32")
    assert found.reference_rel_l2 == 0
    assert found.loss_fp32 == found.loss_mixed
    assert found.same_random_numbers
    assert found.faults == ()
    for row in (found.total, *found.parameters, *(r for r in found.layers if r.elements)):
        assert (row.rel_l2, row.max_abs_err, row.nonfinite) == (0, 0, 0)
        assert row.cosine == pytest.approx(1, abs=1e-12)
        assert row.zeroed_share in (0, None)


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_errors_worked_out_by_hand(dtype: torch.dtype, scale: float) -> None:
    of = net()
    mixed = of.convert(dtype=dtype)
    found = parity(mixed, scale=scale)
    want, have = by_hand(of.model), by_hand(of.convert(dtype=dtype), scale)
    pairs = {n: (want[n], have[n]) for n in want if want[n] is not None}
    assert [row.name for row in found.parameters] == list(pairs)
    for row in found.parameters:
        assert row.shape == tuple(pairs[row.name][0].shape)
        _assert_errors(row, [pairs[row.name]])
    for row in (r for r in found.layers if r.elements):
        own = [pairs[n] for n in pairs if n.rpartition(".")[0] == row.layer]
        assert len(own) == 2
        _assert_errors(row, own)
    _assert_errors(found.total, list(pairs.values()))
    assert found.total.rel_l2 > 0
    assert found.dtype == str(dtype).removeprefix("torch.")


def _assert_errors(row: Any, pairs: list[Any]) -> None:
    want = torch.cat([w.flatten() for w, _ in pairs])
    have = torch.cat([h.flatten() for _, h in pairs])
    assert row.elements == want.numel()
    assert row.rel_l2 == pytest.approx(float((have - want).norm() / want.norm()), rel=1e-9)
    cosine = torch.nn.functional.cosine_similarity(want, have, dim=0)
    assert row.cosine == pytest.approx(float(cosine), rel=1e-9)
    assert row.max_abs_err == pytest.approx(float((have - want).abs().max()), rel=1e-9)
    assert row.ref_abs_max == float(want.abs().max())
    lost = int(((have == 0) & (want != 0)).sum())
    assert row.zeroed_share == lost / int((want != 0).sum())


@pytest.mark.slow
@both_dtypes
def test_what_rounded_weights_do_to_fp32s_gradients(dtype: torch.dtype) -> None:
    """By hand; a weight that the dtype cannot hold stays as it is."""
    torch.manual_seed(0)
    of = staged(Net())
    with torch.no_grad():
        next(of.model.parameters()).view(-1)[0] = 1e5
    found = parity(of.convert(dtype=dtype))
    before = {n: p.detach().clone() for n, p in of.model.named_parameters()}
    rounded = copy.deepcopy(of.model)
    for parameter in rounded.parameters():
        wide = parameter.data.to(dtype).float()
        parameter.data = torch.where(wide.isinf(), parameter.data, wide)
    want, have = by_hand(of.model), by_hand(rounded)
    pairs = [(want[n], have[n]) for n in want if want[n] is not None]
    size = torch.stack([w.norm() for w, _ in pairs]).norm()
    apart = torch.stack([(h - w).norm() for w, h in pairs]).norm()
    assert found.rounded_rel_l2 == pytest.approx(float(apart / size), rel=1e-9)
    assert found.rounded_rel_l2 > 0
    assert_same_bits(before, dict(of.model.named_parameters()))


@both_dtypes
def test_autocasts_rules_give_autocasts_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    found = parity(staged(model).convert("autocast", dtype), scale=2.0**8)
    native = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype):
        outputs = native(X)
    (F.mse_loss(outputs.float(), Y) * 2**8).backward()
    want = by_hand(copy.deepcopy(model))
    for row, parameter in zip(found.parameters, native.parameters(), strict=True):
        reference = want[row.name]
        assert parameter.grad is not None
        assert reference is not None
        error = (parameter.grad.double() / 2**8 - reference).norm() / reference.norm()
        assert row.rel_l2 == pytest.approx(float(error), rel=1e-9)


def test_parameters_without_a_part_in_it() -> None:
    found = parity(net().convert())
    names = {row.name for row in found.parameters}
    assert found.without_gradient == ("unused",)
    assert not names & {"unused", "frozen"}
    assert "" in {row.layer for row in found.layers}  # its gelu and its product
    (own,) = [row for row in found.layers if row.layer == ""]
    assert (own.elements, own.rel_l2, own.cosine, own.zeroed_share) == (0, None, None, None)
    assert own.grad_underflow_fraction == 0


@pytest.mark.slow
def test_a_shared_parameter_counts_once() -> None:
    found = of_zoo("gpt2", scale=SCALE)
    model, _, _ = example("gpt2")
    assert [row.name for row in found.parameters] == [n for n, _ in model.named_parameters()]
    assert found.total.elements == sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in {row.name for row in found.parameters}
    assert "lm_head" in {row.layer for row in found.layers}  # by its activations


@pytest.mark.slow
@both_dtypes
def test_both_models_draw_the_same_random_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    found = parity(staged(model).convert(dtype=dtype))
    assert found.same_random_numbers
    assert found.total.rel_l2 < 0.02  # with other masks about 1


# --- underflow and overflow ----------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_small_gradients_vanish_without_a_scale(name: str) -> None:
    without, scaled = of_zoo(name, 1e-6), of_zoo(name, 1e-6, scale=SCALE)
    assert without.total.zeroed_share > 0.5
    assert without.total.rel_l2 > 0.3
    assert scaled.total.zeroed_share < 0.03
    assert scaled.total.rel_l2 < 0.02
    kept = of_zoo(name, 1e-6, dtype=torch.bfloat16)
    assert kept.total.zeroed_share < 0.001  # but for sums that cancel: BF16 has FP32's exponents
    # What it says of FP32 is the same with every scale.
    assert without.weight_range.histogram == scaled.weight_range.histogram
    assert without.activation_range.histogram == scaled.activation_range.histogram
    assert without.recommended == scaled.recommended
    assert scaled.weight_range.scaled_underflow_fraction < 0.05
    assert without.weight_range.underflow_fraction > 0.5
    assert without.activation_range.subnormal_fraction > 0.99


def test_the_recommended_scale_keeps_what_there_is() -> None:
    scale = of_zoo("gpt2", 1e-6).recommended.scale
    assert scale is not None
    assert scale > SCALE
    found = of_zoo("gpt2", 1e-6, scale=scale)
    assert found.total.nonfinite == 0
    assert found.total.zeroed_share < 0.001
    assert found.recommended.lost_without > 0.9
    assert found.recommended.lost_with < 0.001
    assert found.recommended.lost_with == _lost(found, scaled=True)
    assert found.recommended.lost_without == _lost(found, scaled=False)


def _lost(found: GradientParity, *, scaled: bool) -> float:
    """The share over weights and activations, from the shares of each."""
    name = "scaled_underflow_fraction" if scaled else "underflow_fraction"
    ranges = (found.weight_range, found.activation_range)
    sizes = [sum(r.histogram.counts.values()) for r in ranges]
    lost = [getattr(r, name) * size for r, size in zip(ranges, sizes, strict=True)]
    return round(sum(lost)) / sum(sizes)


def test_overflow_is_counted_and_within_no_tolerance() -> None:
    of = net()
    found = parity(of.convert(), scale=2.0**40)
    have = by_hand(of.convert(), 2.0**40)
    for row in found.parameters:
        gradient = have[row.name]
        assert gradient is not None
        assert row.nonfinite == int((~gradient.isfinite()).sum())
        if row.nonfinite:
            assert not row.rel_l2 < math.inf
            assert math.isnan(row.cosine)
            assert not row.max_abs_err < math.inf
    assert found.total.nonfinite == sum(row.nonfinite for row in found.parameters) > 0
    assert found.total.nonfinite == sum(row.nonfinite for row in found.layers)
    assert not found.total.rel_l2 < math.inf
    assert "gradients are not finite in the mixed model, at a loss scale of" in found.faults[0]
    assert found.recommended.scale < 2.0**40


def test_a_gradient_in_one_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    of = net()
    mixed = of.convert("fp32")

    def without_last(self: ConvertedModel, x: torch.Tensor) -> torch.Tensor:
        net: Any = self.captured.model
        h = F.gelu(net.norm(net.first(x)))
        return F.linear(net.drop(h), net.last.weight.detach(), net.last.bias) + net.unused

    monkeypatch.setattr(type(mixed), "forward", without_last)
    found = parity(mixed)
    assert (found.only_fp32, found.only_mixed) == (("last.weight",), ("unused",))
    assert "last.weight has a gradient in the FP32 model only" in found.faults
    assert "unused has a gradient in the mixed model only" in found.faults
    rows = {row.name: row for row in found.parameters}
    for row in (rows["last.weight"], rows["unused"], found.total):
        assert math.isnan(row.rel_l2)
        assert math.isnan(row.max_abs_err)
    assert rows["last.weight"].zeroed_share == 1
    assert found.without_gradient == ()


def test_a_mixed_loss_without_gradients_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = net().convert("fp32")
    monkeypatch.setattr(type(mixed), "forward", lambda self, x: torch.zeros(6, 4))
    found = parity(mixed)
    assert len(found.only_fp32) == len(found.parameters) == 6
    assert not found.same_random_numbers
    assert not found.same_random_numbers
    assert gradient_remarks(found)[0] == (
        "the mixed model drew other random numbers than the FP32 model"
    )
    assert math.isnan(found.total.rel_l2)
