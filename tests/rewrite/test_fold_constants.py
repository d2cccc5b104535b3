"""The frozen model: the converted model's bits, from weights that are stored in low precision."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import fx, nn

import amp_convert as amp
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.rewrite.frozen_model import FrozenModel
from tests.zoo import DTYPES, assert_same_bits, both_dtypes, converted, every_model, example, mode

CASTS = torch.ops.aten._to_copy.default


def perceptron(layers: int = 4, width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    stack = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*stack[:-1]), torch.randn(8, width)


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


# --- a module of its own -------------------------------------------------------------------------


@pytest.mark.slow
def test_it_refuses_to_train() -> None:
    frozen = converted("cnn").freeze()
    assert not any(m.training for m in frozen.modules())
    for call in (frozen.train, lambda: frozen.train(True)):
        with pytest.raises(UnsupportedModelError, match="for inference only"):
            call()
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen
    assert not any(m.training for m in frozen.modules())
    result = frozen(*example("cnn")[1])
    assert not result.requires_grad


@pytest.mark.slow
def test_freezing_a_model_in_training_mode_freezes_its_eval_graph() -> None:
    mixed = converted("lstm")
    _, args, _ = example("lstm")
    with mode(mixed), torch.no_grad():
        want = mixed(*args)
    with mode(mixed, train=True):
        frozen = mixed.freeze()
        assert mixed.training
    assert_same_bits(want, frozen(*args))


def test_the_converted_model_is_left_as_it_was() -> None:
    model, x = perceptron()
    mixed = amp.convert(model, x)
    mixed.eval()
    before, state = mixed(x), {k: v.clone() for k, v in mixed.state_dict().items()}
    nodes = [str(n) for n in mixed.rewritten[""]["eval"].graph_module.graph.nodes]
    mixed.freeze()
    assert nodes == [str(n) for n in mixed.rewritten[""]["eval"].graph_module.graph.nodes]
    assert_same_bits(state, dict(mixed.state_dict()))
    assert_same_bits(before.detach(), mixed(x).detach())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in mixed.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fp32", "default"])
def test_it_does_not_follow_later_weights(rules: str) -> None:
    model, x = perceptron()
    model = nn.Sequential(model, nn.BatchNorm1d(64)).eval()
    frozen = amp.convert(model, x, rules=rules).freeze()
    want = frozen(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    assert_same_bits(want, frozen(x))


def test_copies_and_attributes() -> None:
    frozen = converted("cnn").freeze()
    args = example("cnn")[1]
    twin = copy.deepcopy(frozen)
    assert_same_bits(frozen(*args), twin(*args))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert not torch.equal(frozen(*args), twin(*args))


class Counting(nn.Module):
    """Changes a buffer in eval mode, as a cache or a step counter does."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_a_buffer_that_the_model_changes_stays_state() -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(2, 4)
    mixed = amp.convert(model, x)
    frozen = mixed.freeze()
    first, second = frozen(x), frozen(x)
    torch.testing.assert_close(second, 2 * first, rtol=1e-2, atol=1e-3)
    assert float(frozen.state_dict()["calls"]) == 2
    assert float(model.calls) == 0


@pytest.mark.slow
def test_fold_keeps_what_is_random() -> None:
    """Noise made from a weight's shape is not a constant."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.rand_like(self.linear.bias)

    torch.manual_seed(0)
    mixed = amp.convert(Noisy().eval(), torch.randn(2, 4))
    frozen = mixed.freeze()
    x = torch.randn(2, 4)
    assert not torch.equal(frozen(x), frozen(x))
