"""Small models of many kinds, a module a field, written as their authors would write them."""

from tests.benchmarks.kinds_models import (
    audio,
    control,
    foreign,
    generative,
    graph,
    physics,
    recommend,
    sequences,
    vision,
)
from tests.benchmarks.kinds_models.kind import Kind

__all__ = ["KINDS", "Kind"]

KINDS: tuple[Kind, ...] = (
    *graph.KINDS,
    *audio.KINDS,
    *vision.KINDS,
    *generative.KINDS,
    *physics.KINDS,
    *recommend.KINDS,
    *sequences.KINDS,
    *control.KINDS,
    *foreign.KINDS,
)
