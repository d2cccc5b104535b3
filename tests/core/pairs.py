"""What tests of this folder share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st

from amp_convert.core import tensor_errors as error_metrics

Pairs = list[tuple[float, float]]
"""Elements of a reference, each with the value to compare with it."""


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, 65504.0, 6e-8, 1.0]


any_float = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL))


def pairs_of(element: st.SearchStrategy[float]) -> st.SearchStrategy[Pairs]:
    """Pairs of reference and value; half of them equal, as most elements of a tensor nearly are."""
    equal = element.map(lambda x: (x, x))
    return st.lists(st.one_of(st.tuples(element, element), equal), max_size=40)


def tensors(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """So small that every tensor here is cut into several."""
    before, error_metrics.CHUNK = error_metrics.CHUNK, 7
    yield
    error_metrics.CHUNK = before
