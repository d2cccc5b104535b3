"""The rewrites `scale_scores` and `rescale_layers`: products out of range that need not retreat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rewrites
from tests.plan.rescaled import (
    SCALINGS,
    attention,
    error,
    guards_of,
    outputs,
    scaled,
)
from tests.staged import F16, rows, table

OFF = replace(load_rules(["default"]), rewrites=Rewrites(clamp_masks=True))


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALINGS.values(), ids=SCALINGS)
def test_scores_that_are_scaled_before_are_as_good_as_in_fp32(
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    of = attention(scale)
    assert of.plan().share_macs_low() == 1
    assert guards_of(of.plan()) == set()
    assert guards_of(of.plan(OFF)) == {"guard activation-range"}
    assert of.plan(OFF).share_macs_low() < 1
    # What retreats is not rounded: scores of up to 7.
    assert error(of) <= error(of, OFF) + torch.finfo(F16).eps


@pytest.mark.slow
def test_the_whole_plan_of_scores() -> None:
    of = attention()
    assert scaled(of.plan()) == {
        "/matmul": (2.0**-7, (2.0**-7, 1.0), 1.0),
        "/div": (1.0, (), 2.0**-7),
    }
    assert table(of.plan())[-7:] == rows(
        """
        /transpose#0  | clear | op transpose | f16 | low | .
        /matmul#0     | allow | op matmul    | f16 | low | . .
        /div#0        | infer | op div       | f16 | low | .
        /reshape#0    | clear | op reshape   | f16 | low | .
        /softmax#0    | infer | op softmax   | f16 | low | .
        /matmul#1     | allow | op matmul    | f16 | low | . .
        out/linear#0  | allow | op linear    | f16 | low | . f16 f16
        """
    )
    reasons = {d.node: d.why for d in of.plan().eval if d.rewrites}
    assert reasons.keys() == {"/aten.matmul#0", "/aten.div#0"}
    assert reasons["/aten.matmul#0"].endswith(
        "its result is held times 0.0078125 (rewrite scale_scores)"
    )
    assert reasons["/aten.div#0"].endswith(
        "it takes the factor of what it reads back (rewrite scale_scores)"
    )


def test_the_bits_are_those_of_a_query_that_is_scaled_by_hand() -> None:
    of = attention()
    half = copy.deepcopy(of.model).eval().half()
    with torch.no_grad():
        q, k, v = half.qkv(of.args[0].half()).chunk(3, -1)
        scores = (q * 2.0**-7) @ k.transpose(-1, -2) / (1e5 / 128)
        want = half.out(torch.softmax(scores, -1) @ v).float()
    assert torch.equal(outputs(of), want)
