"""BatchNorm in the weights before it: what PyTorch's own fusion gives, where the plan says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

import amp_convert as amp
from amp_convert.core.errors import UsageError
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.benchmarks.dispatch import counted
from tests.rewrite.pairs import Pair, convolution, pair

F16, BF16 = torch.float16, torch.bfloat16


PAIRS: dict[str, Callable[[], tuple[Pair, Tensor]]] = {
    "conv2d": convolution,
    "conv1d": lambda: pair(
        lambda: nn.Conv1d(6, 8, 3, groups=2), lambda: nn.BatchNorm1d(8, eps=1e-2),
        lambda: nn.Conv1d(8, 4, 1), 4, 6, 16,
    ),
    "conv3d": lambda: pair(
        lambda: nn.Conv3d(2, 4, 3, padding="same"), lambda: nn.BatchNorm3d(4, affine=False),
        lambda: nn.Conv3d(4, 2, 1), 2, 2, 4, 4, 4,
    ),
    "transposed": lambda: pair(
        lambda: nn.ConvTranspose2d(3, 8, 2, 2), lambda: nn.BatchNorm2d(8),
        lambda: nn.Conv2d(8, 4, 1), 4, 3, 8, 8,
    ),
    "linear": lambda: pair(
        lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Linear(8, 4), 16, 6
    ),
}  # fmt: skip


def mixed(model: nn.Module, x: Tensor, dtype: torch.dtype = F16, **more: Any) -> ConvertedModel:
    return amp.convert(model, x, dtype=dtype, train=False, **more)


def fused(model: Pair) -> tuple[Tensor, Tensor]:
    """What PyTorch's own fusion makes of FP64 weights."""
    product, norm = (copy.deepcopy(part).double() for part in (model.product, model.norm))
    if isinstance(product, nn.Linear):
        found = fusion.fuse_linear_bn_eval(product, norm)
    else:
        transposed = isinstance(product, nn.ConvTranspose2d)
        found = fusion.fuse_conv_bn_eval(product, norm, transpose=transposed)
    return found.weight, found.bias


def rel_l2(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_weights_are_those_of_pytorchs_fusion(name: str, dtype: torch.dtype) -> None:
    model, x = PAIRS[name]()
    with torch.no_grad():
        want = model(x)
    converted = mixed(model, x, dtype)
    assert [fold.reason for fold in converted.plan.batch_norm_folds] == [""]
    plain, folded = converted.freeze(), converted.freeze(fold_batch_norm=True)
    errors = [rel_l2(frozen(x), want) for frozen in (plain, folded)]
    assert errors[1] < 2 * errors[0]
    calls = [counted(lambda f=frozen: f(x)) for frozen in (plain, folded)]
    assert calls[0].total - calls[1].total == 1
    assert not [name for name in calls[1].calls if "batch_norm" in name]
    state = folded.state_dict()
    for name, wanted in zip(("weight", "bias"), fused(model), strict=True):
        assert torch.equal(state[f"folded.product_{name}"], wanted.to(dtype))
    assert {t.dtype for t in state.values()} == {dtype}
    assert torch.equal(plain(x), converted(x))  # neither is changed by the other


class Read(nn.Module):
    """A BatchNorm that cannot be folded, by what else there is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "skip":
            return self.last(self.norm(y) + y)
        if self.how == "weight":
            return self.last(self.norm(y)) + nn.functional.conv2d(x, self.conv.weight)
        if self.how == "computed":
            computed = nn.functional.conv2d(x, self.conv.weight * 2, self.conv.bias)
            return self.last(self.norm(computed))
        return self.last(self.norm(y))


@pytest.mark.parametrize(
    ("how", "reason"),
    [("skip", "something else reads what the product gives"),
     ("weight", "its weight is read elsewhere as well, and would be stored twice"),
     ("computed", "its tensors are not all the model's own"),
     ("", "")],
)  # fmt: skip
def test_what_is_not_folded_says_why(how: str, reason: str) -> None:
    model, x = Read(how).eval(), torch.randn(2, 4, 4, 4)
    converted = mixed(model, x)
    assert [fold.reason for fold in converted.plan.batch_norm_folds] == [reason]
    folded = converted.freeze(fold_batch_norm=True)
    if reason:
        assert torch.equal(folded(x), converted(x))


def test_channels_that_are_rows_of_the_product_are_left() -> None:
    model = Pair(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 5, 6)
    [fold] = mixed(model, x).plan.batch_norm_folds
    assert fold.reason == "the BatchNorm's channels are not those of the product"


def test_the_guards_see_the_folded_weights(tmp_path: Path) -> None:
    """A dead channel: its variance is 0, and 1 / √ε times a weight of 500 is over 65504."""
    model, x = convolution()
    with torch.no_grad():
        model.norm.running_var[2] = 0.0
        model.norm.running_mean[2] = 0.0
        model.product.weight[2] = 0.0
        model.product.weight[2, 0, 1, 1] = 500.0
        x[:, 0] = 0.0
    extra = tmp_path / "rules.toml"
    extra.write_text("[guards]\nprobe_headroom = false\n")
    rules = ["default", extra]
    found = {dtype: mixed(model, x, dtype, rules=rules) for dtype in (F16, BF16)}
    [half], [bfloat] = (each.plan.batch_norm_folds for each in found.values())
    assert (half.product, half.norm) == (bfloat.product, bfloat.norm)
    assert half.reason.startswith("weight product.weight times its BatchNorm's factor does not fit")
    assert half.reason.endswith("(guard weight-range)")
    assert bfloat.reason == ""
    saved = tmp_path / "plan.toml"
    saved.write_text(found[F16].plan.to_toml())
    again = mixed(model, x, rules=[saved])
    assert again.plan.batch_norm_folds == found[F16].plan.batch_norm_folds
    frozen = found[F16].freeze(fold_batch_norm=True)
    assert torch.equal(frozen(x), found[F16](x))


@pytest.mark.parametrize("rules", ["fp32", "autocast"])
def test_it_is_refused_where_bits_are_asked_for(rules: str) -> None:
    model, x = convolution()
    converted = mixed(model, x, rules=rules)
    with pytest.raises(UsageError, match="changes bits"):
        converted.freeze(fold_batch_norm=True)
    assert torch.equal(converted.freeze()(x), converted(x))
    with pytest.raises(UsageError, match="--fold-batch-norm changes bits"):
        amp.check(model, x, rules=rules, fold_batch_norm=True)


def test_a_channel_that_would_vanish_is_seen_among_others() -> None:
    """Three of eight gains are tiny, and what reads these channels is as large."""
    model, x = convolution()
    with torch.no_grad():
        model.norm.weight[:3] = 1e-4
        model.norm.bias[:3] = 0
        model.last.weight[:, :3] *= 5e3
    converted = mixed(model, x)
    [fold] = converted.plan.batch_norm_folds
    assert fold.reason.endswith("(guard weight-tiny)")
    frozen = converted.freeze(fold_batch_norm=True)
    assert torch.equal(frozen(x), converted.freeze()(x))


def test_the_weights_of_then_are_held_to_the_guards() -> None:
    """Convert, train, freeze: what the guards saw at first is not what is stored."""
    model, x = convolution()
    converted = mixed(model, x)
    assert [fold.reason for fold in converted.plan.batch_norm_folds] == [""]
    with torch.no_grad():
        model.norm.running_var.fill_(1e-9)
        model.norm.weight.fill_(3000.0)
    folded = converted.freeze(fold_batch_norm=True)
    [fold] = folded.batch_norm_folds
    assert fold.reason.endswith("(guard weight-range)")
    assert [name for name in counted(lambda: folded(x)).calls if "batch_norm" in name]


def test_folds_of_one_bias_have_a_name_each() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c = nn.ModuleList(nn.Conv2d(3, 8, 3) for _ in range(3))
            self.c[1].bias = self.c[2].bias = self.c[0].bias
            self.n = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
            self.out = nn.Linear(128, 4)

        def forward(self, x: Tensor) -> list[Tensor]:
            parts = [n(c(x)).relu().flatten(1) for c, n in zip(self.c, self.n, strict=True)]
            return [self.out(part) for part in parts]

    model = Three().eval()
    for norm in model.n:
        nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 3, 6, 6)
    folded = mixed(model, x).freeze(fold_batch_norm=True)
    assert len([name for name in folded.state_dict() if name.startswith("folded.")]) == 6
    with torch.no_grad():
        assert all(rel_l2(a, b) < 2e-3 for a, b in zip(folded(x), model(x), strict=True))


class Outside(nn.Module):
    """Parts around a condition that no graph holds. `shared`: both parts have one convolution;
    else the code between them reads the first one's weight, for large inputs."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.shared, (self.a, _) = shared, convolution()
        self.b, _ = convolution()
        if shared:
            self.b.product = self.a.product
        self.a.norm.running_var.fill_(0.01)
        self.b.norm.running_var.fill_(4.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if x.detach().mean().item() > 1:
            y = y / self.a.product.weight.float().norm()
        return y + self.b(x) if self.shared else y


@pytest.mark.parametrize("shared", [False, True])
def test_what_else_reads_a_folded_weight_finds_it_as_it_was(shared: bool) -> None:
    model, x = Outside(shared=shared).eval(), convolution()[1]
    weight, held = model.a.product.weight, model.a.product.weight.detach().clone()
    converted = mixed(model, x)
    assert not converted.captured.is_whole
    folded = converted.freeze(fold_batch_norm=True)
    assert {fold.reason for fold in folded.batch_norm_folds} == {""}
    with torch.no_grad():
        for given in (x, x + 3):
            assert rel_l2(folded(given), model(given)) < 5e-3
    amp.compare(model, converted, [x])
    assert model.a.product.weight is weight
    assert torch.equal(weight, held)


def test_parts_are_folded_too() -> None:
    """A model that is captured in parts is frozen as a copy of it, part by part."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.x = convolution()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if float(y.sum()) > 1e9 else y * 2

    model, x = Outer().eval(), convolution()[1]
    converted = mixed(model, x)
    folded = converted.freeze(fold_batch_norm=True)
    assert [fold.reason for fold in converted.plan.batch_norm_folds] == [""]
    assert not [n for n in counted(lambda: folded(x)).calls if "batch_norm" in n]
    with torch.no_grad():
        assert rel_l2(folded(x), model(x)) < 1e-2
