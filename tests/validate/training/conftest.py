"""Fixtures of the tests in this folder."""

from __future__ import annotations

import pytest
import torch

from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.seed_spread import (
    SeedSpread,
)
from tests.training import convert_net
from tests.validate.training.seeded_training import make


@pytest.fixture(scope="module")
def mixed() -> ConvertedModel:
    return convert_net(torch.float16)


@pytest.fixture(scope="module")
def made() -> SeedSpread:
    return make()
