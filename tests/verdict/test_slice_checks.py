"""The worst slice decides, unless FP32's own noise is as large."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.core.slices import SliceKind
from amp_convert.validate.inference.results import Misfit
from amp_convert.verdict.slice_checks import RARE, rarity
from tests.evidence import check, divergence, label, metric, output, piece, verdict

NAN, INF = math.nan, math.inf
CHANNEL, FAINT, SAMPLE = SliceKind.CHANNEL, SliceKind.FAINT_CHANNEL, SliceKind.SAMPLE
CLASS, LARGEST = SliceKind.CLASS, SliceKind.LARGEST


def judged(*pieces: Any, **changes: Any) -> Any:
    row = output(slices=pieces)
    return verdict(divergence(outputs=(row,), autocast_outputs=(row,), **changes))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SliceKind.WHOLE, "outputs.channels"),
        (CHANNEL, "outputs.channels"),
        (SAMPLE, "outputs.samples"),
    ],
)
@pytest.mark.parametrize(
    ("changes", "status", "found"),
    [
        ({"error": 0.02}, "pass", "pass"),
        ({"error": 0.0201}, "fail", "fail"),
        ({"error": NAN}, "fail", "fail"),
        ({"error": INF}, "fail", "fail"),
        ({"error": -1.0}, "fail", "fail"),
        ({"error": 0.5, "noise": 0.02}, "fail", "fail"),
        ({"error": 0.5, "noise": 0.0201}, "unchecked", None),
        ({"error": INF, "noise": INF}, "unchecked", None),
    ],
)
def test_the_worst_slice_decides(
    kind: SliceKind, name: str, changes: dict[str, Any], status: str, found: str | None
) -> None:
    given = judged(piece(kind, **changes))
    assert check(name, given).status == status
    if found:
        assert given.status == found


def test_the_worst_slice_is_named() -> None:
    found = judged(piece(CHANNEL, index=3, dim=1, error=0.3), piece(SAMPLE, batch=2, error=0.4))
    assert check("outputs.channels", found).reason == (
        "channel 3 of dimension 1 of output logits: error 0.3 of its spread (FP32's own noise "
        "1e-07); the smallest tolerance that would pass is 0.3"
    )
    assert check("outputs.samples", found).reason.startswith("sample 3 of batch 2, output logits:")


def test_what_noise_excuses_is_named_and_the_rest_is_judged() -> None:
    noisy = piece(CHANNEL, index=1, dim=1, error=0.9, noise=0.5)
    fine = check("outputs.channels", judged(noisy, piece(CHANNEL, dim=1)))
    assert fine.status == "pass"
    assert "not counted is channel 1 of dimension 1 of output logits" in fine.reason
    bad = check("outputs.channels", judged(noisy, piece(CHANNEL, dim=1, error=0.1)))
    assert (bad.status, bad.value) == ("fail", 0.1)


@pytest.mark.parametrize(
    ("mixed", "status", "found"),
    [(0.97, "unchecked", "inconclusive"), (0.9, "fail", "fail"), (None, "fail", "fail")],
)
def test_a_faint_channel_fails_unless_the_metrics_hold(
    mixed: float | None, status: str, found: str
) -> None:
    metrics = () if mixed is None else (metric(mixed=mixed),)
    row = output(slices=(piece(CHANNEL, dim=1), piece(FAINT, index=6, dim=1, error=1.0)))
    run = divergence(outputs=(row,), autocast_outputs=(row,), metrics=metrics)
    given = verdict(run, metrics_supplied=mixed is not None)
    assert check("outputs.channels", given).status == status
    assert given.status == found


def test_too_few_elements_are_unchecked_and_do_not_block() -> None:
    found = judged()
    assert check("outputs.channels", found).status == "unchecked"
    assert check("outputs.samples", found).status == "unchecked"
    assert found.status == "pass"


@pytest.mark.parametrize(
    ("changed", "elements", "noise", "status"),
    [
        (1, 8, 0.0, "pass"),  # one of eight may be luck
        (3, 8, 0.0, "fail"),
        (2, 100, 0.0, "pass"),
        (8, 100, 0.0, "fail"),
        (50, 100, 0.5, "pass"),  # FP32's own noise changes as many
    ],
)
def test_a_class_of_integers(changed: int, elements: int, noise: float, status: str) -> None:
    one = piece(CLASS, error=changed / elements, elements=elements, noise=noise)
    row = label(slices=(one,))
    found = verdict(divergence(outputs=(row,), autocast_outputs=(row,)))
    assert check("outputs.classes", found).status == status


@pytest.mark.parametrize(
    ("changed", "elements", "status"), [(50, 100, "pass"), (100, 100, "fail"), (8, 8, "pass")]
)
def test_a_class_that_is_lost(changed: int, elements: int, status: str) -> None:
    one = piece(LARGEST, index=4, error=changed / elements, elements=elements, noise=0.0)
    found = check("outputs.classes", judged(piece(), one))
    assert found.status == status
    assert found.reason.startswith("where index 4 is largest in output logits:")


def test_structure_fails_whatever_the_tolerance() -> None:
    row = replace(output(), misfits=2, misfit=Misfit(1, "0 x 4", "16 x 4"))
    one = check("outputs.structure", verdict(divergence(outputs=(row, label()))))
    assert (one.status, one.value) == ("fail", 2.0)
    assert one.reason == ("output logits is 0 x 4 in FP32 and 16 x 4 mixed, on batch 1, and 1 more")


@pytest.mark.parametrize(("count", "total", "share"), [(3, 10, 0.2), (1, 50, 0.01), (7, 7, 0.5)])
def test_rarity_is_the_tail_of_the_binomial(count: int, total: int, share: float) -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert rarity(count, total, share) == pytest.approx(scipy.binom.sf(count - 1, total, share))
    assert rarity(0, total, share) == 1.0
    assert rarity(10**9 // 2, 10**9, 0.01) == 0.0
    assert rarity(20_000, 10**6, 0.0199) == pytest.approx(scipy.binom.sf(19_999, 10**6, 0.0199))
    assert rarity(1, total, 0.0) == 0.0 < RARE
