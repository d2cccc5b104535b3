"""The preset `keras-mixed-float16` is Keras's dtype policy mixed_float16.

Every layer computes in float16 from float32 variables, the last softmax and losses in float32.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.plan.costs import Casts
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import GuardLimits, Painting
from tests.small_models import ramp
from tests.staged import BF16, F16, F32, Staged, casts_of, decision, low, rows, same_bits, table

PRESET = "keras-mixed-float16"


class Classifier(nn.Module):
    """A convolutional network that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)).softmax(-1)


class Block(nn.Module):
    """Attention and a feed-forward part by hand, a softmax at the end, and a loss of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        y = (x + self.down(F.gelu(self.up(x)))).softmax(-1)
        return y, F.mse_loss(y, target)


@cache
def staged(name: str) -> Staged:
    torch.manual_seed(0)
    if name == "cnn":
        return Staged.of(Classifier(), ramp(2, 1, 8, 8))
    return Staged.of(Block(), ramp(2, 3, 8), ramp(2, 3, 8).softmax(-1))


# --- whole plans ---------------------------------------------------------------------------------


WHOLE = {
    ("cnn", "eval"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op *       | f16 | low | f16 f16
        norm/_native_batch_norm_legit_no_training#0
                                | allow | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        /relu#0                 | allow | op *       | f16 | low | .
        pool/max_pool2d#0       | allow | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *       | f16 | low | .
        /reshape#0              | clear | op reshape | f16 | low | .
        head/linear#0           | allow | op *       | f16 | low | . f16 f16
        /softmax#0              | infer | op softmax | f32 | -   | f32
    """,
    ("cnn", "train"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op *       | f16 | low | f16 f16
        norm/add#0              | none  |            | i64 | -   | .
        norm/_native_batch_norm_legit_functional#0
                                | allow | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        norm/operator.getitem#1 | none  |            | f32 | -   |
        norm/operator.getitem#2 | none  |            | f32 | -   |
        /relu#0                 | allow | op *       | f16 | low | .
        pool/max_pool2d#0       | allow | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *       | f16 | low | .
        /reshape#0              | clear | op reshape | f16 | low | .
        head/linear#0           | allow | op *       | f16 | low | . f16 f16
        /softmax#0              | infer | op softmax | f32 | -   | f32
    """,
    ("block", "eval"): """
        norm/layer_norm#0    | allow | op *                 | f16 | low | f16 . .
        qkv/linear#0         | allow | op *                 | f16 | low | . f16 f16
        /split#0             | clear | op split             | f16 | low | .
        /operator.getitem#0  | none  |                      | f16 | -   |
        /operator.getitem#1  | none  |                      | f16 | -   |
        /operator.getitem#2  | none  |                      | f16 | -   |
        /transpose#0         | clear | op transpose         | f16 | low | .
        /matmul#0            | allow | op *                 | f16 | low | . .
        /div#0               | allow | op *                 | f16 | low | .
        /softmax#0           | infer | op softmax           | f16 | low | .
        /matmul#1            | allow | op *                 | f16 | low | . .
        /add#0               | allow | op *                 | f16 | low | f16 .
        up/linear#0          | allow | op *                 | f16 | low | . f16 f16
        /gelu#0              | allow | op *                 | f16 | low | .
        down/linear#0        | allow | op *                 | f16 | low | . f16 f16
        /add#1               | allow | op *                 | f16 | low | . .
        /softmax#1           | infer | op softmax           | f32 | -   | f32
        /broadcast_tensors#0 | deny  | op broadcast_tensors | f32 | -   | . .
        /operator.getitem#3  | none  |                      | f32 | -   |
        /operator.getitem#4  | none  |                      | f32 | -   |
        /mse_loss#0          | deny  | op mse_loss          | f32 | -   | . .
    """,
}

PLANS = [
    (model, mode, expected)
    for (model, stated), expected in WHOLE.items()
    for mode in (["eval", "train"] if model == "block" else [stated])
]
CASTS = {"cnn": Casts(2, 3, 5), "block": Casts(2, 6, 9)}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mode", "expected"), PLANS)
def test_whole_plans(model: str, mode: str, expected: str) -> None:
    plan = staged(model).plan(PRESET)
    # A long node name stands on a line of its own.
    assert table(plan, mode) == rows(
        expected.replace("#0\n                                |", "#0 |")
    )
    assert casts_of(plan, mode) == CASTS[model]


@pytest.mark.slow
def test_mixed_bfloat16_is_the_same_with_bfloat16() -> None:
    for model in ("cnn", "block"):
        half, brain = staged(model).plan(PRESET), staged(model).plan(PRESET, BF16)
        assert low(half) == low(brain)


def test_keras_looks_at_no_ranges() -> None:
    rules = load_rules([PRESET])
    assert set(vars(rules.guards)) == set(vars(GuardLimits()))
    assert set(vars(rules.guards).values()) == {False}
    assert rules.painting is Painting.GRAPPLER


# --- the last softmax, and others ----------------------------------------------------------------


class Head(nn.Module):
    """A linear layer, and what follows it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> object:
        y = self.first(x)
        match self.kind:
            case "end":
                return F.log_softmax(y, -1)
            case "moved":
                return y.softmax(-1).view(2, 2, 4).transpose(1, 2)[:, 0]
            case "best":
                return y.softmax(-1).max(-1)
            case "two":
                return y.softmax(-1), self.last(y).softmax(-1)
            case "attention":
                weights = y.softmax(-1)
                return self.last(weights.unsqueeze(1).squeeze(1)), weights
            case "computed":
                return torch.log(y.softmax(-1))
            case "weight":
                return self.last(y * self.mix.softmax(-1))
        raise AssertionError(self.kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("end", ["float32"]),
        ("moved", ["float32"]),
        ("best", ["float32"]),
        ("two", ["float32", "float32"]),
        ("attention", ["float16"]),
        # The head of the rules file tells of these two.
        ("computed", ["float16"]),
        ("weight", ["float32"]),
    ],
)
def test_only_a_softmax_at_the_end_is_float32(kind: str, expected: list[str]) -> None:
    plan = Staged.of(Head(kind), ramp(2, 8)).plan(PRESET)
    found = [d.dtype for d in plan.eval if d.op in ("aten.softmax", "aten.log_softmax")]
    assert found == expected


@pytest.mark.slow
def test_the_softmax_of_an_attention_layer_is_float16() -> None:
    """As in Keras's MultiHeadAttention, which hands its own policy on to its softmax."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.attention(x, x, x)

    plan = Staged.of(Attention().train(), ramp(2, 3, 8)).plan(PRESET)
    for mode in (plan.eval, plan.train):
        assert [d.dtype for d in mode if d.op == "aten.softmax"] == ["float16"]


@pytest.mark.slow
def test_a_reason_says_which_softmax_it_is() -> None:
    plan = staged("block").plan(PRESET)
    inner, last = decision(plan, "/softmax#0"), decision(plan, "/softmax#1")
    assert inner.reason.endswith("; joins the low-precision ops around it")
    assert last.reason.endswith("; not between two low-precision ops, so a cast would gain nothing")


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bits_are_those_of_float16_layers_and_a_float32_softmax() -> None:
    stage = staged("cnn")
    model = stage.model.eval()
    assert isinstance(model, Classifier)
    (x,) = stage.args
    with torch.no_grad():
        y = F.conv2d(x.to(F16), model.conv.weight.to(F16))
        # Keras casts to float32, normalises and casts back.
        y = model.norm(y.float()).to(F16)
        y = F.adaptive_avg_pool2d(model.pool(torch.relu(y)), 1).flatten(1)
        y = F.linear(y, model.head.weight.to(F16), model.head.bias.to(F16))
        want = y.float().softmax(-1)
        have = stage.convert(PRESET).eval()(x)
    assert have.dtype == F32
    assert same_bits(want, have)


def test_variables_stay_float32() -> None:
    converted = staged("cnn").convert(PRESET)
    assert {t.dtype for t in converted.state_dict().values()} == {F32, torch.int64}


class Losses(nn.Module):
    """Losses of what a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        y = self.head(x)
        return [
            F.cross_entropy(y, ids),
            F.nll_loss(y, ids),
            F.l1_loss(y, x),
            F.huber_loss(y, x),
            F.kl_div(y, x, reduction="sum"),
            F.binary_cross_entropy_with_logits(y, x),
            F.poisson_nll_loss(y, x),
        ]


@pytest.mark.slow
def test_losses_are_float32() -> None:
    plan = Staged.of(Losses(), ramp(2, 8), torch.tensor([1, 2])).plan(PRESET)
    found = {d.op: d.dtype for d in plan.eval if d.decided and d.category == "deny"}
    assert len(found) == 8  # with what two of them begin with
    assert set(found.values()) == {"float32"}
    assert low(plan) == ["head/linear"]
