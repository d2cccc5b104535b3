"""The presets `apex-o1`, `apex-o2` and `apex-o3` are NVIDIA Apex amp's optimization levels.

Oracles: the lists of Apex's source, written down here as facts; a function mode that casts as
Apex's patches do, for O1; and the eager model cast as `amp.initialize` casts it, for O2 and O3.
"""

from __future__ import annotations

import pytest

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import GuardLimits, Painting
from tests.rules.apex_models import CASTS, staged
from tests.staged import casts_of, rows, table

O1 = {
    ("cnn", "eval"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op conv2d  | f16 | low | f16 f16
        norm/_native_batch_norm_legit_no_training#0
                                | clear | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        /relu#0                 | clear | op *       | f16 | low | .
        pool/max_pool2d#0       | clear | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | clear | op *       | f16 | low | .
        /reshape#0              | clear | op *       | f16 | low | .
        head/linear#0           | allow | op linear  | f16 | low | . f16 f16
        /softmax#0              | deny  | op softmax | f32 | -   | f32
    """,
    ("cnn", "train"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op conv2d  | f16 | low | f16 f16
        norm/add#0              | none  |            | i64 | -   | .
        norm/_native_batch_norm_legit_functional#0
                                | clear | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        norm/operator.getitem#1 | none  |            | f32 | -   |
        norm/operator.getitem#2 | none  |            | f32 | -   |
        /relu#0                 | clear | op *       | f16 | low | .
        pool/max_pool2d#0       | clear | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | clear | op *       | f16 | low | .
        /reshape#0              | clear | op *       | f16 | low | .
        head/linear#0           | allow | op linear  | f16 | low | . f16 f16
        /softmax#0              | deny  | op softmax | f32 | -   | f32
    """,
    ("block", "eval"): """
        norm/layer_norm#0    | deny  | op layer_norm | f32 | -   | . . .
        qkv/linear#0         | allow | op linear     | f16 | low | f16 f16 f16
        /split#0             | clear | op *          | f16 | low | .
        /operator.getitem#0  | none  |               | f16 | -   |
        /operator.getitem#1  | none  |               | f16 | -   |
        /operator.getitem#2  | none  |               | f16 | -   |
        /transpose#0         | clear | op *          | f16 | low | .
        /matmul#0            | allow | op matmul     | f16 | low | . .
        /div#0               | infer | op div        | f16 | low | .
        /softmax#0           | deny  | op softmax    | f32 | -   | f32
        /matmul#1            | allow | op matmul     | f16 | low | f16 .
        /add#0               | infer | op add        | f32 | -   | . f32
        up/linear#0          | allow | op linear     | f16 | low | f16 f16 f16
        /gelu#0              | deny  | op gelu       | f32 | -   | f32
        down/linear#0        | allow | op linear     | f16 | low | f16 f16 f16
        /add#1               | infer | op add        | f32 | -   | . f32
        /softmax#1           | deny  | op softmax    | f32 | -   | .
        /broadcast_tensors#0 | clear | op *          | f32 | -   | . .
        /operator.getitem#3  | none  |               | f32 | -   |
        /operator.getitem#4  | none  |               | f32 | -   |
        /mse_loss#0          | deny  | op mse_loss   | f32 | -   | . .
    """,
}


O2 = {
    ("cnn", "eval"): """
        /sym_size#0             | none  |                 |     | -   | .
        conv/conv2d#0           | allow | op *            | f16 | low | f16 f16
        norm/_native_batch_norm_legit_no_training#0
                                | allow | op *batch_norm* | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |                 | f16 | -   |
        /relu#0                 | allow | op *            | f16 | low | .
        pool/max_pool2d#0       | allow | op *            | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *            | f16 | low | .
        /reshape#0              | allow | op *            | f16 | low | .
        head/linear#0           | allow | op *            | f16 | low | . f16 f16
        /softmax#0              | allow | op *            | f16 | low | .
    """,
    ("cnn", "train"): """
        /sym_size#0             | none  |                 |     | -   | .
        conv/conv2d#0           | allow | op *            | f16 | low | f16 f16
        norm/add#0              | none  |                 | i64 | -   | .
        norm/_native_batch_norm_legit_functional#0
                                | allow | op *batch_norm* | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |                 | f16 | -   |
        norm/operator.getitem#1 | none  |                 | f32 | -   |
        norm/operator.getitem#2 | none  |                 | f32 | -   |
        /relu#0                 | allow | op *            | f16 | low | .
        pool/max_pool2d#0       | allow | op *            | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *            | f16 | low | .
        /reshape#0              | allow | op *            | f16 | low | .
        head/linear#0           | allow | op *            | f16 | low | . f16 f16
        /softmax#0              | allow | op *            | f16 | low | .
    """,
    ("block", "eval"): """
        norm/layer_norm#0    | allow | op * | f16 | low | f16 . .
        qkv/linear#0         | allow | op * | f16 | low | . f16 f16
        /split#0             | allow | op * | f16 | low | .
        /operator.getitem#0  | none  |      | f16 | -   |
        /operator.getitem#1  | none  |      | f16 | -   |
        /operator.getitem#2  | none  |      | f16 | -   |
        /transpose#0         | allow | op * | f16 | low | .
        /matmul#0            | allow | op * | f16 | low | . .
        /div#0               | allow | op * | f16 | low | .
        /softmax#0           | allow | op * | f16 | low | .
        /matmul#1            | allow | op * | f16 | low | . .
        /add#0               | allow | op * | f16 | low | f16 .
        up/linear#0          | allow | op * | f16 | low | . f16 f16
        /gelu#0              | allow | op * | f16 | low | .
        down/linear#0        | allow | op * | f16 | low | . f16 f16
        /add#1               | allow | op * | f16 | low | . .
        /softmax#1           | allow | op * | f16 | low | .
        /broadcast_tensors#0 | allow | op * | f16 | low | . f16
        /operator.getitem#3  | none  |      | f16 | -   |
        /operator.getitem#4  | none  |      | f16 | -   |
        /mse_loss#0          | allow | op * | f16 | low | . .
    """,
}


# BatchNorm's statistics stay FP32 in O3 as well: see the head of its rules file.
O3 = {key: text.replace("op *batch_norm*", "op *           ") for key, text in O2.items()}


WHOLE = [
    (preset, model, mode, expected)
    for preset, plans in [("apex-o1", O1), ("apex-o2", O2), ("apex-o3", O3)]
    for (model, stated), expected in plans.items()
    for mode in (["eval", "train"] if model == "block" else [stated])
]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "model", "mode", "expected"), WHOLE)
def test_whole_plans(preset: str, model: str, mode: str, expected: str) -> None:
    plan = staged(model).plan(preset)
    # A long node name stands on a line of its own.
    assert table(plan, mode) == rows(
        expected.replace("#0\n                                |", "#0 |")
    )
    assert casts_of(plan, mode) == CASTS[preset, model]


@pytest.mark.parametrize("preset", ["apex-o1", "apex-o2", "apex-o3"])
def test_apex_looks_at_no_ranges(preset: str) -> None:
    rules = load_rules([preset])
    assert set(vars(rules.guards)) == set(vars(GuardLimits()))
    assert set(vars(rules.guards).values()) == {False}
    assert (rules.painting is Painting.AUTOCAST) == (preset == "apex-o1")
