"""Gradient parity at one step, against eager PyTorch, autocast, and figures worked out by hand."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.report.sections.gradient_summary import gradient_remarks
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.validate.training.gradient_results import GradientParity
from tests.small_models import example as small
from tests.staged import Staged
from tests.validate.training.test_gradient_step import REAL, Branching, Net
from tests.zoo import assert_same_bits, both_dtypes, converted, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)
Y = torch.linspace(1, -1, 24).reshape(6, 4)
SCALE = 2.0**16


def staged(model: nn.Module, *args: Any) -> Staged:
    return Staged.of(model, *(args or (X,)))


@functools.cache
def net() -> Staged:
    """For tests that change nothing in it."""
    torch.manual_seed(0)
    return staged(Net())


def parity(mixed: ConvertedModel, loss: Any = F.mse_loss, **options: Any) -> GradientParity:
    torch.manual_seed(3)
    return compare_gradients(mixed, (X,), {}, Y, loss, **options)


def of_zoo(name: str, factor: float = 1.0, **options: Any) -> GradientParity:
    """The parity of a shared model on its example inputs, with the loss times `factor`."""
    scale = options.pop("scale", 1.0)
    _, args, kwargs = example(name)

    def loss(outputs: Any, target: Any) -> torch.Tensor:
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
        labels = torch.arange(logits[..., 0].numel()) % 5
        return F.cross_entropy(logits.flatten(0, -2), labels) * factor

    mixed = converted(name, **options)
    with mode(mixed.captured.model):
        return compare_gradients(mixed, args, kwargs, None, loss, scale=scale)


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


# --- ranges --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranges_worked_out_by_hand() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).relu()

    of = staged(Scale(), torch.tensor([[1.0, 2.0, -1.0, 4.0], [0.0, 2.0, 1.0, 1.0]]))
    # With a loss of sum(out · target), the gradient of the output is the target, that of the
    # product is the target where the product is positive, that of the weight its sum over x.
    target = torch.tensor([[1.0, 2.0**-24, 3.0, 2.0**-30], [1.0, 2.0**-15, 0.0, 2.0**-28]])
    found = compare_gradients(
        of.convert("fp32"), of.args, {}, target, lambda out, t: (out * t).sum(), scale=2.0**6
    )
    relu, product = (
        {0: 2, -24: 1, 1: 1, -30: 1, -15: 1, -28: 1},
        {0: 1, -24: 1, -30: 1, -15: 1, -28: 1},
    )
    rows = {row.op: row for row in found.activations}
    assert set(rows) == {"aten.mul.Tensor", "aten.relu.default"}
    assert rows["aten.relu.default"].abs_max == 3
    assert rows["aten.relu.default"].grad_underflow_fraction == 2 / 7
    assert rows["aten.relu.default"].scaled_grad_underflow_fraction == 0
    assert rows["aten.mul.Tensor"].grad_underflow_fraction == 2 / 5
    activations = found.activation_range
    assert dict(activations.histogram.counts) == {
        e: relu[e] + product.get(e, 0) for e in sorted(relu)
    }
    assert (activations.histogram.elements, activations.histogram.zeros) == (16, 4)
    assert activations.underflow_fraction == 4 / 12
    assert activations.subnormal_fraction == 8 / 12
    assert activations.scaled_underflow_fraction == 0
    assert activations.scaled_subnormal_fraction == 6 / 12
    # weight: 1·1; 2·2**-24 + 2·2**-15; 0; 4·2**-30 + 2**-28 = 2**-27
    assert dict(found.weight_range.histogram.counts) == {-27: 1, -14: 1, 0: 1}
    assert found.weight_range.underflow_fraction == 1 / 3
    assert found.recommended.scale == 2.0**13  # 3 · 2 · 2**13 = 49152
    assert found.recommended.lost_without == 5 / 15
    assert found.layers[0].grad_underflow_fraction == 4 / 12


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(-20, 20))
def test_a_factor_of_the_loss_moves_the_histograms(power: int) -> None:
    of = small("block")

    def ranges(factor: float) -> list[Any]:
        found = compare_gradients(
            of.convert("fp32"), of.args, {}, None, lambda out, _: (out**2).sum() * factor
        )
        return [found.weight_range.histogram, found.activation_range.histogram]

    for plain, moved in zip(ranges(1.0), ranges(2.0**power), strict=True):
        assert dict(moved.counts) == {e + power: n for e, n in plain.counts.items()}
        assert plain.zeros + plain.nonfinite + sum(plain.counts.values()) == plain.elements
        assert moved.abs_max == plain.abs_max * 2.0**power


def test_without_any_gradient_there_is_no_scale() -> None:
    found = parity(net().convert(), lambda out, t: (out * 0).sum())
    assert found.recommended.scale is None
    assert found.recommended.reason == "every gradient is zero"
    assert found.total.zeroed_share is None
    assert found.total.rel_l2 == 0
    assert found.weight_range.underflow_fraction is None


def test_a_layers_share_is_that_of_its_nodes() -> None:
    found = of_zoo("gpt2", 1e-3)
    sums: dict[str, list[float]] = {}
    for row in found.activations:
        total = sums.setdefault(row.layer, [0.0, 0.0])
        if row.grad_underflow_fraction is not None:
            total[0] += row.elements
            total[1] += row.elements * row.grad_underflow_fraction
    shares = {row.layer: row.grad_underflow_fraction for row in found.layers}
    assert set(sums) <= set(shares)
    for layer, (elements, lost) in sums.items():
        if elements:  # nearly: elements that are zero do not count
            assert shares[layer] == pytest.approx(lost / elements, abs=0.1), layer


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_parts() -> None:
    torch.manual_seed(0)
    of = staged(Branching())
    found = parity(of.convert(), scale=SCALE)
    assert found.reference_rel_l2 == 0
    assert 0 < found.total.rel_l2 < 0.01
    assert [row.name for row in found.parameters] == [n for n, _ in of.model.named_parameters()]
    assert {row.layer for row in found.activations} == {"first", "middle", "last"}
    assert parity(of.convert("fp32")).total.rel_l2 == 0


@pytest.mark.slow
def test_a_reference_that_is_not_the_model_is_noticed() -> None:
    torch.manual_seed(0)
    of = staged(Net())
    of.model.get_submodule("drop").p = 0.25  # type: ignore[assignment]
    assert parity(of.convert("fp32")).reference_rel_l2 > 0.1


def test_nothing_is_left_behind() -> None:
    of = net()
    mixed = of.convert()
    before = copy.deepcopy(dict(of.model.state_dict()))
    parity(mixed)  # seeds; so the state to compare with is the one after a second seeding
    torch.manual_seed(3)
    state = torch.get_rng_state()
    parity(mixed, scale=SCALE)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits(before, dict(of.model.state_dict()))
    assert all(p.grad is None for p in of.model.parameters())


def test_the_result_is_plain_data() -> None:
    found = parity(net().convert(), scale=SCALE)
    data = json.loads(json.dumps(asdict(found)))
    assert data["scale"] == 65536
    assert data["weight_range"]["histogram"]["elements"] == found.total.elements
    assert found == parity(net().convert(), scale=SCALE)


def test_what_is_wrong_is_said_before_any_mixed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = net().convert()
    monkeypatch.setattr(type(mixed), "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ModelError, match="the FP32 model itself has a loss of nan"):
        parity(mixed, lambda out, t: out.sum() * math.nan, path="/somewhere/model.py")
    with pytest.raises(UsageError, match="a loss scale of 1000 is not a power of two"):
        parity(mixed, scale=1000)


def test_a_loss_that_refuses_what_the_mixed_model_gives() -> None:
    calls = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(out.dtype)
        if len(calls) == 5:
            raise ValueError("not in [0, 1]")
        return F.mse_loss(out, target)

    with pytest.raises(ModelError, match="given the outputs of the mixed model, raised ValueError"):
        parity(net().convert(), loss)
    assert calls == [torch.float32] * 5


@pytest.mark.parametrize(("call", "lacking"), [(3, "rounded_rel_l2"), (4, "noise_rel_l2")])
def test_a_loss_that_refuses_other_weights_costs_that_figure_only(call: int, lacking: str) -> None:
    calls = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(out.dtype)
        if len(calls) == call:
            raise ValueError("not in [0, 1]")
        return F.mse_loss(out, target)

    def without(found: GradientParity) -> GradientParity:
        layers = tuple(replace(layer, **{lacking: None}) for layer in found.layers)
        own = {"rounded_rel_l2": None} if lacking == "rounded_rel_l2" else {}
        return replace(found, layers=layers, **own)

    found, usual = parity(net().convert(), loss), parity(net().convert())
    assert found == without(usual) != usual
