"""Number arguments that do not survive the cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards.constants import Constants
from tests.plan.guards.helpers import (
    INF,
    LARGEST,
    LARGEST_BF16,
    NAN,
    SMALLEST,
    above,
    all_low,
    below,
    diagonal,
    error,
    fires,
    guarded,
    said,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = Constants()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "smallest", "dtype", "expected"),
    [
        (LARGEST, SMALLEST, F16, False),
        (above(LARGEST), SMALLEST, F16, True),
        (-above(LARGEST), SMALLEST, F16, True),
        (-1e9, SMALLEST, BF16, False),
        (LARGEST_BF16, SMALLEST, BF16, False),
        (-above(LARGEST_BF16), SMALLEST, BF16, True),
        (SMALLEST, SMALLEST, F16, False),
        (below(SMALLEST), SMALLEST, F16, True),
        (-below(SMALLEST), SMALLEST, F16, True),
        (0.5, 1.0, F16, True),
        (1e-30, SMALLEST, BF16, False),  # BF16 has FP32's exponents
        (0.0, SMALLEST, F16, False),
        (INF, SMALLEST, F16, False),  # what is infinite stays infinite
        (-INF, SMALLEST, BF16, False),
        (NAN, SMALLEST, F16, False),
        (1e9, False, F16, False),
        (1e-9, False, F16, False),
    ],
)
def test_constants_survive_the_cast(
    value: float, smallest: float, dtype: torch.dtype, expected: bool
) -> None:
    at = site("clamp", scalars={"min": 0.5, "max": value})
    assert fires(GUARD, at, dtype, smallest_constant=smallest) == (expected or smallest == 1.0)


def test_the_finding_names_the_constant() -> None:
    assert said(GUARD, site("masked_fill", scalars={"value": -1e9})) == (
        "constant",
        "its constant value is beyond the range of float16",
        "value = -1e+09",
    )
    assert said(GUARD, site("mul", scalars={"other": 1e-8})) == (
        "constant",
        "its constant other is too small for float16",
        "other = 1e-08",
    )
    assert said(GUARD, site("where", scalars={"self": -1e39}), BF16) == (
        "constant",
        "its constant self is beyond the range of bfloat16",
        "self = -1e+39",
    )


@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("layer_norm", "eps"),  # the kernel uses these in FP32
        ("scaled_dot_product_attention", "scale"),
        ("leaky_relu", "negative_slope"),
        ("add", "alpha"),
        ("index_fill", "dim"),
    ],
)
def test_numbers_that_meet_no_tensor_value_do_not_count(op: str, argument: str) -> None:
    assert not fires(GUARD, site(op, scalars={argument: 1e-8}))
    assert not fires(GUARD, site(op, scalars={argument: 1e9}))


def test_a_mask_may_be_far_down_and_not_far_up() -> None:
    """It is clamped."""
    assert not fires(GUARD, site("masked_fill", scalars={"value": -1e9}, masked=True))
    assert fires(GUARD, site("masked_fill", scalars={"value": 1e9}, masked=True))


# --- in a plan -----------------------------------------------------------------------------------


class Masked(nn.Module):
    """Attention scores, some of which are hidden before a softmax that its author wants in FP32."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.scores, self.last, self.hidden = diagonal(1.0), diagonal(1.0), hidden

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        scores = torch.where(visible, self.scores(x), self.hidden)
        return self.last(scores.float().softmax(-1))


VISIBLE, HIDDEN = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)


@pytest.fixture(scope="module")
def masked() -> Staged:
    """Calibration hides nothing, so no range guard sees the constant."""
    return Staged.of(Masked(-1e9), spread(2, 4), VISIBLE)


@pytest.mark.slow
def test_it_keeps_the_node_with_the_constant_in_fp32(masked: Staged) -> None:
    assert table(masked.plan()) == rows(
        """
        scores/linear#0 | allow | op linear      | f16 | low | f16 f16
        /where#0        | deny  | guard constant | f32 | -   | . f32
        /to#0           | deny  | explicit cast  | f32 | -   | .
        /softmax#0      | infer | op softmax     | f32 | -   | .
        last/linear#0   | allow | op linear      | f16 | low | f16 f16
        """
    )


@pytest.mark.slow
def test_bf16_and_tame_constants_do_not_fire(masked: Staged) -> None:
    assert guarded(masked.plan("default", BF16)) == {}
    assert guarded(Staged.of(Masked(-1e4), spread(2, 4), VISIBLE).plan()) == {}


def test_without_it_a_row_with_nothing_in_sight_is_nan(masked: Staged) -> None:
    """A softmax over nothing but -1e9 is uniform, over nothing but -inf it is NaN."""
    hidden = (spread(2, 4), HIDDEN)
    assert error(masked, "default", F16, *hidden) < 2e-3
    assert error(masked, rules_with(smallest_constant=False), F16, *hidden) == INF
    assert error(masked, rules_with(smallest_constant=False), BF16, *hidden) < 1e-2


class Clamped(nn.Module):
    """Two clamps, one with a bound that FP16 has not; all else is low."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.first, self.mid, self.last = diagonal(1.0), diagonal(1.0), diagonal(1.0)
        self.bound = bound

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mid(self.first(x).clamp(max=self.bound)).clamp(max=1.0))


@pytest.mark.slow
def test_without_it_the_kernel_refuses_and_takes_every_node_of_the_operator_along() -> None:
    staged = Staged.of(Clamped(1e9), spread(2, 4))
    assert guarded(staged.convert().plan) == {"/clamp#0": "constant"}
    refused = staged.convert(rules_with(smallest_constant=False)).plan
    found = {d.node: d.rule for d in refused.eval if not d.low}
    assert found == {"/aten.clamp#0": "no kernel", "/aten.clamp#1": "no kernel"}
    assert all_low(staged.plan("default", BF16))
    assert all_low(Staged.of(Clamped(6e4), spread(2, 4)).plan())
