"""`make hunt`: faults planted in converted models, and whether the verdict sees them.

Each model is captured once. A fault is an edit of its mixed graph, taken back afterwards: what a
wrong kernel, a wrong cast or a wrong index would do to one channel, one sample, one class, one
batch, one buffer, one mask, one head's gradient, one metric. A fault with a size is sized in units
of the output: of the spread of the slice that it hits. Beyond twice the tolerance none may pass; of
the kinds without a size, none at all. The smallest fault that was caught is printed for each kind.

`python -m tests.benchmarks.hunt [FAULTS]` plants so many, by default `FAULTS`.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Iterator

from tests.benchmarks.hunt_faults import (
    SIZED,
    UNSIZED,
    Fault,
    biased_metric,
    floats,
    missing_metric,
    wrong_mask,
)
from tests.benchmarks.hunt_gradients import gradient
from tests.benchmarks.hunt_models import DTYPES, MODELS, SIZES, Plant, Subject

FAULTS = 400


# --- models --------------------------------------------------------------------------------------


# --- faults --------------------------------------------------------------------------------------


# --- the hunt ------------------------------------------------------------------------------------


def hunt(faults: int = FAULTS, models: list[str] | None = None, seed: int = 0) -> list[Fault]:
    """Plant `faults` faults, of all kinds in turn, and say which were caught."""
    luck = random.Random(seed)
    subjects = [Subject.of(name, dtype) for dtype in DTYPES for name in models or MODELS]
    for subject in subjects:
        assert subject.verdict() == "pass", f"{subject.name} does not pass without a fault"
    found: list[Fault] = []
    while len(found) < faults:
        before = len(found)
        for subject in subjects:
            found += _round(subject, luck)
        assert len(found) > before
    return found[:faults]


def _round(subject: Subject, luck: random.Random) -> Iterator[Fault]:
    """One fault of each kind, of each size."""
    has_floats, name = bool(floats(subject)), subject.name
    for kind, make in SIZED.items():
        for size in SIZES:
            if kind != "label" and not has_floats:
                continue
            if (plant := make(subject, size, luck)) is not None:
                yield Fault(kind, name, size, _is_caught(subject, plant))
    for kind, make in UNSIZED.items():
        if (plant := make(subject, luck)) is not None:
            yield Fault(kind, name, None, _is_caught(subject, plant))
    for size in SIZES:
        yield Fault("biased metric", name, size, biased_metric(subject, size))
    yield Fault("missing metric", name, None, missing_metric(subject))
    if name == "padded":
        yield Fault("wrong mask", name, None, wrong_mask(subject))
    if has_floats:
        yield Fault("zeroed gradient", name, None, gradient(subject, 0.0, luck))
        for size in SIZES:
            factor = 1 + size * subject.limits.layer_gradient_rel_l2
            yield Fault("gradient", name, size, gradient(subject, factor, luck))


def _is_caught(subject: Subject, plant: Plant) -> bool:
    with subject.planted(plant):
        return subject.verdict() != "pass"


def main() -> int:
    """Print what was caught of each kind; 1 where a fault was missed."""
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    found = hunt(int(sys.argv[1]) if len(sys.argv) > 1 else FAULTS)
    print(f"{'kind':17} {'planted':>7} {'caught':>7} {'smallest caught':>16}  largest that passed")
    for kind in dict.fromkeys(fault.kind for fault in found):
        mine = [fault for fault in found if fault.kind == kind]
        caught = [fault.size for fault in mine if fault.caught and fault.size is not None]
        passed = [fault.size for fault in mine if not fault.caught and fault.size is not None]
        least = f"{min(caught):.3g} tolerances" if caught else ""
        most = f"{max(passed):.3g} tolerances" if passed else ""
        hits = sum(fault.caught for fault in mine)
        print(f"{kind:17} {len(mine):7} {hits:7} {least:>16}  {most}")
    missed = [fault for fault in found if fault.missed]
    took = time.perf_counter() - begin
    print(f"\n{len(found)} faults in {took:.0f} s, {len(missed)} missed that must be seen")
    for fault in missed:
        print(f"  {fault.kind} in {fault.model}, size {fault.size}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
