"""The table of operators against PyTorch's own registry and database of operators."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.core import op_facts
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.core.op_facts import KNOWN, Family, canonical, facts_of, op_name, with_overload
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rules.load import load_rules
from tests.op_samples import database

NAMES = {
    full.removeprefix("aten::").partition(".")[0]
    for full in torch._C._dispatch_get_all_op_names()
    if full.startswith("aten::")
}

# A name that PyTorch lists beside another one is the same function with other overloads, or
# another overload only.
BINARY = {"max": "maximum", "min": "minimum"}


def test_every_name_in_the_table_is_an_operator() -> None:
    tables = (op_facts._ALIASES, op_facts._VARIANTS, op_facts._OVERLOADS)
    words = [w for table in tables for k, v in table.items() for w in (k.split(".")[0], *v.split())]
    assert {*words, *(facts.name.removeprefix("aten.") for facts in KNOWN)} <= NAMES


def test_no_name_has_two_meanings() -> None:
    folded = [*op_facts._split(op_facts._ALIASES), *op_facts._split(op_facts._VARIANTS)]
    assert len(folded) == len(set(folded))
    mains = {*op_facts._ALIASES, *op_facts._VARIANTS}
    assert mains.isdisjoint(folded)
    assert all(facts.name.removeprefix("aten.") not in folded for facts in KNOWN)


def test_all_aliases_of_pytorchs_own_database_fold() -> None:
    listed = {(info.aten_name, alias.name) for info in database() for alias in info.aliases}
    assert len(listed) > 50
    for name, alias in sorted(listed):
        other = alias.removeprefix("torch.").replace("nn.functional.", "").replace(".", "_")
        if BINARY.get(name) == other:
            assert canonical(f"aten.{name}.other") == f"aten.{other}"
        elif other in NAMES:
            assert canonical(f"aten.{other}") == canonical(f"aten.{name}"), (name, other)


def test_forms_fold() -> None:
    assert canonical("aten.clamp_.Tensor") == canonical("aten.clip.out") == "aten.clamp"
    assert canonical("aten.view_copy.dtype") == "aten.view"
    assert canonical("aten.index_copy.default") == "aten.index_copy"
    assert canonical("aten.__and__.Tensor") == "aten.bitwise_and"
    assert canonical("aten.max.dim") == "aten.max"
    assert canonical("mylib.scan_.default") == "mylib.scan_"
    assert with_overload("aten.divide_.Tensor_mode") == "aten.div.Tensor_mode"
    assert with_overload("aten.pow.Tensor_Scalar_out") == "aten.pow.Tensor_Scalar"
    assert with_overload("aten.add.out") == with_overload("aten.add") == "aten.add"
    assert op_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"


def test_variants_have_the_facts_and_keep_their_name() -> None:
    assert canonical("aten._softmax.default") == "aten._softmax"
    assert facts_of("aten._softmax.default") == facts_of("aten.special_softmax.int")
    assert facts_of("aten._native_batch_norm_legit.no_stats").is_a(Family.BATCH_NORM)
    assert facts_of("aten.view").is_a(Family.SHAPE)


def test_of_an_unknown_operator_nothing_is_claimed() -> None:
    assert facts_of("mylib.scan.default") == op_facts.OpFacts("mylib.scan")
    assert not facts_of("aten.nextafter").families


def test_arguments_are_those_of_the_schemas() -> None:
    for facts in KNOWN:
        packet = getattr(torch.ops.aten, facts.name.removeprefix("aten."))
        names = {a.name for o in packet.overloads() for a in getattr(packet, o)._schema.arguments}
        told = (facts.singular, facts.lower_bound, facts.factor, facts.contracted)
        assert {name for name in told if name} <= names, facts.name
        assert set(facts.weights or ()) <= names, facts.name


def test_torch_is_not_imported() -> None:
    code = "import sys, amp_convert.core.op_facts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the same function by another name gets the same plan ----------------------------------------

X = torch.linspace(-2, 2, 48).reshape(3, 16)


class Net(nn.Module):
    """`function` between two linear layers."""

    def __init__(self, function: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = nn.Linear(16, 16), nn.LazyLinear(4)
        self(X)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        y = eval(self.function, {"torch": torch, "h": h})
        return self.last(y)


SAME = [
    ("h / torch.clamp(h.abs(), min=1e-9)", "h / torch.clip(h.abs(), min=1e-9)"),
    ("h / torch.clamp(h.abs(), min=1e-9)", "torch.true_divide(h, h.abs().clamp(min=1e-9))"),
    ("h / torch.clamp(h.abs(), min=1e-9)", "torch.divide(h, h.absolute().clip(1e-9))"),
    ("h / torch.clamp(h.abs(), min=1e-9)", "torch.div(h, h.abs().clamp_(min=1e-9))"),
    ("h / torch.clamp(h.abs(), min=1e-9)", "h.clone().div_(torch.clamp(h.abs(), min=1e-9))"),
    ("h.detach().abs().log()", "torch.log(h.detach().abs(), out=torch.empty(3, 16))"),
    ("h / torch.maximum(h.abs(), torch.tensor(1e-9))", "h / h.abs().max(torch.tensor(1e-9))"),
    ("torch.cat([h, h], 1).exp()", "torch.concat([h, h], 1).exp()"),
    ("torch.cat([h, h], 1).exp()", "torch.concatenate([h, h], 1).exp()"),
    ("torch.cat([h, h], 1).exp()", "torch.hstack([h, h]).exp()"),
    ("torch.vstack([h, h]).sum(0)", "torch.row_stack([h, h]).sum(0)"),
    ("(-h).exp()", "torch.negative(h).exp()"),
    ("(-h).exp()", "h.clone().neg_().exp()"),
    ("h.repeat(1, 2).exp()", "h.tile(1, 2).exp()"),
    ("h * 2", "torch.multiply(h, 2)"),
    ("h - 2", "torch.subtract(h, 2)"),
    ("torch.exp2(h)", "torch.special.exp2(h)"),
    ("torch.expm1(h)", "torch.special.expm1(h)"),
    ("torch.sigmoid(h)", "torch.special.expit(h)"),
    ("torch.softmax(h * 90, 1)", "torch.special.softmax(h * 90, 1)"),
    ("torch.log_softmax(h, 1)", "torch.special.log_softmax(h, 1)"),
    ("h @ h.transpose(0, 1)", "torch.linalg.matmul(h, h.swapaxes(0, 1))"),
    ("h @ h.transpose(0, 1)", "torch.linalg.matmul(h, h.swapdims(0, 1))"),
    ("h.movedim(0, 1).t()", "h.moveaxis(0, 1).t()"),
    ("h.trunc()", "h.fix()"),
    ("h.round()", "torch.special.round(h)"),
    ("h.acos()", "h.arccos()"),
    ("torch.outer(h[0], h[0])", "torch.ger(h[0], h[0])"),
    ("torch.atan2(h, h + 3)", "torch.arctan2(h, h + 3)"),
    ("h.reshape(-1)[torch.arange(48)].reshape(3, 16)", "h.take(torch.arange(48)).reshape(3, 16)"),
]


@functools.cache
def captured(function: str) -> tuple[Captured, RangeStats]:
    """What both dtypes, and every other name for the function, share."""
    found = capture(Net(function).eval(), (X,), {}, train=False)
    return found, profile(found, [((X,), {})])


def plan_of(function: str, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Dtype, reason and rewrite of each node that computes: the same values may be moved in another
    number of steps."""
    found, stats = captured(function)
    decisions = convert_captured(found, load_rules(["default"]), stats, dtype).plan.eval
    moving = {d.op for d in decisions if facts_of(d.op).moves} - {"aten.max"}  # of two, it computes
    computing = [d for d in decisions if d.decided and d.op not in moving]
    return [(d.dtype, d.reason, d.rewrite) for d in computing]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), SAME, ids=[other for _, other in SAME])
def test_another_name_gets_the_same_plan(one: str, other: str) -> None:
    for dtype in LOW_DTYPES:
        assert plan_of(other, dtype) == plan_of(one, dtype)


def test_a_clip_that_keeps_a_quotient_from_zero_is_guarded() -> None:
    """It gave NaN on a zero, since only `clamp` was known."""
    model = Net("h / torch.clip(h.abs(), min=1e-9)").eval()
    with torch.no_grad():
        model.first.weight.zero_(), model.first.bias.zero_()
    mixed = amp.convert(model, X, calibration=[X], train=False)
    assert mixed(X).isfinite().all()
