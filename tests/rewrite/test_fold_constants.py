"""The frozen model: the converted model's bits, from weights that are stored in low precision."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

import amp_convert as amp
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.rewrite.frozen_model import FrozenModel
from tests.bits import assert_same_bits
from tests.rewrite.perceptron import perceptron
from tests.zoo import DTYPES, both_dtypes, converted, every_model, example, mode

CASTS = torch.ops.aten._to_copy.default


def size(module: nn.Module) -> int:
    """Bytes of all distinct tensors in a module's state."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage() for t in module.state_dict().values()
    }
    return sum(storage.nbytes() for storage in storages.values())


def runner_of(frozen: FrozenModel) -> GraphRunner:
    runner = frozen._callee
    assert isinstance(runner, GraphRunner)
    return runner


def graph_of(frozen: FrozenModel) -> fx.Graph:
    return runner_of(frozen).graph_module.graph


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its input in another way, or takes a part of it."""
    if node.target in (torch.ops.aten.reshape.default, operator.getitem):
        return True
    return any(result.alias_info for result in node.target._schema.returns)


# --- the same numbers ----------------------------------------------------------------------------


@every_model
@both_dtypes
def test_frozen_is_the_converted_model(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "default", dtype)
    _, args, kwargs = example(name)
    with mode(mixed), torch.no_grad():
        want = mixed(*args, **kwargs)
    frozen = mixed.freeze()
    assert_same_bits(want, frozen(*args, **kwargs))
    assert any(t.dtype == dtype for t in frozen.state_dict().values())
    assert size(frozen) < size(mixed)
    assert frozen.plan is mixed.plan


@every_model
def test_frozen_without_conversion_is_the_original(name: str) -> None:
    mixed = converted(name, "fp32")
    original, args, kwargs = example(name)
    frozen = mixed.freeze()
    with mode(mixed, original), torch.no_grad():
        assert_same_bits(mixed(*args, **kwargs), frozen(*args, **kwargs))


@every_model
def test_nothing_that_depends_on_weights_alone_is_left_to_compute(name: str) -> None:
    """No cast of a weight, and no other operator whose inputs are all stored, but for views."""
    frozen = converted(name, "default", torch.bfloat16).freeze()
    graph, signature = graph_of(frozen), runner_of(frozen).signature
    placeholders = graph.find_nodes(op="placeholder")
    stored = {
        node
        for node, spec in zip(placeholders, signature.inputs, strict=True)
        if spec.source != "user" and not spec.mutated
    }
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        if all(source in stored for source in node.all_input_nodes):
            assert is_view(node), node
            stored.add(node)
    assert all(node.users for node in placeholders if node in stored), "a stored tensor is unread"


def test_a_table_is_cast_once_and_looked_up_low() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16)).eval()
    ids = torch.randint(0, 50, (4, 7))
    mixed = amp.convert(model, ids)
    frozen = mixed.freeze()
    table = frozen.state_dict()["0.weight"]
    assert table.dtype == torch.float16
    assert torch.equal(table, model[0].weight.half())
    lookup = next(n for n in graph_of(frozen).nodes if "embedding" in str(n.target))
    assert all(user.target is not CASTS for user in lookup.users)
    with torch.no_grad():
        assert_same_bits(mixed(ids), frozen(ids))


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_stored_low_in_half_the_memory(dtype: torch.dtype) -> None:
    model, x = perceptron()
    mixed = amp.convert(model, x, dtype=dtype)
    frozen = mixed.freeze()
    state = frozen.state_dict()
    assert set(state) == set(model.state_dict())
    for key, weight in model.state_dict().items():
        assert state[key].dtype == dtype
        assert torch.equal(state[key], weight.to(dtype)), key
    assert size(frozen) * 2 == size(model)


def test_a_tied_weight_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.head = nn.Linear(32, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 50, (2, 3))
    assert size(amp.convert(model, ids).freeze()) == 50 * 32 * 2


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_read_in_fp32_is_held_once(tied: bool) -> None:
    """Its entries go where FP32 is wanted. Where the table is a head as well, they are low, and
    cast: else it would be held in both. GPT-2's is such a table, and reads its entries low."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.head = nn.Linear(32, 50, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            entries = self.embed(ids)
            return self.head(entries), entries.float().exp().sum()

    torch.manual_seed(0)
    model, ids = Reads(), torch.randint(0, 50, (2, 3))
    mixed = amp.convert(model, ids)
    lookup = next(d for d in mixed.plan.eval if d.op == "aten.embedding")
    assert lookup.output_dtype == ("float16" if tied else None)
    tables = [t for t in mixed.freeze().state_dict().values() if t.shape == (50, 32)]
    assert sorted(str(t.dtype) for t in tables) == (
        ["torch.float16"] if tied else ["torch.float16", "torch.float32"]
    )
    tables = [t for t in converted("gpt2").freeze().state_dict().values() if t.shape == (99, 32)]
    assert [t.dtype for t in tables] == [torch.float16]


def test_a_weight_used_in_both_precisions_is_stored_in_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + x @ self.linear.weight.double().float().exp()

    torch.manual_seed(0)
    model, x = Both(), torch.randn(4, 8)
    mixed = amp.convert(model.eval(), x)
    with torch.no_grad():
        want = mixed(x)
    assert_same_bits(want, mixed.freeze()(x))


@pytest.mark.slow
def test_names_stay_the_originals() -> None:
    frozen = converted("bert").freeze()
    names = set(example("bert")[0].state_dict())
    kept = {key for key in frozen.state_dict() if not key.startswith("folded.")}
    assert kept <= names
    assert "encoder.layer.0.attention.self.query.weight" in kept


@pytest.mark.slow
def test_the_state_dict_makes_the_round_trip() -> None:
    model, x = perceptron()
    frozen = amp.convert(model, x).freeze()
    want = frozen(x)
    other, _ = perceptron()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    twin = amp.convert(other, x).freeze()
    assert not torch.equal(want, twin(x))
    assert twin.load_state_dict(frozen.state_dict()) == ([], [])
    assert_same_bits(want, twin(x))
