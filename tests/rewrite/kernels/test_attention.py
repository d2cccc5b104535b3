"""Attention as eager calls it: which kernel, with which flags, for which mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import amp_convert as amp
from tests import zoo
from tests.benchmarks.dispatch import counted
from tests.bits import tensors


class Layers(nn.Module):
    """Two layers of attention that share a mask, which `mask` makes of the user's and the sizes."""

    def __init__(self, mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self._mask = mask

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        mask = self._mask(x, given)
        for _ in range(2):
            q = self.project(x).reshape(x.shape[0], -1, 2, 8).transpose(1, 2)
            made = scaled_dot_product_attention(q, q, q, attn_mask=mask)
            x = made.transpose(1, 2).reshape(x.shape)
        return x


def _everywhere(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).expand(x.shape[0], 1, -1, -1)


def _causal(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[1])
    return (rows[:, None] >= rows[None, :]).expand(x.shape[0], 1, -1, -1)


def _window(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[1])
    return _causal(x, given) & (rows[:, None] - rows[None, :] < 2)


def _padding(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return given.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1)


def _both(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return _causal(x, given) & _padding(x, given)


def _by_value(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return (x.mean(-1) > -9)[:, None, None, :].expand(-1, 1, x.shape[1], -1)


FLASH = "_scaled_dot_product_flash_attention_for_cpu"
CASES = [
    (_everywhere, "ones", "no mask"),
    (_causal, "ones", "no mask, causal"),
    (_causal, "padded", "no mask, causal"),
    (_window, "ones", "mask"),
    (_padding, "ones", "no mask"),
    (_padding, "padded", "mask"),
    (_both, "ones", "no mask, causal"),
    (_both, "padded", "mask"),
    (_by_value, "ones", "mask"),
]


@pytest.mark.parametrize(
    ("mask", "given", "flags"), CASES, ids=[f"{m.__name__}-{g}" for m, g, _ in CASES]
)
def test_the_mask_that_is_passed(
    mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], given: str, flags: str
) -> None:
    torch.manual_seed(0)
    model, x = Layers(mask).eval(), torch.randn(3, 5, 16)
    ones = torch.ones(3, 5, dtype=torch.long)
    padded = ones.clone()
    padded[0, 3:] = 0
    mixed = amp.convert(model, (x, ones), rules="fp32", train=False)
    with torch.no_grad():
        for rows in (3, 2):  # other sizes than before, then those again
            for each in (ones, padded, ones):
                want, have = model(x[:rows], each[:rows]), mixed(x[:rows], each[:rows])
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
        last = padded if given == "padded" else ones
        calls = counted(lambda: mixed(x, last)).calls
    assert {name: n for name, n in calls.items() if "attention" in name} == {f"{FLASH}({flags})": 2}
    assert calls["where.self"] == (
        1 if mask in (_both, _padding, _by_value) and flags == "mask" else 0
    )


def test_ones_of_another_kind_are_no_ones() -> None:
    """Packed sequences number their parts: nonzero everywhere, and far from no mask."""

    def parts(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return (given[:, None, :, None] == given[:, None, None, :]).expand(-1, 1, -1, -1)

    torch.manual_seed(0)
    model, x = Layers(parts).eval(), torch.randn(2, 6, 16)
    numbered = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]])
    mixed = amp.convert(model, (x, numbered), rules="fp32", train=False)
    with torch.no_grad():
        for given in (torch.ones_like(numbered), numbered, 2 * torch.ones_like(numbered)):
            torch.testing.assert_close(mixed(x, given), model(x, given), rtol=1e-5, atol=1e-6)


def _kernels(call: Callable[[], Any]) -> list[str]:
    with torch.no_grad():
        call()
        return sorted(name for name in counted(call).calls.elements() if "attention" in name)


def _all_ones(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.ones_like(v) if "attention_mask" in n else v for n, v in kwargs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["padded", "ones"])
@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "vit", "clip", "t5", "whisper", "mixtral"]
)
def test_transformers_get_the_kernels_of_the_low_model(name: str, masks: str) -> None:
    """The frozen model and `.bfloat16()`, which looks at the values of its masks."""
    model, args, kwargs = zoo.example(name)
    if masks == "ones":
        kwargs = _all_ones(kwargs)
    frozen = zoo.converted(name, dtype=torch.bfloat16).freeze()
    low = copy.deepcopy(model).bfloat16().eval()
    floats = {
        n: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in kwargs.items()
    }
    assert _kernels(lambda: frozen(*args, **kwargs)) == _kernels(lambda: low(*args, **floats))
    with zoo.mode(model), torch.no_grad():
        pairs = zip(tensors(model(*args, **kwargs)), tensors(frozen(*args, **kwargs)), strict=True)
        for want, have in pairs:
            assert float((want - have).norm() / want.norm()) < 0.05
