"""A sample of `make hunt`: no planted fault beyond twice its tolerance passes."""

from __future__ import annotations

import pytest

from tests.benchmarks.hunt import hunt
from tests.benchmarks.hunt_faults import SIZED, UNSIZED


@pytest.mark.slow
def test_planted_faults_are_seen() -> None:
    found = hunt(200)
    assert [fault for fault in found if fault.missed] == []
    kinds = {fault.kind for fault in found}
    assert {*SIZED, *UNSIZED, "gradient", "zeroed gradient", "biased metric"} - kinds <= {
        "label",
        "stale buffer",
    }
    # It is no verdict that fails whatever it is shown: most faults within the tolerance pass.
    small = [fault for fault in found if fault.size is not None and fault.size < 1]
    assert sum(not fault.caught for fault in small) > 0.4 * len(small)
