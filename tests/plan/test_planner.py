"""Whole plans of small models, node by node, under every preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Plan
from amp_convert.rules.load import load_rules
from tests import small_models
from tests.plan.whole_plans import CASTS, MODELS, WHOLE
from tests.small_models import example
from tests.staged import BF16, casts_of, decision, decisions_of, rows, table

# --- whole plans ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "title", "expected"), WHOLE)
def test_whole_plans(model: str, title: str, expected: str) -> None:
    preset, _, mode = title.partition(", ")
    plan = example(model).plan(preset)
    # A long node name stands on a line of its own.
    wanted = rows(expected.replace("#0\n                                |", "#0 |"))
    assert table(plan, mode or "eval") == wanted
    assert casts_of(plan, mode or "eval") == CASTS[model, title]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_fp32_preset_leaves_everything_alone(model: str, mode: str) -> None:
    plan = example(model).plan("fp32")
    assert casts_of(plan, mode) == Casts(0, 0, 0)
    for found in decisions_of(plan, mode):
        assert not found.low
        assert set(found.input_dtypes) <= {None}
        if found.decided and found.rule != "explicit cast":
            assert (found.category, found.rule) == ("deny", "op *")


def test_bf16_takes_the_place_of_fp16() -> None:
    def described(plan: Plan, name: str) -> list[tuple[Any, ...]]:
        inputs = [[i and i.replace(name, "low") for i in d.input_dtypes] for d in plan.eval]
        return [
            (d.node, d.category, d.rule, d.low, d.dtype.replace(name, "low"), cast)
            for d, cast in zip(plan.eval, inputs, strict=True)
        ]

    for model in MODELS:
        half, brain = example(model).plan(), example(model).plan("default", BF16)
        assert (half.dtype, brain.dtype) == ("float16", "bfloat16")
        assert described(half, "float16") == described(brain, "bfloat16")
        assert half.eval_casts == brain.eval_casts


def test_a_decision_says_where_it_comes_from() -> None:
    plan = example("block").plan()
    found = decision(plan, "up/linear#0")
    assert (found.layer, found.op) == ("up", "aten.linear")
    assert found.module == "torch.nn.modules.linear.Linear"
    assert found.macs == 2 * 8 * 16
    name, _, line = found.source.rpartition(":")
    assert name == "default.toml"
    lines = (Path(__file__).parents[2] / "rules" / "default.toml").read_text().splitlines()
    assert lines[int(line) - 1] == "[[rule]]"
    assert lines[int(line)].startswith('ops = ["aten.linear", ')
    softmax = decision(plan, "/softmax#0")
    assert softmax.module.endswith("small_models.Block")
    file, _, line = softmax.location.rpartition(":")
    assert file.endswith("small_models.py")
    assert ".softmax(-1)" in Path(small_models.__file__).read_text().splitlines()[int(line) - 1]


def test_a_plan_says_what_it_rests_on() -> None:
    plan = example("block").plan("autocast", BF16)
    assert (plan.dtype, plan.device, plan.painting) == ("bfloat16", "cpu", "autocast")
    assert (plan.rules, plan.calibration_batches) == (("autocast.toml",), 1)
    assert plan.uncaptured == ()


def test_reasons_say_what_painting_did() -> None:
    plan = example("gated").plan()
    assert decision(plan, "/tanh#0").reason.endswith("; joins the low-precision ops around it")
    assert decision(plan, "/div#0").reason.endswith("; follows aten.exp, which stays in FP32")
    assert decision(plan, "/gt#0").reason.endswith(
        "; not between two low-precision ops, so a cast would gain nothing"
    )
    assert ";" not in decision(plan, "/exp#0").reason


def test_a_rule_of_the_users_that_matches_nothing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "".join(
            f"[[rule]]\n{target}\ncategory = 'deny'\nreason = 'r'\n"
            for target in ("layer = 'up'", "layer = 'upp'", "node = 'down/aten.linear#0'",
                           "node = 'down/aten.linear#1'", "module = 'torch.nn.LayerNorm'",
                           "module = 'torch.nn.Layernorm'", "op = 'aten.conv2d'")
        ),
        encoding="utf-8",
    )  # fmt: skip
    found = example("block").plan(load_rules(["default", str(file)]))
    assert found.unmatched_rules == (
        "layer upp (mine.toml:5; the nearest is up)",
        "node down/aten.linear#1 (mine.toml:13; the nearest is down/aten.linear#0)",
        "module torch.nn.Layernorm (mine.toml:21; the nearest is "
        "torch.nn.modules.normalization.LayerNorm)",
    )
