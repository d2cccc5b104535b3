"""The rewrite `clamp_masks`: masks far below the low dtype's range need not retreat to FP32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import UsageError
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rules
from tests.staged import BF16, F16, Staged, rows, table

LOWEST = {F16: -32752.0, BF16: torch.finfo(BF16).min / 2}
FULL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
NONE = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])


class Attention(nn.Module):
    """Attention with an additive mask of `value`, made from the mask of tokens in FP32. Where a
    whole row is masked, FP32 forgets the scores, so the mask stays as it is."""

    def __init__(self, value: float, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.value, self.fused = value, fused

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.zeros(tokens.shape).masked_fill(tokens == 0, self.value)[:, None]
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1) @ v
        return self.out(mixed)


def staged(value: float, tokens: torch.Tensor = FULL, *, fused: bool = False) -> Staged:
    torch.manual_seed(1)
    return Staged.of(Attention(value, fused=fused), torch.randn(2, 4, 8), tokens)


def without_rewrite(tmp_path: Path) -> Rules:
    file = tmp_path / "off.toml"
    file.write_text('extends = "default"\n[rewrites]\nclamp_masks = false\n', encoding="utf-8")
    return load_rules([str(file)])


def converted(found: Staged, rules: Rules, dtype: torch.dtype) -> ConvertedModel:
    return convert_captured(found.captured, rules, found.stats, dtype).eval()


def error(found: Staged, mixed: ConvertedModel) -> float:
    with torch.no_grad():
        want, have = found.captured.model.eval()(*found.args), mixed(*found.args)
    assert have.isfinite().all()
    return float((have - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["softmax", "sdpa"])
@pytest.mark.parametrize("tokens", [FULL, NONE], ids=["some", "all"])
@pytest.mark.parametrize("value", [-1e9, -1e12, torch.finfo(torch.float32).min, -1e4])
def test_a_clamped_mask_is_as_good_as_fp32(
    value: float, tokens: torch.Tensor, fused: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = staged(value, tokens, fused=fused)
    clamped = converted(found, load_rules(["default"]), dtype)
    retreated = converted(found, without_rewrite(tmp_path), dtype)
    if tokens is FULL:
        assert clamped.plan.share_macs_low() == 1
        assert [d.rule for d in clamped.plan.eval if "guard" in d.rule] == []
    # Both round; the mask itself costs nothing.
    unit = torch.finfo(dtype).eps
    assert error(found, clamped) <= error(found, retreated) + unit
    assert torch.equal(clamped(*found.args), clamped.freeze()(*found.args))


@pytest.mark.slow
def test_without_it_the_guards_keep_the_scores_in_fp32(tmp_path: Path) -> None:
    plan = staged(-1e9, fused=True).plan(without_rewrite(tmp_path))
    found = {d.node: d.rule for d in plan.eval if "guard" in d.rule}
    assert found == dict.fromkeys(
        [
            "/aten.masked_fill#0",
            "/aten.slice#0",
            "/aten.unsqueeze#0",
            "/aten.scaled_dot_product_attention#0",
        ],
        "guard activation-range",
    )
    assert all(d.clamp is None for d in plan.eval)


@pytest.mark.slow
def test_the_whole_plan_with_a_clamped_mask() -> None:
    plan = staged(-1e9).plan()
    masks = ["masked_fill", "slice", "unsqueeze", "add", "softmax"]
    assert {d.node: d.clamp for d in plan.eval if d.clamp is not None} == {
        f"/aten.{op}#0": LOWEST[F16] for op in masks
    }
    assert all(("rewrite clamp_masks" in d.why) == (d.clamp is not None) for d in plan.eval)
    assert table(plan)[-10:] == rows(
        """
        /masked_fill#0     | clear | op masked_fill | f16 | low | f16 .
        /slice#0           | clear | op slice     | f16 | low | .
        /unsqueeze#0       | clear | op unsqueeze | f16 | low | .
        /transpose#0       | clear | op transpose | f16 | low | .
        /matmul#0          | allow | op matmul    | f16 | low | . .
        /div#0             | infer | op div       | f16 | low | .
        /add#0             | infer | op add       | f16 | low | . .
        /softmax#0         | infer | op softmax   | f16 | low | .
        /matmul#1          | allow | op matmul    | f16 | low | . .
        out/linear#0       | allow | op linear    | f16 | low | . f16 f16
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["softmax", "sdpa"])
def test_minus_infinity_stays(fused: bool) -> None:
    found = staged(-torch.inf, fused=fused)
    mixed = converted(found, load_rules(["default"]), F16)
    assert error(found, mixed) < 2e-3
    graph = mixed.rewritten[""]["eval"].graph_module.graph
    (clamp,) = [n for n in graph.nodes if n.target is torch.ops.aten.where.self]
    assert clamp.args[0].target is torch.ops.aten.eq.Scalar


@pytest.mark.slow
def test_a_mask_that_is_also_read_as_a_number_is_not_clamped() -> None:
    class Both(Attention):
        def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(tokens.shape).masked_fill(tokens == 0, self.value)[:, None]
            scores = self.qkv(x)[..., :4] + mask
            return torch.softmax(scores, -1) + torch.tanh(scores) + self.out(x)[..., :4]

    torch.manual_seed(1)
    plan = Staged.of(Both(-1e9, fused=False), torch.randn(2, 4, 8), FULL).plan()
    assert all(d.clamp is None for d in plan.eval)


def test_what_is_clamped_is_compared_with_what_the_clamp_makes_of_fp32() -> None:
    """A mask of -1e9 that became -32752 is no error of 100 %."""
    found = staged(-1e9)
    mixed = converted(found, load_rules(["default"]), F16)
    batches = [(found.args[0], found.args[1])]
    frame = amp.compare(found.captured.model, mixed, batches).to_frame().set_index("node")
    for node in ("/aten.add#0", "/aten.softmax#0"):
        assert frame.loc[node, "local_rel_l2"] < 1e-3
        assert frame.loc[node, "accumulated_rel_l2"] < 3e-3
        assert frame.loc[node, "nonfinite"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewrites = 3", "`rewrites` is not a table"),
        ("[rewrites]\nclamp_mask = true", "Did you mean 'clamp_masks'|Known: clamp_masks"),
        ("[rewrites]\nclamp_masks = 1", "rewrite `clamp_masks` has the value 1 .*true or false"),
    ],
)
def test_a_wrong_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_rules([str(file)])


def test_a_plan_given_back_clamps_as_before(tmp_path: Path) -> None:
    found = staged(-1e9)
    first = found.plan()
    file = tmp_path / "plan.toml"
    file.write_text(first.to_toml(), encoding="utf-8")
    again = found.plan(load_rules([str(file)]))
    assert [(d.node, d.dtype, d.clamp) for d in again.eval] == [
        (d.node, d.dtype, d.clamp) for d in first.eval
    ]
