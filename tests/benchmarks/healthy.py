"""`make healthy`: models with nothing wrong, and whether the verdict lets them pass.

Each model of `healthy_models` is trained, converted to FP16 and to BF16 with default settings, and
judged end to end, its training included. None may fail; at least 95 % have to pass; and what is
inconclusive shows its reason, to be read.

`python -m tests.benchmarks.healthy [NAME ...]` takes some of them.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

import amp_convert as amp
from tests.benchmarks.healthy_data import RECORDING
from tests.benchmarks.healthy_models import HEALTHY, Healthy

DTYPES = (torch.float16, torch.bfloat16)
SHARE = 0.95
"""Of the runs, so many have to pass."""


@dataclass(frozen=True)
class Result:
    """What the verdict was for one model and dtype, and what decided it where it is no pass."""

    name: str
    dtype: str
    status: str
    why: str


def judged(model: Healthy) -> Iterator[Result]:
    """The results of one model, in each dtype."""
    trained = model.trained()
    inputs = model.evals()[0][0]
    for dtype in DTYPES:
        run = amp.check(
            trained,
            inputs,
            dtype=dtype,
            eval_batches=model.evals,
            metrics=model.metrics,
            lower_is_better=model.lower_is_better,
            train_batches=lambda seed: islice(model.train_batches(seed), 400),
            loss=model.loss,
            optimizer=model.optimizer,
            initial_model=model.initial,
            name=model.name,
        )
        checks = run.verdict.checks
        decisive = [c for c in checks if c.status == "fail"] or [
            c for c in checks if c.required and c.status == "unchecked"
        ]
        why = "; ".join(f"{check.name}: {check.reason}" for check in decisive)
        yield Result(model.name, str(dtype).removeprefix("torch."), str(run.verdict.status), why)


def available() -> list[Healthy]:
    """All models whose data is there: a slim Python lacks the recording."""
    return [m for m in HEALTHY if RECORDING.exists() or not m.name.startswith("audio")]


def main() -> int:
    """Print every result; 1 where one fails, or too few pass."""
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    results: list[Result] = []
    for model in available():
        if sys.argv[1:] and model.name not in sys.argv[1:]:
            continue
        for result in judged(model):
            results.append(result)
            print(f"{result.status:13} {result.name:24} {result.dtype:9} {result.why}", flush=True)
    counts = {status: sum(r.status == status for r in results) for status in
              ("pass", "inconclusive", "fail")}  # fmt: skip
    took = time.perf_counter() - begin
    print(f"\n{len(results)} runs in {took:.0f} s: {counts}")
    return 1 if counts["fail"] or counts["pass"] < SHARE * len(results) else 0


if __name__ == "__main__":
    sys.exit(main())
