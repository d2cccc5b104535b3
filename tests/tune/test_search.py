"""The integer programme, held against trying every set."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amp_convert.tune.results import Border, Cost, Unit
from amp_convert.tune.search import cheapest
from amp_convert.tune.tuning import Scores


def unit(name: str, error: float, price: float) -> Unit:
    return Unit(name, (f"{name}/op#0",), error, price, 1)


errors = st.floats(1e-6, 1.0)
prices = st.floats(-0.2, 1.0)


@st.composite
def problems(draw: st.DrawFn) -> Scores:
    """Up to eight units in a row, some of which skip."""
    count = draw(st.integers(1, 8))
    units = tuple(unit(f"u{i}", draw(errors), draw(prices)) for i in range(count))
    pairs = [(i, i + 1) for i in range(count - 1)]
    pairs += [(i, i + 2) for i in range(count - 2) if draw(st.booleans())]
    borders = tuple(
        Border(f"u{i}", f"u{j}", draw(st.floats(0, 0.3)), draw(st.floats(0, 0.5))) for i, j in pairs
    )
    return Scores(units, borders, Cost.MEASURED)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.0, 1.2))
def test_it_is_as_cheap_as_the_best_of_all_sets(scores: Scores, share: float) -> None:
    bound = share * scores.predicted(frozenset())
    names = [each.name for each in scores.units]
    sets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    fitting = [s for kept in sets if scores.predicted(s := frozenset(kept)) <= bound]
    best = min(map(scores.price, fitting))
    found = cheapest(scores.units, scores.borders, bound)
    assert found is not None
    assert scores.predicted(found) <= bound * (1 + 1e-4) + 1e-9
    spread = sum(abs(each.price) for each in scores.units) + 1e-9
    assert scores.price(found) <= best + 0.05 * max(abs(best), 0.01 * spread) + 1e-6


def test_the_ends_are_nothing_and_everything() -> None:
    units = tuple(unit(f"u{i}", 0.1 * (i + 1), 1.0) for i in range(4))
    assert cheapest(units, (), 10.0) == frozenset()
    assert cheapest(units, (), 0.0) == {"u0", "u1", "u2", "u3"}
    assert cheapest((), (), 0.0) == frozenset()


def test_what_overflows_stays_fp32_whatever_the_bound() -> None:
    units = (unit("a", math.inf, 5.0), unit("b", 0.1, 1.0))
    assert cheapest(units, (), 1.0) == {"a"}


def test_a_border_is_worth_a_layer_that_alone_is_not() -> None:
    """b is free of error, but low between two FP32 layers it would cost two casts."""
    units = (unit("a", 0.5, 1.0), unit("b", 0.0, 0.1), unit("c", 0.5, 1.0))
    borders = (Border("a", "b", 1.0, 0.0), Border("b", "c", 1.0, 0.0))
    assert cheapest(units, borders, 0.1) == {"a", "b", "c"}
    assert cheapest(units, (), 0.1) == {"a", "c"}


@pytest.mark.parametrize(("error", "kept"), [(0.0, {"a"}), (0.4, {"a", "b"})])
def test_a_cast_on_the_way_down_rounds_what_was_gained(error: float, kept: set[str]) -> None:
    units = (unit("a", 0.5, 1.0), unit("b", 0.01, 1.0))
    assert cheapest(units, (Border("a", "b", 0.0, error),), 0.1) == kept
