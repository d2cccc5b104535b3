"""How many terms one element of a result is the sum of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.reduction_depth import ReductionDepth, reduction_depth
from tests.plan.guards.helpers import (
    INF,
    NAN,
    activation,
    all_low,
    diagonal,
    error,
    fires,
    guarded,
    said,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rule, rules_with, table

GUARD = ReductionDepth()


def operands(**shapes: tuple[int, ...]) -> tuple[Operand, ...]:
    return tuple(Operand(argument, None, shape) for argument, shape in shapes.items())


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("depth", "limit", "expected"),
    [
        (131072, 131072.0, False),
        (131073, 131072.0, True),
        (9, 8.0, True),
        (8, 8.0, False),
        (10**9, False, False),
    ],
)
def test_it_sums_up_so_many_terms_at_most(
    depth: int, limit: float, expected: bool, dtype: torch.dtype
) -> None:
    at = site("linear", operands=operands(input=(2, depth), weight=(3, depth)))
    assert fires(GUARD, at, dtype, reduction_depth=limit) == expected


def test_the_finding_names_the_depth() -> None:
    at = site("sum", operands=operands(self=(2, 500, 600)), axes=(1, 2))
    assert said(GUARD, at) == (
        "reduction-depth",
        "each element sums up more than 131072 terms",
        "depth 300000",
    )


@pytest.mark.parametrize(
    ("op", "shapes", "axes", "depth"),
    [
        ("linear", {"input": (2, 7, 5), "weight": (3, 5), "bias": (3,)}, (), 5),
        ("mm", {"self": (2, 5), "mat2": (5, 3)}, (), 5),
        ("bmm", {"self": (7, 2, 5), "mat2": (7, 5, 3)}, (), 5),
        ("matmul", {"self": (2, 5), "other": (5,)}, (), 5),
        ("mv", {"self": (2, 5), "vec": (5,)}, (), 5),
        ("inner", {"self": (5,), "other": (3, 5)}, (), 5),
        ("addmm", {"self": (3,), "mat1": (2, 5), "mat2": (5, 3)}, (), 5),
        ("baddbmm", {"self": (3,), "batch1": (7, 2, 5), "batch2": (7, 5, 3)}, (), 5),
        ("conv1d", {"input": (2, 4, 9), "weight": (8, 4, 3)}, (), 4 * 3),
        ("conv2d", {"input": (2, 4, 9, 9), "weight": (8, 4, 3, 5)}, (), 4 * 3 * 5),
        ("conv3d", {"input": (2, 4, 9, 9, 9), "weight": (8, 2, 3, 3, 3)}, (), 2 * 27),
        ("sum", {"self": (4, 5, 6)}, (0,), 4),
        ("mean", {"self": (4, 5, 6)}, (0, 2), 24),
        ("var", {"self": (4, 5, 6)}, (-1, -2), 30),
        ("linalg_vector_norm", {"self": (4, 5, 6)}, (), 120),
        ("prod", {"self": ()}, (), 1),
        ("sum", {}, (), 1),
        ("linear", {}, (), 1),
        ("conv2d", {}, (), 1),
        ("tanh", {"self": (4, 5)}, (1,), 1),
        ("max", {"self": (4, 5)}, (1,), 1),
    ],
)
def test_the_depth_is_the_product_over_all_reduced_axes(
    op: str, shapes: dict[str, tuple[int, ...]], axes: tuple[int, ...], depth: int
) -> None:
    assert reduction_depth(site(op, operands=operands(**shapes), axes=axes)) == depth


def test_a_product_that_sums_over_its_batch_is_as_deep_as_that() -> None:
    shapes = operands(self=(2, 3), batch1=(7, 2, 5), batch2=(7, 5, 3))
    assert reduction_depth(site("addbmm", operands=shapes)) == 7 * 5


@pytest.mark.parametrize("value", [NAN, INF])
def test_values_are_not_its_business(value: float) -> None:
    assert not fires(GUARD, site("sum", result=value, operands=(activation(value),)))


# --- in a plan -----------------------------------------------------------------------------------


class Wide(nn.Module):
    """One layer contracts 64 features, its neighbours 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = diagonal(1.0), diagonal(1.0)
        self.deep = nn.Linear(64, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.deep(self.first(x).repeat(1, 16)))


@pytest.mark.slow
def test_it_keeps_the_deep_contraction_in_fp32() -> None:
    staged = Staged.of(Wide(), spread(2, 4))
    assert table(staged.plan(rules_with(reduction_depth=63.0))) == rows(
        """
        first/linear#0 | allow | op linear             | f16 | low | f16 f16
        /repeat#0      | clear | op repeat             | f16 | low | .
        deep/linear#0  | deny  | guard reduction-depth | f32 | -   | f32 .
        last/linear#0  | allow | op linear             | f16 | low | f16 f16
        """
    )
    assert guarded(staged.plan(rules_with(reduction_depth=63.0), BF16)) == {
        "deep/linear#0": "reduction-depth"
    }
    assert all_low(staged.plan(rules_with(reduction_depth=64.0)))
    assert all_low(staged.plan())


class Product(nn.Module):
    """A long product of factors near 1."""

    def __init__(self) -> None:
        super().__init__()
        self.last = diagonal(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.prod(-1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 2e-3), (BF16, 2e-2)])
def test_without_it_every_factor_adds_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    """The default rules deny it: here it is as low as it can be."""
    staged, low = (
        Staged.of(Product(), torch.full((2, 4, 4000), 1.0004)),
        rule("allow", op="aten.prod"),
    )
    on, off = rules_with(low, reduction_depth=3999.0), rules_with(low, reduction_depth=False)
    assert guarded(staged.plan(on, dtype)) == {"/prod#0": "reduction-depth"}
    assert all_low(staged.plan(off, dtype))
    assert error(staged, on, dtype) < tolerance
    assert error(staged, off, dtype) > 0.5


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_cpus_matrix_products_accumulate_in_fp32(dtype: torch.dtype) -> None:
    """Which is why the default limit is far out."""
    deep = nn.Linear(200_000, 1, bias=False)
    nn.init.constant_(deep.weight, 2.0**-6)
    staged = Staged.of(deep, torch.full((2, 200_000), 2.0**-6))
    off = rules_with(reduction_depth=False)
    assert all_low(staged.plan(off, dtype))
    assert error(staged, off, dtype) < 1e-2
    assert guarded(staged.plan("default", dtype)) == {"/linear#0": "reduction-depth"}
