"""What a guard is shown of a node: its operands, its numbers, its axes and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from amp_convert.plan.guards import Site
from tests.plan.sites import Module, sites_of


def arguments(at: Site) -> list[str]:
    return [operand.argument for operand in at.operands]


# --- the node itself -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_has_the_operator_the_result_and_the_batches() -> None:
    at = sites_of(lambda m, x: (x + 1).tanh())["tanh"]
    assert (at.op, at.shape, at.batches) == ("aten.tanh", (2, 4), 3)
    assert at.result is not None
    assert at.operands[0].range is not None
    assert at.result.abs_max == at.operands[0].range.abs_max + 1


@pytest.mark.slow
def test_operands_are_named_as_in_the_schema_and_weights_by_their_name() -> None:
    at = sites_of(lambda m, x: m.layer(x + m.offset))
    assert [(o.argument, o.weight, o.shape) for o in at["linear"].operands] == [
        ("input", "", (2, 4)),
        ("weight", "p_layer_weight", (4, 4)),
        ("bias", "p_layer_bias", (4,)),
    ]
    assert [(o.argument, o.weight) for o in at["add"].operands] == [
        ("self", ""),
        ("other", "b_offset"),
    ]
    assert [o.argument for o in at["linear"].activations] == ["input"]
    assert [o.argument for o in at["linear"].weights] == ["weight", "bias"]


@pytest.mark.slow
def test_what_the_kernel_takes_in_fp32_is_no_operand() -> None:
    """Batch normalisation everywhere, layer normalisation on the CPU."""

    def norms(m: Module, x: torch.Tensor) -> torch.Tensor:
        return m.batch(m.norm(x))

    at = sites_of(norms)
    assert arguments(at["layer_norm"]) == ["input"]
    assert [arguments(s) for s in at.values() if "batch_norm" in s.op] == [["input"]]
    assert arguments(sites_of(norms, device="cuda")["layer_norm"]) == ["input", "weight", "bias"]


@pytest.mark.slow
def test_a_table_that_is_looked_up_is_an_operand() -> None:
    """It is stored low once the model is frozen."""
    at = sites_of(lambda m, i: m.table(i), torch.tensor([[1, 2], [3, 4]]))["embedding"]
    assert [(o.argument, o.weight) for o in at.operands] == [("weight", "p_table_weight")]


@pytest.mark.slow
def test_integers_booleans_and_doubles_are_no_operands() -> None:
    at = sites_of(lambda m, x: torch.where(x > 0.7, x, x * x.double()))
    assert arguments(at["where"]) == ["self"]
    assert arguments(sites_of(lambda m, x: x * torch.tensor([1, 2, 3, 4]))["mul"]) == ["self"]


@pytest.mark.slow
def test_every_tensor_of_a_list_is_an_operand() -> None:
    assert arguments(sites_of(lambda m, x: torch.cat([x, x.tanh()]))["cat"]) == ["tensors"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "node", "scalars"),
    [
        (lambda m, x: x - 2, "sub", {"other": 2.0}),
        (lambda m, x: torch.add(x, x, alpha=3), "add", {"alpha": 3.0}),
        (lambda m, x: x.clamp(-1, 0.9), "clamp", {"min": -1.0, "max": 0.9}),
        (lambda m, x: x.masked_fill(x > 0.7, -1e9), "masked_fill", {"value": -1e9}),
        (lambda m, x: torch.where(x > 0.7, x, -1e9), "where", {"other": -1e9}),
        (lambda m, x: x**3, "pow", {"exponent": 3.0}),
        (lambda m, x: x.sum(1, keepdim=True), "sum", {}),  # True is no number
    ],
)
def test_scalars_are_the_number_arguments(
    compute: Callable[..., Any], node: str, scalars: dict[str, float]
) -> None:
    assert sites_of(compute)[node].scalars == scalars


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "node", "axes"),
    [
        (lambda m, x: x.mean((0, 1)), "mean", (0, 1)),
        (lambda m, x: x.sum(-1), "sum", (-1,)),
        (lambda m, x: x.sum(), "sum", ()),
        (lambda m, x: x.cumsum(1), "cumsum", (1,)),
        (lambda m, x: x.softmax(0), "softmax", (0,)),
        (lambda m, x: torch.linalg.vector_norm(x), "linalg_vector_norm", ()),
    ],
)
def test_axes_are_the_dim_argument(
    compute: Callable[..., Any], node: str, axes: tuple[int, ...]
) -> None:
    assert sites_of(compute)[node].axes == axes


DENOMINATORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float | None]] = {
    "a sum": (lambda y: y + 1e-8, 1e-8),
    "a clamp": (lambda y: y.clamp(min=1e-6), 1e-6),
    "a view": (lambda y: (y + 1e-8).unsqueeze(0).expand(3, 2, 4), 1e-8),
    "a chunk": (lambda y: (y + 1e-8).chunk(1, -1)[0], 1e-8),
    "a root": (lambda y: (y + 1e-8).sqrt(), 1e-4),
    "roots": (lambda y: (y + 1e-16).reshape(4, 2).sqrt().sqrt().reshape(2, 4), 1e-4),
    "a difference": (lambda y: (y - 1).sqrt(), None),
    "a negative one": (lambda y: (y + -1.0).sqrt(), None),
    "a product of it": (lambda y: (y + 1e-8) * 2, None),
    "a factor": (lambda y: y * 1e-8, None),
    "a clamp from above": (lambda y: y.clamp(max=1e-6), None),
    "none": (lambda y: y, None),
}


# --- eps -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("denominator", "eps"), DENOMINATORS.values(), ids=DENOMINATORS)
def test_eps_is_found_through_views_and_roots(
    denominator: Callable[[torch.Tensor], torch.Tensor], eps: float | None
) -> None:
    at = sites_of(lambda m, x: x / denominator(x.abs()))["div"]
    assert [operand.argument for operand in at.operands] == ["self", "other"]
    assert at.operands[0].eps is None
    assert at.operands[1].eps == (pytest.approx(eps) if eps else None)
