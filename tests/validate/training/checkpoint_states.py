"""What tests of this folder share."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.bits import assert_same_bits


def a_state(seed: int = 0) -> dict[str, Any]:
    """What an optimizer's state is made of, and the awkward tensors."""
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 6, generator=source)
    return {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": base.half()}, 1: {}},
            "param_groups": [
                {"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "amsgrad": False}
            ],
        },
        "tied": [base, base, base.t(), base[:, 1:3]],
        "rng": (torch.get_rng_state(), None),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "losses": [1.5, math.nan, math.inf, -math.inf, -0.0, 5e-324],
        "counts": {-24: 7, 3: 1},
        "words": {"$tensor": "not one", "note": "nul \0 and ünicode"},
        "seed": seed,
    }


def assert_same(want: Any, have: Any) -> None:
    """The same structure and types; tensors and floats by their bits."""
    assert type(want) is type(have)
    if isinstance(want, torch.Tensor):
        assert_same_bits(want, have)
    elif isinstance(want, dict):
        assert list(want) == list(have)
        for key in want:
            assert_same(want[key], have[key])
    elif isinstance(want, list | tuple):
        assert len(want) == len(have)
        for one, other in zip(want, have, strict=True):
            assert_same(one, other)
    else:
        assert repr(want) == repr(have)
