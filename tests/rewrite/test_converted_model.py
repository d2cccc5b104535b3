"""The converted model as an nn.Module: its tensors, its two modes, its calls, its copies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from tests.bits import assert_same_bits
from tests.rewrite.small_net import net
from tests.zoo import both_dtypes, converted, every_model, example, mode

CASTS = torch.ops.aten._to_copy.default


@every_model
def test_state_is_the_originals_own(name: str) -> None:
    original, mixed = example(name)[0], converted(name)
    want, have = original.state_dict(), mixed.state_dict()
    assert list(want) == list(have)
    assert all(want[key].data_ptr() == have[key].data_ptr() for key in want)
    assert all(a is b for a, b in zip(original.parameters(), mixed.parameters(), strict=True))
    assert [n for n, _ in original.named_buffers()] == [n for n, _ in mixed.named_buffers()]


@pytest.mark.slow
def test_load_state_dict_changes_the_outputs() -> None:
    (model, x), (other, _) = net(), net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    mixed = amp.convert(model.eval(), x)
    before = mixed(x)
    assert mixed.load_state_dict(other.state_dict()) == ([], [])
    after = mixed(x)
    assert not torch.equal(before, after)
    assert_same_bits(amp.convert(other.eval(), x)(x), after)


@pytest.mark.slow
def test_an_optimizer_step_changes_the_outputs() -> None:
    model, x = net()
    mixed = amp.convert(model, x).eval()
    before = mixed(x).detach()
    optimizer = torch.optim.SGD(mixed.parameters(), lr=0.01)
    mixed(x).square().mean().backward()
    optimizer.step()
    after = mixed(x).detach()
    assert after.square().mean() < before.square().mean()
    torch.testing.assert_close(after, model.eval()(x).detach(), rtol=1e-2, atol=1e-2)


@every_model
@both_dtypes
def test_gradients_have_their_parameters_dtype(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "default", dtype)
    original, args, kwargs = example(name)
    wanted = {n: p for n, p in mixed.named_parameters() if p.requires_grad}
    found = {}
    for call in (original, mixed):
        with mode(original, mixed, train=True):
            result = call(*args, **kwargs)
            outputs = [t for t in pytree.tree_leaves(result) if getattr(t, "requires_grad", False)]
            loss = sum(t.square().mean() for t in outputs)
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            found[call] = dict(zip(wanted, grads, strict=True))
    for key, expected in found[original].items():
        gradient = found[mixed][key]
        assert (gradient is None) == (expected is None), key
        if gradient is not None:
            assert gradient.dtype == wanted[key].dtype == torch.float32, key
            assert bool(gradient.isfinite().all()), key
    # In training each arm draws its own dropout masks, but from one random state: the same ones.
    flat = [torch.cat([g.flatten() for g in found[c].values() if g is not None]) for c in found]
    assert float((flat[1] - flat[0]).norm() / flat[0].norm()) < 0.1


class Tied(nn.Module):
    """One weight under two names, used three times; a second one used twice in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.shared(self.embed(ids)))
        return self.head(x) + self.head(x.relu())


@pytest.mark.slow
def test_tied_weights_stay_tied_and_are_cast_once() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 11, (3, 5))
    mixed = amp.convert(model, ids)
    assert mixed.head.weight is mixed.embed.weight is model.head.weight
    for train in ("eval", "train"):
        graph = mixed.rewritten[""][train].graph_module.graph
        weights = [n for n in graph.nodes if n.op == "placeholder" and "p_" in n.name]
        casts = [n.args[0] for n in graph.nodes if n.target is CASTS and n.args[0] in weights]
        assert len(casts) == 3, "the tied weight, the shared layer's weight and its bias"
        assert set(Counter(casts).values()) == {1}
    mixed(ids).sum().backward()
    assert model.embed.weight.grad is mixed.head.weight.grad is not None
    assert list(mixed.state_dict()) == list(model.state_dict())
