"""Whole plans of small models, node by node, under every preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Plan
from amp_convert.rules.load import load_rules
from tests import small_models
from tests.small_models import example
from tests.staged import BF16, casts_of, decision, decisions_of, rows, table

# --- whole plans ---------------------------------------------------------------------------------


BLOCK = {
    "default": """
        up/linear#0       | allow | op linear     | f16 | low | f16 f16 f16
        norm/layer_norm#0 | infer | op layer_norm | f16 | low | . . .
        /gelu#0           | infer | op gelu       | f16 | low | .
        down/linear#0     | allow | op linear     | f16 | low | . f16 f16
        /add#0            | infer | op add        | f32 | -   | . f32
        /softmax#0        | infer | op softmax    | f32 | -   | .
    """,
    "autocast": """
        up/linear#0       | allow | op linear.default | f16 | low | f16 f16 f16
        norm/layer_norm#0 | clear | op *              | f16 | low | . . .
        /gelu#0           | clear | op *              | f16 | low | .
        down/linear#0     | allow | op linear.default | f16 | low | . f16 f16
        /add#0            | clear | op *              | f32 | -   | . .
        /softmax#0        | clear | op *              | f32 | -   | .
    """,
    "half": """
        up/linear#0       | allow | op * | f16 | low | f16 f16 f16
        norm/layer_norm#0 | allow | op * | f16 | low | . . .
        /gelu#0           | allow | op * | f16 | low | .
        down/linear#0     | allow | op * | f16 | low | . f16 f16
        /add#0            | allow | op * | f16 | low | f16 .
        /softmax#0        | allow | op * | f16 | low | .
    """,
}


CNN = {
    "default": """
        c1/conv2d#0             | allow | op conv2d                   | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | infer | op _native_batch_norm_legit* | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | clear | op relu                     | f16 | low | .
        c2/conv2d#0             | allow | op conv2d                   | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | infer | op _native_batch_norm_legit* | f32 | -   | f32 . . . .
        b2/operator.getitem#0   | none  |                             | f32 | -   |
        act/relu#1              | clear | op relu                     | f32 | -   | .
        /mean#0                 | deny  | op mean                     | f32 | -   | .
        head/linear#0           | allow | op linear                   | f16 | low | f16 f16 f16
    """,
    "default, train": """
        c1/conv2d#0             | allow | op conv2d                   | f16 | low | f16 f16
        b1/add#0                | none  |                             | i64 | -   | .
        b1/_native_batch_norm_legit_functional#0
                                | infer | op _native_batch_norm_legit* | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        b1/operator.getitem#1   | none  |                             | f32 | -   |
        b1/operator.getitem#2   | none  |                             | f32 | -   |
        act/relu#0              | clear | op relu                     | f16 | low | .
        c2/conv2d#0             | allow | op conv2d                   | f16 | low | . f16 f16
        b2/add#0                | none  |                             | i64 | -   | .
        b2/_native_batch_norm_legit_functional#0
                                | infer | op _native_batch_norm_legit* | f32 | -   | f32 . . . .
        b2/operator.getitem#0   | none  |                             | f32 | -   |
        b2/operator.getitem#1   | none  |                             | f32 | -   |
        b2/operator.getitem#2   | none  |                             | f32 | -   |
        act/relu#1              | clear | op relu                     | f32 | -   | .
        /mean#0                 | deny  | op mean                     | f32 | -   | .
        head/linear#0           | allow | op linear                   | f16 | low | f16 f16 f16
    """,
    "autocast": """
        c1/conv2d#0             | allow | op conv2d.default           | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | clear | op *                        | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | clear | op *                        | f16 | low | .
        c2/conv2d#0             | allow | op conv2d.default           | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | clear | op *                        | f16 | low | . . . . .
        b2/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#1              | clear | op *                        | f16 | low | .
        /mean#0                 | clear | op *                        | f16 | low | .
        head/linear#0           | allow | op linear.default           | f16 | low | . f16 f16
    """,
    "half": """
        c1/conv2d#0             | allow | op *                        | f16 | low | f16 f16
        b1/_native_batch_norm_legit_no_training#0
                                | allow | op *                        | f16 | low | . . . . .
        b1/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#0              | allow | op *                        | f16 | low | .
        c2/conv2d#0             | allow | op *                        | f16 | low | . f16 f16
        b2/_native_batch_norm_legit_no_training#0
                                | allow | op *                        | f16 | low | . . . . .
        b2/operator.getitem#0   | none  |                             | f16 | -   |
        act/relu#1              | allow | op *                        | f16 | low | .
        /mean#0                 | allow | op *                        | f16 | low | .
        head/linear#0           | allow | op *                        | f16 | low | . f16 f16
    """,
}


ATTENTION = {
    "default": """
        qkv/linear#0        | allow | op linear     | f16  | low | f16 f16 f16
        /split#0            | clear | op split      | f16  | low | .
        /operator.getitem#0 | none  |               | f16  | -   |
        /operator.getitem#1 | none  |               | f16  | -   |
        /operator.getitem#2 | none  |               | f16  | -   |
        /arange#0           | none  |               | i64  | -   |
        /slice#0            | none  |               | i64  | -   | .
        /unsqueeze#0        | none  |               | i64  | -   | .
        /lt#0               | none  |               | bool | -   | . .
        /transpose#0        | clear | op transpose  | f16  | low | .
        /matmul#0           | allow | op matmul     | f16  | low | . .
        /mul#0              | infer | op mul        | f32  | -   | f32
        /slice#1            | none  |               | bool | -   | .
        /unsqueeze#1        | none  |               | bool | -   | .
        /min#0              | clear | op min        | f32  | -   | .
        /sub#0              | infer | op sub        | f32  | -   | .
        /where#0            | clear | op where      | f32  | -   | . . .
        /to#0               | deny  | explicit cast | f32  | -   | .
        /softmax#0          | infer | op softmax    | f32  | -   | .
        /matmul#1           | allow | op matmul     | f16  | low | f16 .
        out/linear#0        | allow | op linear     | f16  | low | . f16
    """,
    "autocast": """
        qkv/linear#0        | allow | op linear.default | f16  | low | f16 f16 f16
        /split#0            | clear | op *              | f16  | low | .
        /operator.getitem#0 | none  |                   | f16  | -   |
        /operator.getitem#1 | none  |                   | f16  | -   |
        /operator.getitem#2 | none  |                   | f16  | -   |
        /arange#0           | none  |                   | i64  | -   |
        /slice#0            | none  |                   | i64  | -   | .
        /unsqueeze#0        | none  |                   | i64  | -   | .
        /lt#0               | none  |                   | bool | -   | . .
        /transpose#0        | clear | op *              | f16  | low | .
        /matmul#0           | allow | op matmul.default | f16  | low | . .
        /mul#0              | clear | op *              | f16  | low | .
        /slice#1            | none  |                   | bool | -   | .
        /unsqueeze#1        | none  |                   | bool | -   | .
        /min#0              | clear | op *              | f16  | low | .
        /sub#0              | clear | op *              | f16  | low | .
        /where#0            | clear | op *              | f16  | low | . . .
        /to#0               | deny  | explicit cast     | f32  | -   | .
        /softmax#0          | clear | op *              | f32  | -   | .
        /matmul#1           | allow | op matmul.default | f16  | low | f16 .
        out/linear#0        | allow | op linear.default | f16  | low | . f16
    """,
    "half": """
        qkv/linear#0        | allow | op *          | f16  | low | f16 f16 f16
        /split#0            | allow | op *          | f16  | low | .
        /operator.getitem#0 | none  |               | f16  | -   |
        /operator.getitem#1 | none  |               | f16  | -   |
        /operator.getitem#2 | none  |               | f16  | -   |
        /arange#0           | none  |               | i64  | -   |
        /slice#0            | none  |               | i64  | -   | .
        /unsqueeze#0        | none  |               | i64  | -   | .
        /lt#0               | none  |               | bool | -   | . .
        /transpose#0        | allow | op *          | f16  | low | .
        /matmul#0           | allow | op matmul     | f16  | low | . .
        /mul#0              | allow | op *          | f16  | low | .
        /slice#1            | none  |               | bool | -   | .
        /unsqueeze#1        | none  |               | bool | -   | .
        /min#0              | allow | op *          | f16  | low | .
        /sub#0              | allow | op *          | f16  | low | .
        /where#0            | allow | op *          | f16  | low | . . .
        /to#0               | deny  | explicit cast | f32  | -   | .
        /softmax#0          | allow | op *          | f16  | low | f16
        /matmul#1           | allow | op matmul     | f16  | low | . .
        out/linear#0        | allow | op *          | f16  | low | . f16
    """,
}


GATED = {
    "default": """
        a/linear#0          | allow | op linear | f16  | low | f16 f16 f16
        /split#0            | clear | op split  | f16  | low | .
        /operator.getitem#0 | none  |           | f16  | -   |
        /operator.getitem#1 | none  |           | f16  | -   |
        /exp#0              | deny  | op exp    | f32  | -   | f32
        /sum#0              | deny  | op sum    | f32  | -   | .
        /add#0              | infer | op add    | f32  | -   | .
        /div#0              | infer | op div    | f32  | -   | . .
        /relu#0             | clear | op relu   | f16  | low | f16
        /tanh#0             | infer | op tanh   | f16  | low | .
        /mul#0              | infer | op mul    | f16  | low | . f16
        /cat#0              | clear | op cat    | f16  | low | . .
        b/linear#0          | allow | op linear | f16  | low | . f16 f16
        /gt#0               | clear | op gt     | bool | -   | .
        /sum#1              | none  |           | i64  | -   | .
    """,
    "autocast": """
        a/linear#0          | allow | op linear.default | f16  | low | f16 f16 f16
        /split#0            | clear | op *              | f16  | low | .
        /operator.getitem#0 | none  |                   | f16  | -   |
        /operator.getitem#1 | none  |                   | f16  | -   |
        /exp#0              | clear | op *              | f16  | low | .
        /sum#0              | clear | op *              | f16  | low | .
        /add#0              | clear | op *              | f16  | low | .
        /div#0              | clear | op *              | f16  | low | . .
        /relu#0             | clear | op *              | f16  | low | .
        /tanh#0             | clear | op *              | f16  | low | .
        /mul#0              | clear | op *              | f16  | low | . .
        /cat#0              | infer | op cat.default    | f16  | low | . .
        b/linear#0          | allow | op linear.default | f16  | low | . f16 f16
        /gt#0               | clear | op *              | bool | -   | .
        /sum#1              | none  |                   | i64  | -   | .
    """,
    "half": """
        a/linear#0          | allow | op * | f16  | low | f16 f16 f16
        /split#0            | allow | op * | f16  | low | .
        /operator.getitem#0 | none  |      | f16  | -   |
        /operator.getitem#1 | none  |      | f16  | -   |
        /exp#0              | allow | op * | f16  | low | .
        /sum#0              | allow | op * | f16  | low | .
        /add#0              | allow | op * | f16  | low | .
        /div#0              | allow | op * | f16  | low | . .
        /relu#0             | allow | op * | f16  | low | .
        /tanh#0             | allow | op * | f16  | low | .
        /mul#0              | allow | op * | f16  | low | . f16
        /cat#0              | allow | op * | f16  | low | . .
        b/linear#0          | allow | op * | f16  | low | . f16 f16
        /gt#0               | allow | op * | bool | low | f16
        /sum#1              | none  |      | i64  | -   | .
    """,
}

MODELS = ("block", "cnn", "attention", "gated")
WHOLE = [
    (model, title, expected)
    for model, plans in [("block", BLOCK), ("cnn", CNN), ("attention", ATTENTION), ("gated", GATED)]
    for title, expected in plans.items()
]
CASTS = {
    ("block", "default"): Casts(2, 4, 6),
    ("block", "autocast"): Casts(1, 4, 5),
    ("block", "half"): Casts(2, 4, 7),
    ("cnn", "default"): Casts(4, 5, 9),
    ("cnn", "default, train"): Casts(4, 5, 9),
    ("cnn", "autocast"): Casts(2, 5, 7),
    ("cnn", "half"): Casts(2, 5, 7),
    ("attention", "default"): Casts(4, 3, 7),
    ("attention", "autocast"): Casts(3, 3, 6),
    ("attention", "half"): Casts(3, 3, 6),
    ("gated", "default"): Casts(4, 5, 9),
    ("gated", "autocast"): Casts(3, 4, 7),
    ("gated", "half"): Casts(3, 5, 9),
}


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
