"""`forward` of a converted and of a frozen model says which inputs the original takes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import amp_convert as amp

X = torch.linspace(-1, 1, 16).reshape(2, 8)


class Model(nn.Module):
    """Whole, or in parts where it looks at a value."""

    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.looks = nn.Linear(8, 8), nn.Linear(8, 8), looks

    def forward(
        self, x: torch.Tensor, scale: float = 2.0, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.a(x) * scale
        return self.b(x) if not self.looks or bool(x.sum() > -1e9) else x


@pytest.mark.parametrize("looks", [False, True])
def test_copies_and_files_keep_it(looks: bool) -> None:
    model = Model(looks=looks).eval()
    mixed = amp.convert(model, X, train=False)
    want = inspect.signature(model.forward)
    frozen = mixed.freeze()
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    models: list[nn.Module] = [
        mixed,
        copy.deepcopy(mixed),
        frozen,
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        pickle.loads(pickle.dumps(copy.copy(frozen))),
        copy.deepcopy(nn.ModuleList([copy.copy(frozen), frozen]))[0],
        torch.load(buffer, weights_only=False),
    ]
    for each in models:
        assert inspect.signature(each.forward) == want
        assert torch.equal(each(X), frozen(X))
        assert isinstance(each, amp.ConvertedModel | amp.FrozenModel)
        assert repr(type(each)) in (repr(amp.ConvertedModel), repr(amp.FrozenModel))


def test_a_bound_method_and_the_class_are_as_before() -> None:
    mixed = amp.convert(Model().eval(), X, train=False)
    assert mixed.forward.__doc__ == amp.ConvertedModel.forward.__doc__
    shown = inspect.signature(amp.ConvertedModel.forward)
    assert list(shown.parameters) == ["self", "args", "kwargs"]


def test_dynamo_takes_it() -> None:
    mixed = amp.convert(Model().eval(), X, train=False)
    compiled = torch.compile(mixed.freeze(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), mixed.freeze()(X))
