"""The library's functions, called as a program calls them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert
import amp_convert as amp
from amp_convert.core.errors import AmpConvertError, ModelError, UnsupportedModelError, UsageError
from amp_convert.plan.plan import Decision
from amp_convert.profile.rounding_trials import Trials
from amp_convert.rules.load import load_rules
from tests.bits import assert_same_bits

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: Any = None) -> torch.Tensor:
        y = self.last(self.first(x).softmax(-1)) * scale
        return y if shift is None else y + shift


def net() -> Net:
    return Net().eval()


# --- names ---------------------------------------------------------------------------------------


def test_the_error_budget_is_of_the_batch_that_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    mixed = amp.convert(model, torch.randn(2, 8), train=False)
    found = amp.error_budget(mixed, torch.randn(12, 8), vectors=4, seed=1)
    assert (found.samples, found.vectors, found.seed) == (12, 4, 1)
    assert {row.layer for row in found.layers()} == {"0", "2"}
    with pytest.raises(amp.ModelError, match="gives a list"):
        amp.error_budget(mixed, [torch.randn(2, 8)])


def test_public_names_are_what_they_say() -> None:
    """Also once every module of the package was imported: a module must not hide a function."""
    for module in pkgutil.iter_modules(amp_convert.__path__):
        if not module.name.startswith("__"):
            importlib.import_module(f"amp_convert.{module.name}")
    for name in ("convert", "compare", "audit"):
        assert callable(getattr(amp, name))
        assert getattr(amp, name).__module__ == "amp_convert.api"
    for name in amp.__all__:
        assert getattr(amp, name) is not None
    assert set(amp.__all__) <= set(dir(amp))
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = amp.frobnicate


# --- convert -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (X, None),
        ((X,), None),
        ({"x": X}, None),
        ((X, 1.0), None),
        (X, {"scale": 1.0, "shift": None}),
        ((), {"x": X}),
    ],
)
def test_every_form_of_example_inputs(args: Any, kwargs: Any) -> None:
    model = net()
    mixed = amp.convert(model, args, kwargs)
    torch.testing.assert_close(mixed(X), model(X), rtol=1e-2, atol=1e-2)
    assert isinstance(mixed, amp.ConvertedModel)


@pytest.mark.slow
def test_keywords_that_were_given_are_used() -> None:
    model, shift = net(), torch.ones(2)
    mixed = amp.convert(model, X, {"scale": 2.0, "shift": shift}, rules="fp32")
    assert_same_bits(model(X, 2.0, shift=shift), mixed(X, 2.0, shift=shift))


@pytest.mark.slow
def test_float16_and_default_rules_are_the_default() -> None:
    plan = amp.convert(net(), X).plan
    assert (plan.dtype, plan.rules, plan.device) == ("float16", ("default.toml",), "cpu")
    assert amp.convert(net(), X, dtype=torch.bfloat16).plan.dtype == "bfloat16"


@pytest.mark.slow
def test_every_form_of_rules(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'extends = "default"\n[[rule]]\nlayer = "last"\ncategory = "deny"\nreason = "mine"\n'
    )
    plans = [
        amp.convert(net(), X, rules=rules).plan
        for rules in (file, str(file), [file], ["default", file], load_rules([str(file)]))
    ]
    for plan in plans:
        [last] = [d for d in plan.eval if d.layer == "last"]
        assert (last.dtype, last.category, last.reason) == ("float32", "deny", "mine")
        assert last.source.startswith("mine.toml:")
        [first] = [d for d in plan.eval if d.layer == "first"]
        assert first.low


@pytest.mark.slow
def test_calibration_moves_the_guards() -> None:
    """The example fits FP16; one of the batches that the model will see does not."""
    assert [d.low for d in amp.convert(net(), X).plan.eval if d.layer == "first"] == [True]
    batches = [X, (X * 1e6,), {"x": X}]
    plan = amp.convert(net(), X, calibration=iter(batches)).plan
    [first] = [d for d in plan.eval if d.layer == "first"]
    assert plan.calibration_batches == 3
    assert not first.low
    assert first.rule == "guard activation-range"
    assert "3 batches" in first.evidence


@pytest.mark.slow
def test_for_inference_alone_there_is_no_training_graph() -> None:
    model = net()
    both, mixed = amp.convert(model, X), amp.convert(model, X, train=False)
    assert (mixed.plan.eval, mixed.plan.train) == (both.plan.eval, ())
    assert_same_bits(both(X), mixed(X))
    assert [(f.mode, f.status) for f in mixed.captured.fidelity] == [
        ("eval", "identical"),
        ("train", "unchecked"),
    ]
    mixed.train()
    with pytest.raises(UnsupportedModelError, match="training was not asked for"):
        mixed(X)


@pytest.mark.slow
def test_parts_for_inference_alone_have_no_training_graphs() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    mixed = amp.convert(Branching().eval(), X, train=False)
    assert [(r.path, list(r.graphs)) for r in mixed.captured.regions] == [("inner", ["eval"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"{dtype} is not a low dtype") as caught:
        amp.convert(net(), X, dtype=dtype)
    assert "torch.float16 or torch.bfloat16" in caught.value.mend


WRONG_INPUTS = {
    "a list": ([X], None, "gives a list"),
    "a number": (3, None, "args gives"),
    "too many": ((X, 1.0, 2.0), None, "too many positional arguments"),
    "unknown keyword": (X, {"y": 1}, "unexpected keyword argument 'y'"),
    "missing": ((), None, "missing a required argument: 'x'"),
    "another shape": (torch.ones(4, 9), None, "cannot be multiplied"),
    "another dtype": (X.long(), None, "dtype"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_inputs_that_the_model_refuses(case: str) -> None:
    args, kwargs, message = WRONG_INPUTS[case]
    with pytest.raises(ModelError, match=message) as caught:
        amp.convert(net(), args, kwargs)
    assert caught.value.exit_code == 2
    assert caught.value.mend


@pytest.mark.parametrize("calibration", [[[X]], [torch.ones(4, 9)], [{"y": X}]])
def test_calibration_batches_that_do_not_fit(calibration: Any) -> None:
    with pytest.raises(ModelError):
        amp.convert(net(), X, calibration=calibration)


@pytest.mark.parametrize(
    ("rules", "message"), [("defualt", "default"), (["default", "nothing.toml"], "nothing.toml")]
)
def test_rules_that_are_not_there(rules: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        amp.convert(net(), X, rules=rules)


@pytest.mark.parametrize("function", [amp.convert, amp.audit, amp.check])
def test_inputs_that_are_given_one_by_one(function: Any) -> None:
    with pytest.raises(UsageError, match="kwargs is a Tensor, no mapping") as caught:
        function(net(), X, X)
    assert "one tuple" in str(caught.value.mend)


# --- plan, audit, compare ------------------------------------------------------------------------


def test_the_plan_as_a_table() -> None:
    mixed = amp.convert(net(), X)
    for mode, decisions in (("eval", mixed.plan.eval), ("train", mixed.plan.train)):
        frame = mixed.plan.to_frame(mode)
        assert set(frame.columns) > {*Decision.__dataclass_fields__, "low", "input_dtypes"}
        assert list(frame["node"]) == [d.node for d in decisions]
        assert list(frame["low"]) == [d.low for d in decisions]
    assert {"rule", "reason", "evidence"} <= set(mixed.plan.to_frame().columns)


@pytest.mark.slow
def test_audit_is_the_plan_that_convert_would_follow() -> None:
    model = net()
    audit = amp.audit(model, X)
    assert audit.plan == amp.convert(model, X).plan
    frame = audit.to_frame()
    assert len(frame) == len(audit.rows()) > 0
    kept = {(d.layer, d.rule) for d in audit.plan.eval if d.decided and not d.low}
    assert {(row.layer, row.rule) for row in audit.rows()} == kept
    assert frame["ops"].str.fullmatch(r"[\w.]+ \(\d+\)(, [\w.]+ \(\d+\))*").all()
    everything = amp.audit(model, X, rules="fp32")
    assert {d.dtype for d in everything.plan.eval} == {"float32"}
    assert {row.layer for row in everything.rows()} == {"", "first", "last"}


@pytest.mark.parametrize("form", [X, (X,), {"x": X}, (X, 1.0)])
def test_compare_takes_every_form_of_batch(form: Any) -> None:
    model = net()
    divergence = amp.compare(model, amp.convert(model, X), [form, form])
    assert (divergence.batches, divergence.samples) == (2, 8)
    assert 0 < divergence.outputs[0].rel_l2 < 1e-2
    frame = divergence.to_frame()
    assert list(frame["node"]) == [row.node for row in divergence.nodes]
    assert {"local_rel_l2", "accumulated_rel_l2", "max_ulp"} <= set(frame.columns)


def test_compare_refuses_what_cannot_be_compared() -> None:
    model = net()
    mixed = amp.convert(model, X)
    with pytest.raises(UsageError, match="do not belong together"):
        amp.compare(net(), mixed, [X])
    with pytest.raises(UsageError, match="no batches"):
        amp.compare(model, mixed, [])
    with pytest.raises(ModelError, match="gives a list"):
        amp.compare(model, mixed, [[X]])
    with pytest.raises(AmpConvertError, match="has shape"):
        amp.compare(model, mixed, [torch.ones(4, 9)])


@pytest.mark.slow
def test_the_whole_use_as_the_documentation_shows_it() -> None:
    model = net()
    mixed = amp.convert(model, X, dtype=torch.float16)
    assert not mixed.plan.to_frame().empty
    assert not amp.compare(model, mixed, [X]).to_frame().empty
    frozen = mixed.freeze()
    with torch.no_grad():
        assert_same_bits(mixed(X), frozen(X))
    assert not amp.audit(model, X).to_frame().empty


@pytest.mark.slow
def test_roundings_are_tried_only_where_a_rule_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    of = Trials.of
    monkeypatch.setattr(Trials, "of", lambda self, *rest: tried.append("") or of(self, *rest))
    for rules in ("fp32", "autocast", "half"):
        amp.convert(net(), X, rules=rules)
    assert not tried
    amp.convert(net(), X)
    assert tried
