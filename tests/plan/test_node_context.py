"""What a guard is shown of a node: its operands, its numbers, its axes and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from amp_convert.capture.regions import capture
from amp_convert.plan.guards import Site
from amp_convert.plan.node_context import Sites
from amp_convert.profile.calibrate import Range
from amp_convert.profile.growth import Growth


class Module(nn.Module):
    """A layer, a table, a normalisation, a buffer, and `compute(self, *inputs)` over them."""

    offset: torch.Tensor

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.batch = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.table, self.compute = nn.Embedding(5, 4), compute
        self.register_buffer("offset", torch.ones(4))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.compute(self, *inputs)


X = torch.linspace(0.5, 1, 8).reshape(2, 4)


def sites_of(
    compute: Callable[..., Any], *inputs: torch.Tensor, device: str = "cpu", masks: bool = False
) -> dict[str, Site]:
    """The site of each call: "mul" for the first product, "mul#1" for the second. Each value's
    range says where the value stands in the graph: the third node's is 3."""
    region = capture(Module(compute).eval(), inputs or (X,), {}).regions[0]
    captured = region.graphs["eval"]
    graph = captured.graph_module.graph
    ops = {name: info.short_op for name, info in captured.nodes.items()}
    numbers = {node: float(i) for i, node in enumerate(graph.nodes, 1)}

    def weight_of(node: fx.Node) -> str:
        return node.name if node.name.startswith(("p_", "b_", "c_")) else ""

    sites = Sites(
        graph,
        region.traces["eval"].values,
        ops,
        lambda node: Range(numbers[node], numbers[node]),
        lambda node: Growth(numbers[node]),
        weight_of,
        device,
        3,
        masks=masks,
    )
    names = {name: info.identity.rpartition("/")[2] for name, info in captured.nodes.items()}
    return {
        names[n.name].removeprefix("aten.").removesuffix("#0"): sites.of(n)
        for n in graph.nodes
        if n.op == "call_function"
    }


def arguments(at: Site) -> list[str]:
    return [operand.argument for operand in at.operands]


def readers(consumers: Any) -> list[tuple[str, str]]:
    return [(consumer.op.removeprefix("aten."), consumer.argument) for consumer in consumers]


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


# --- eps -----------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize(("denominator", "eps"), DENOMINATORS.values(), ids=DENOMINATORS)
def test_eps_is_found_through_views_and_roots(
    denominator: Callable[[torch.Tensor], torch.Tensor], eps: float | None
) -> None:
    at = sites_of(lambda m, x: x / denominator(x.abs()))["div"]
    assert [operand.argument for operand in at.operands] == ["self", "other"]
    assert at.operands[0].eps is None
    assert at.operands[1].eps == (pytest.approx(eps) if eps else None)


# --- neighbours ----------------------------------------------------------------------------------


def test_feeds_are_the_readers_seen_through_what_has_no_numeric_effect() -> None:
    def compute(m: Module, x: torch.Tensor) -> Any:
        h = x.tanh()
        first, second = h.relu().transpose(0, 1).chunk(2)
        return first.exp(), x / h, (second * 2).sum()

    at = sites_of(compute)
    assert readers(at["tanh"].feeds) == [("exp", "self"), ("mul", "self"), ("div", "other")]
    assert readers(at["relu"].feeds) == readers(at["transpose"].feeds)
    assert readers(at["exp"].feeds) == []


def test_a_reader_comes_with_what_it_reads_and_with_what_it_makes() -> None:
    at = sites_of(lambda m, x: (x.tanh().relu() * 2).sigmoid())
    consumer = at["tanh"].feeds[0]
    assert consumer.op == "aten.mul"
    assert consumer.operand == at["relu"].result, "what the product reads, not what tanh makes"
    assert consumer.result == at["mul"].result


@pytest.mark.slow
def test_a_value_that_is_read_twice_has_two_readers() -> None:
    at = sites_of(lambda m, x: torch.atan2(x.tanh(), x.tanh()) + m.layer(x))
    assert readers(at["tanh"].feeds) == [("atan2", "self")]
    at = sites_of(lambda m, x: (lambda h: h * h)(x.tanh()))
    assert readers(at["tanh"].feeds) == [("mul", "self"), ("mul", "other")]


PATHS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "at once": (lambda m, h: h.sin(), ["sin"]),
    "a sum and a product": (lambda m, h: (h * 2 + 1).cos(), ["cos"]),
    "a difference and a quotient": (lambda m, h: (3 - h).neg().div(7).softmax(-1), ["softmax"]),
    "an outer product": (lambda m, h: torch.outer(h[0], h[0]).relu().exp(), ["exp"]),
    "two": (lambda m, h: (h.view(4, 2).sin(), (h - 1).logsumexp(-1)), ["logsumexp", "sin"]),
    "a chunk": (lambda m, h: (h.chunk(2, -1)[0] + 1).log_softmax(-1), ["log_softmax"]),
    "a loss": (lambda m, h: F.cross_entropy(h, torch.tensor([1, 2])), ["cross_entropy_loss"]),
    "to the first only": (lambda m, h: h.sin().exp(), ["sin"]),
    "not a layer": (lambda m, h: m.layer(h).sin(), []),
    "not a matrix product": (lambda m, h: (h @ h.T).softmax(-1), []),
    "not a normalisation": (lambda m, h: m.norm(h).exp(), []),
    "not a reduction": (lambda m, h: h.sum(-1).exp(), []),
    "not another function": (lambda m, h: h.sigmoid().sin(), []),
    "nowhere": (lambda m, h: h + 1, []),
}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "ends"), PATHS.values(), ids=PATHS)
def test_a_value_reaches_sines_and_exponentials_through_arithmetic(
    path: Callable[..., Any], ends: list[str]
) -> None:
    at = sites_of(lambda m, x: path(m, x.tanh()))
    assert sorted(op for op, _ in readers(at["tanh"].reaches)) == ends


@pytest.mark.slow
def test_what_is_reached_comes_with_the_range_that_it_reads() -> None:
    at = sites_of(lambda m, x: (x.tanh() * 100).sin())
    (sine,) = at["tanh"].reaches
    assert (sine.op, sine.argument) == ("aten.sin", "self")
    assert (sine.operand, sine.result) == (at["mul"].result, at["sin"].result)
    assert at["tanh"].reaches == tuple(replace(c, scaled=True) for c in at["mul"].reaches)
    assert at["sin"].reaches == ()
    at = sites_of(lambda m, x: (lambda h: (h.neg() + h).exp())(x.tanh()))
    assert readers(at["tanh"].reaches) == [("exp", "self")], "on two paths, but once"


@pytest.mark.slow
def test_it_is_known_whether_a_product_lies_between() -> None:
    at = sites_of(lambda m, x: (lambda h: (h / 2 + h).exp())(x.tanh()))
    assert {end.scaled for end in at["tanh"].reaches} == {False, True}
    assert {end.scaled for end in at["div"].reaches} == {False}
    at = sites_of(lambda m, x: torch.add(x, x.tanh(), alpha=3).exp())
    assert {end.scaled for end in at["tanh"].reaches} == {True}


# --- masks ---------------------------------------------------------------------------------------

HIDDEN = X > 0.7


def hide(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(hidden, -1e9)


def masked(compute: Callable[..., Any], *inputs: torch.Tensor, masks: bool = True) -> list[str]:
    """The nodes whose results are masks."""
    found = sites_of(compute, *inputs or (X, HIDDEN), masks=masks)
    return [name for name, at in found.items() if at.masked]


def attend(m: Module, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return (hide(x.tanh(), hidden).reshape(4, 2) + 1).softmax(-1).sum()


@pytest.mark.slow
def test_what_ends_in_softmaxes_alone_is_a_mask() -> None:
    assert masked(attend) == ["tanh", "masked_fill", "reshape", "add"]
    assert masked(attend, masks=False) == []
    at = sites_of(attend, X, HIDDEN, masks=True)
    read = {name: [operand.mask for operand in s.operands] for name, s in at.items()}
    assert (read["add"], read["softmax"], read["sum"]) == ([True], [True], [False])


@pytest.mark.slow
def test_what_anything_else_reads_as_well_is_none() -> None:
    assert masked(lambda m, x, h: (lambda y: (y.softmax(-1), y * 2))(hide(x, h))) == []
    assert masked(lambda m, x, h: (hide(x, h) * 2).softmax(-1)) == ["mul"]
    assert masked(lambda m, x, h: hide(x, h)) == [], "an output is read by the user"
