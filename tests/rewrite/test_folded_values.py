"""What constant folding stores: its names, and the bits that the model would compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.rewrite.fold_constants import fold
from amp_convert.rewrite.frozen_model import fold_weights
from tests.zoo import DTYPES


class Queries(nn.Module):
    """A linear layer of learned queries alone, as in DETR's decoder: known before any call. Its
    input is expanded, so PyTorch would multiply it a sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, 64))
        self.project, self.out = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries.unsqueeze(1).expand(6, 8, 64).transpose(0, 1)
        return self.out(self.project(queries) + x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_constants_has_the_bits_that_the_model_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Queries().eval(), torch.randn(8, 6, 96)
    mixed = amp.convert(model, x, dtype=dtype, train=False)
    frozen = mixed.freeze()
    assert any(name.startswith("folded.") for name in frozen.state_dict())
    with torch.no_grad():
        assert torch.equal(mixed(x), frozen(x))


@pytest.mark.slow
def test_fold_gives_values_by_name() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4)
    mixed = amp.convert(model, x)
    rewritten = mixed.rewritten[""]["eval"]
    names = [n.name for n in rewritten.graph_module.graph.find_nodes(op="placeholder")]
    tensors = dict(zip(names, (*model.parameters(), x), strict=True))
    del tensors[names[-1]]
    folded = fold(rewritten, tensors)
    assert set(folded.tensors) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [spec.source.value for spec in folded.signature.inputs] == ["user", *["buffer"] * 4]
    assert {spec.target for spec in folded.signature.inputs[1:]} == set(folded.tensors)
    assert all(t.dtype == torch.float16 for t in folded.tensors.values())


@pytest.mark.slow
def test_wide_values_are_not_rounded_and_have_the_same_names() -> None:
    """Also where one weight is read in both dtypes, and a value is computed from weights."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.scale = nn.Parameter(torch.rand(4) + 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            low = x @ (self.table.weight.t() * self.scale.exp().sum())
            return torch.log_softmax(low, -1) + torch.linalg.vector_norm(self.table.weight)

    torch.manual_seed(0)
    mixed = amp.convert(Both().eval(), torch.randint(7, (2, 3)))
    region, rewritten = mixed.captured.regions[0], mixed.rewritten[""]["eval"]
    low, wide = fold_weights(region, rewritten), fold_weights(region, rewritten, wide=True)
    assert {t.dtype for t in low.tensors.values()} == {torch.float16, torch.float32}
    assert {t.dtype for t in wide.tensors.values()} == {torch.float32}
    assert list(wide.tensors) == list(low.tensors)
    assert wide.signature == low.signature
    for name, value in wide.tensors.items():
        assert torch.allclose(value, low.tensors[name].float(), rtol=2**-9, atol=0)
    table = wide.tensors["table.weight"]
    assert torch.equal(table, mixed.captured.model.table.weight)
