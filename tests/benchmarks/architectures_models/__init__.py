"""`make architectures`: public architectures in tiny configurations, by where they come from."""

from __future__ import annotations

from tests.benchmarks.architectures_models.architecture import Architecture as Architecture
from tests.benchmarks.architectures_models.other_sources import ARCHITECTURES as OTHERS
from tests.benchmarks.architectures_models.pictures import ARCHITECTURES as PICTURES
from tests.benchmarks.architectures_models.texts import ARCHITECTURES as TEXTS

ARCHITECTURES = (*TEXTS, *PICTURES, *OTHERS)
