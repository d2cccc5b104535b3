"""Fixtures of the tests in this folder."""

from __future__ import annotations

import pytest
import torch

from tests.property.identity_runs import (
    FURTHER,
)
from tests.zoo import (
    Example,
)


@pytest.fixture
def built(further: str) -> Example:
    torch.manual_seed(0)
    model, args, kwargs = FURTHER[further]()
    return model.eval(), args, kwargs
