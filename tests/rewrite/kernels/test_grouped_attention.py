"""Keys and values with fewer heads than queries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import amp_convert as amp
from tests.benchmarks.dispatch import counted
from tests.rewrite.kernels.running import running, targets


class Grouped(nn.Module):
    """Attention of 4 heads for queries and 2 for keys and values, repeated as transformers do it;
    `wrongly`: in another order of heads."""

    def __init__(self, *, wrongly: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)
        self._wrongly = wrongly

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = x.shape
        if self._wrongly:
            return x[:, None].expand(batch, 2, heads, length, size).reshape(batch, 4, length, size)
        return x[:, :, None].expand(batch, heads, 2, length, size).reshape(batch, 4, length, size)

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[1])
        mask = (rows[:, None] >= rows) & given.bool()[:, None, None, :]
        q = self.q(x).reshape(x.shape[0], -1, 4, 4).transpose(1, 2)
        k = self._repeated(self.k(x).reshape(x.shape[0], -1, 2, 4).transpose(1, 2))
        made = scaled_dot_product_attention(q, k, k, attn_mask=mask)
        return made.transpose(1, 2).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("wrongly", [False, True])
def test_heads_are_repeated_only_for_a_mask(wrongly: bool) -> None:
    torch.manual_seed(0)
    model, x = Grouped(wrongly=wrongly).eval(), torch.randn(3, 5, 16)
    ones = torch.ones(3, 5, dtype=torch.long)
    padded = ones.clone()
    padded[1, 2:] = 0
    frozen = amp.convert(model, (x, ones), dtype=torch.bfloat16, train=False).freeze()
    assert ("grouped_attention" in targets(running(frozen).tuned)) is not wrongly
    with torch.no_grad():
        for given in (ones, padded, ones):
            want = model(x, given)
            assert float((frozen(x, given) - want).norm() / want.norm()) < 0.02
            assert torch.equal(frozen(x[:2], given[:2]), frozen(x, given)[:2])
        assert counted(lambda: frozen(x, padded)).calls["clone"] == (1 if wrongly else 2)
