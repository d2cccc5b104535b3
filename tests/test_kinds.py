"""A sample of `make kinds`: whatever a model is like, it ends in a verdict or in a refusal."""

from __future__ import annotations

import pytest

from tests.benchmarks.kinds import FAULT, judged
from tests.benchmarks.kinds_models import KINDS

SAMPLE = {
    "foreign-quantised": "pass",
    "gan-generator": "pass",
    "foreign-numpy": "pass",
    "foreign-own-only": "refused (4)",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_ends_as_it_should(name: str) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == name)
    row = judged(kind)
    assert row.verdict == SAMPLE[name], row.why
    assert row.verdict != FAULT


def test_there_are_thirty_models_of_many_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 32
    assert len({kind.field for kind in KINDS}) >= 10
    assert 2 * sum(kind.loss is not None for kind in KINDS) >= len(KINDS)
