"""All guards together: their names, their limits, their order, and what holds for any site."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.plan.guards import ALL, Consumer, Operand, Site, first_finding
from amp_convert.plan.guards.activation_range import ActivationRange
from amp_convert.plan.guards.weight_range import WeightRange
from amp_convert.profile.calibrate import Range
from amp_convert.profile.growth import Growth
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import GuardLimits
from tests.plan.guards.helpers import INF, NAN, activation, reader, seen, site, weight
from tests.staged import BF16, F16

DEFAULT = Path(__file__).parents[3] / "rules" / "default.toml"
OFF = GuardLimits(**{field.name: False for field in fields(GuardLimits)})

# Each guard: its name, its limit, and a site on which it fires alone, or is not the only one.
FIRING: dict[str, tuple[str, Site]] = {
    "activation-range": ("activation_headroom", site("tanh", result=INF)),
    "probed-range": (
        "probe_headroom",
        site("tanh", result=Range(1.0, 1.0, probed=Range(1e5, 1e5))),
    ),
    "weight-range": ("weight_headroom", site("linear", operands=(weight(1e6),))),
    "weight-tiny": ("weight_tiny_share", site("linear", operands=(weight(1e-6, 1.0),))),
    "activation-floor": ("activation_floor", site("tanh", result=1e-6)),
    "constant": ("smallest_constant", site("mul", scalars={"other": 1e-8})),
    "epsilon": ("smallest_eps", site("div", operands=(Operand("other", None, eps=1e-8),))),
    "positions": ("position_error", site("mul", operands=(activation(4e3, integral=True),))),
    "angles": ("angle_error", site("sin", operands=(activation(1e3),))),
    "logits": ("logit_error", site("softmax", operands=(activation(1e3),))),
    "exp-sum": ("exp_growth", site("exp", operands=(activation(50.0),), feeds=(reader("sum"),))),
    "cancellation": ("cancellation_error", site("sub", result=1.0, operands=(activation(1e4),))),
    "cumulative": ("cumulative_length", site("cumsum", shape=(100,), axes=(0,))),
    "reduction-depth": (
        "reduction_depth",
        site("mm", operands=(Operand("self", None, (1, 10**6)),)),
    ),
    "rounding-growth": ("rounding_growth", site("batch_norm", growth=Growth(inputs=20.1))),
    "output-error": ("output_error", site("linear", growth=Growth(output=24.1))),
    "choice-error": ("choice_error", site("linear", growth=Growth(choices=4e-4))),
    "increment-loss": ("increment_loss", site("add", growth=Growth(lost=0.51))),
}


# --- names, limits, order ------------------------------------------------------------------------


def test_every_guard_has_a_name_of_its_own_and_a_place() -> None:
    assert [guard.name for guard in ALL] == list(FIRING)


def test_every_limit_belongs_to_one_guard() -> None:
    assert sorted(limit for limit, _ in FIRING.values()) == sorted(asdict(GuardLimits()))


def test_the_default_rules_name_every_limit_with_its_default() -> None:
    written = tomllib.loads(DEFAULT.read_text())["guards"]
    assert written == asdict(GuardLimits())
    assert list(written) == [field.name for field in fields(GuardLimits)]
    assert load_rules(["default"]).guards == GuardLimits()


@pytest.mark.parametrize("name", FIRING)
def test_a_guard_is_switched_off_by_its_own_limit_alone(name: str) -> None:
    limit, at = FIRING[name]
    found = first_finding(at, GuardLimits(), F16)
    assert found is not None
    assert (found.guard, bool(found.reason), bool(found.evidence)) == (name, True, True)
    assert first_finding(at, replace(GuardLimits(), **{limit: False}), F16) is None
    assert first_finding(at, replace(OFF, **{limit: getattr(GuardLimits(), limit)}), F16) == found


def heard(at: Site) -> list[str]:
    """Who speaks, who speaks once that one is switched off, and so on."""
    limits, names = GuardLimits(), []
    while (found := first_finding(at, limits, F16)) is not None:
        names.append(found.guard)
        limits = replace(limits, **{FIRING[found.guard][0]: False})
    return names


def test_the_first_guard_that_is_on_speaks() -> None:
    bad = (
        weight(NAN, 1.0),
        activation(1e-9, "other"),
        activation(-1e3),
        activation(4e3, integral=True),
    )
    sines = (reader("sin", operand=INF), reader("exp", operand=INF))
    at = site(
        "exp",
        result=seen(INF),
        operands=bad,
        feeds=(reader("sum", result=1.0), reader("sub", result=1.0)),
        reaches=sines,
    )
    assert heard(at) == [
        "activation-range",
        "weight-range",
        "weight-tiny",
        "activation-floor",
        "positions",
        "angles",
        "logits",
        "exp-sum",
        "cancellation",
    ]
    at = site(
        "add",
        scalars={"other": 1e-8},
        feeds=(reader("div", "other"), reader("add", result=1.0)),
        result=1e4,
    )
    assert heard(at) == ["constant", "epsilon", "cancellation"]
    at = site("cumsum", shape=(65,), result=INF)
    assert heard(at) == ["activation-range", "cumulative"]
    at = site("sum", operands=(Operand("self", Range(1e-6, 0.0), (10**6,)),))
    assert heard(at) == ["activation-floor", "reduction-depth"]


def test_a_site_of_which_nothing_is_known_may_be_low() -> None:
    assert heard(site("linear", batches=0)) == []


# --- any site ------------------------------------------------------------------------------------

OPS = ["add", "sub", "mul", "div", "exp", "sin", "softmax", "linear", "sum", "cumsum", "clamp"]
ARGUMENTS = st.sampled_from(["self", "other", "input", "weight"])
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
DTYPES = st.sampled_from([F16, BF16])
LIMITS = st.one_of(st.just(False), st.floats(1e-6, 1e6))


@st.composite
def ranges(draw: st.DrawFn) -> Range | None:
    value = draw(st.none() | NUMBERS)
    if value is None:
        return None
    return seen(value, tiny=draw(st.none() | st.floats(0, 1)), integral=draw(st.booleans()))


OPERANDS = st.builds(
    Operand,
    argument=ARGUMENTS,
    range=ranges(),
    shape=st.lists(st.integers(1, 10**6), max_size=3).map(tuple),
    weight=st.sampled_from(["", "encoder.weight"]),
    eps=st.none() | NUMBERS,
)
CONSUMERS = st.builds(
    Consumer, st.sampled_from(OPS).map("aten.{}".format), ARGUMENTS, ranges(), ranges()
)
SITES = st.builds(
    Site,
    op=st.sampled_from(OPS).map("aten.{}".format),
    result=ranges(),
    shape=st.lists(st.integers(1, 10**6), max_size=3).map(tuple),
    operands=st.lists(OPERANDS, max_size=3),
    scalars=st.dictionaries(st.sampled_from(["other", "min", "alpha"]), NUMBERS),
    feeds=st.lists(CONSUMERS, max_size=2),
    reaches=st.lists(CONSUMERS, max_size=2),
    batches=st.integers(0, 4),
)


@given(SITES, DTYPES)
def test_with_all_guards_off_nothing_is_found(at: Site, dtype: torch.dtype) -> None:
    assert first_finding(at, OFF, dtype) is None


@pytest.mark.slow
@given(SITES, st.builds(GuardLimits, *[LIMITS] * len(fields(GuardLimits))), DTYPES)
def test_the_first_finding_is_that_of_the_first_guard(
    at: Site, limits: GuardLimits, dtype: torch.dtype
) -> None:
    found = [guard.find(at, limits, dtype) for guard in ALL]
    first = next((f for f in found if f is not None), None)
    assert repr(first_finding(at, limits, dtype)) == repr(first)  # NaN is not equal to itself
    assert all(f is None or f.guard == g.name for f, g in zip(found, ALL, strict=True))


BAD = st.sampled_from([Range(NAN, NAN), Range(INF, INF), Range(INF, 0.0)])


@given(SITES, BAD, st.floats(1e-6, 1e6), DTYPES)
def test_nan_and_infinity_are_never_in_range(
    at: Site, bad: Range, headroom: float, dtype: torch.dtype
) -> None:
    """Wherever among the values that the node reads and makes."""
    limits = GuardLimits(activation_headroom=headroom, weight_headroom=headroom)
    assert ActivationRange().find(replace(at, result=bad), limits, dtype) is not None
    for index, operand in enumerate(at.operands):
        operands = [*at.operands]
        operands[index] = replace(operand, range=bad)
        guard = WeightRange() if operand.weight else ActivationRange()
        assert guard.find(replace(at, operands=operands), limits, dtype) is not None


@given(SITES, DTYPES)
def test_what_passes_the_range_guards_is_finite(at: Site, dtype: torch.dtype) -> None:
    if first_finding(at, GuardLimits(), dtype) is None:
        known = [at.result, *(operand.range for operand in at.operands)]
        assert all(math.isfinite(r.abs_max) for r in known if r is not None)
