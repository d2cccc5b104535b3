"""Where casts stand, and what stays FP32 beside a low value."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.rewrite.listing import listing, readers
from tests.small_models import EXAMPLES, example, ramp
from tests.staged import (
    Staged,
    rows,
)


class Shared(nn.Module):
    """One weight in two layers; one input and one result with several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> Any:
        first, second = self.one(x), self.two(x)
        low = self.one(first)
        return torch.exp(low) + torch.cumsum(low, 0), second, low, low


# --- sharing -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_value_is_cast_once_for_all_its_readers() -> None:
    staged = Staged.of(Shared(), ramp(2, 8))
    lines = listing(staged.rewritten(staged.plan()))
    # Export calls a tied weight by either of its names.
    assert [re.sub("p_(one|two)_weight", "w", line) for line in lines] == rows(
        """
        x.f16 = x
        w.f16 = w
        linear0 = linear(x.f16, w.f16)
        linear1 = linear(x.f16, w.f16)
        linear2 = linear(linear0, w.f16)
        linear2.f32 = linear2
        exp0 = exp(linear2.f32)
        cumsum0 = cumsum(linear2.f32)
        add0 = add(exp0, cumsum0)
        linear1.f32 = linear1
        return add0, linear1.f32, linear2.f32, linear2.f32
        """
    )
    counted = staged.plan().eval_casts
    assert (counted.activations, counted.weights) == (3, 1)


@pytest.mark.parametrize("model", EXAMPLES)
@pytest.mark.parametrize("preset", ["default", "autocast", "half"])
def test_a_cast_stands_right_before_its_first_reader(model: str, preset: str) -> None:
    rewritten = example(model).rewritten(example(model).plan(preset))
    nodes = list(rewritten.graph_module.graph.nodes)
    for position, node in enumerate(nodes):
        if node.name in rewritten.casts:
            later = [n for n in nodes[position:] if n.name not in rewritten.casts]
            assert node in later[0].all_input_nodes


# --- what stays FP32 beside a low value ----------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_reads_its_statistics_and_parameters_as_they_are(mode: str) -> None:
    staged = example("cnn")
    rewritten = staged.rewritten(staged.plan("half"), mode)
    norms = readers(rewritten, "batch_norm")
    assert len(norms) == 2
    for norm in norms:
        x, *parameters = norm.all_input_nodes
        assert x.op == "call_function"
        assert [p.op for p in parameters] == ["placeholder"] * 4
    module = staged.convert("half").train(mode == "train")
    module(*staged.args)
    assert {b.dtype for n, b in module.named_buffers() if "running" in n} == {torch.float32}


class Tagged(nn.Module):
    """A table that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids)), self.out(self.table(more))


@pytest.mark.slow
def test_a_table_is_looked_up_before_it_is_cast() -> None:
    """The bits are those of a cast table, for the work of casting what was looked up."""
    staged = Staged.of(Tagged(), torch.tensor([[1, 2]]), torch.tensor([[3, 10]]))
    rewritten = staged.rewritten(staged.plan())
    lookups = readers(rewritten, "embedding")
    assert len(lookups) == 2
    for lookup in lookups:
        assert [n.op for n in lookup.all_input_nodes] == ["placeholder", "placeholder"]
        (cast,) = lookup.users
        assert cast.name in rewritten.casts
        assert cast.kwargs == {"dtype": torch.float16}
        (linear,) = cast.users
        assert "linear" in str(linear.target)


class Looked(nn.Module):
    """A looked-up value with a low and an FP32 reader, and one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> Any:
        h = self.table(ids)
        return self.out(h), torch.exp(h), h


@pytest.mark.slow
def test_a_looked_up_value_is_not_cast_down_and_up_again() -> None:
    """FP32 readers of a lookup get what was looked up."""
    staged = Staged.of(Looked(), torch.tensor([[1, 2]]))
    for preset in ("default", "half"):
        rewritten = staged.rewritten(staged.plan(preset))
        casts = [n for n in rewritten.graph_module.graph.nodes if n.name in rewritten.casts]
        assert [n.name for n in casts if n.args[0].name in rewritten.casts] == []


torch.library.define("amp_convert_tests::raised", "(Tensor x, *, Tensor by) -> Tensor")


@torch.library.impl("amp_convert_tests::raised", "CompositeExplicitAutograd")
def raised(x: torch.Tensor, *, by: torch.Tensor) -> torch.Tensor:
    """An operator with a tensor that can be given by keyword only."""
    return x + by


class Raised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.amp_convert_tests.raised(self.lin(x).detach(), by=x)


@pytest.mark.slow
def test_keywords_are_cast_like_any_argument() -> None:
    staged = Staged.of(Raised(), ramp(2, 8))
    assert listing(staged.rewritten(staged.plan("half")))[-3:] == [
        "raised0 = raised(detach0, x.f16)",
        "raised0.f32 = raised0",
        "return raised0.f32",
    ]
