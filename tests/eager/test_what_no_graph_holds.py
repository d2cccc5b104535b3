"""What no graph holds runs as planned: other shapes, control flow, hooks, writes in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.plan.saved_plan import is_scaled
from amp_convert.rules.load import load_rules
from tests import bits, zoo
from tests.eager.small_net import Looping, Net, net, products_of
from tests.plan.rescaled import feed_forward
from tests.plan.test_clamp_masks import converted, staged

F16, BF16 = torch.float16, torch.bfloat16


X = torch.linspace(-2, 2, 32).reshape(4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
@zoo.both_dtypes
def test_generate_runs_as_planned(name: str, cache: str | None, dtype: torch.dtype) -> None:
    """100 prompts of 32 tokens: all products compute low, and the greedy tokens are FP32's at least
    as often as those of the model all in the low dtype."""
    model, _, _ = zoo.example(name)
    mixed = zoo.converted(name, "default", dtype)
    low = copy.deepcopy(model).to(dtype)
    ids = torch.randint(3, 99, (100, 32), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if cache is not None:
        options["cache_implementation"] = cache
    with zoo.mode(model, mixed, low):
        seen = products_of(lambda: mixed.generate(ids[:2], **options))
        want = model.generate(ids, **options)
        ours, all_low = (each.generate(ids, **options) == want for each in (mixed, low))
    assert set(seen) == {dtype}
    assert ours.float().mean() >= all_low.float().mean()
    assert ours.float().mean() > 0.9


def test_other_shapes_control_flow_and_hooks_run_as_planned() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    seen: list[torch.dtype] = []
    handle = model.b.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with plan.autocast(model) as applied, torch.no_grad():
        found = products_of(lambda: model(torch.ones(2, 5, 8)))
    assert found == {F16: 3}
    assert seen == [F16]
    assert applied.counts.unplanned == {}
    handle.remove()

    looping = net(Looping)
    kept = amp.convert(looping, X)  # in parts
    with kept.plan.autocast(looping) as applied, torch.no_grad():
        assert set(products_of(lambda: looping(X))) == {F16}
    assert applied.counts.unplanned  # the loop calls `a` more often than the plan has it


def test_a_layer_that_rules_keep_stays_fp32_whatever_the_shape(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'extends = "default"\n[[rule]]\nlayer = "head"\ncategory = "deny"\nreason = "mine"\n'
    )
    model = net()
    plan = amp.convert(model, X, rules=[file]).plan
    with plan.autocast(model), torch.no_grad():
        assert products_of(lambda: model(torch.ones(3, 4, 8))) == {F16: 2, torch.float32: 1}


def test_calls_that_are_no_node_take_the_rule_for_their_operator_and_are_counted() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    weight = torch.randn(8, 8)
    with plan.autocast(model) as applied:
        assert (X @ weight).dtype is F16
        assert X.exp().dtype is torch.float32
        assert X.half().softmax(-1).dtype is F16
        assert X.half().view(8, 4).dtype is F16
        assert torch.cat([X, X.half()]).dtype is torch.float32
    assert applied.counts.unplanned == {
        ("", "aten.matmul"): 1,
        ("", "aten.exp"): 1,
        ("", "aten.softmax"): 1,
    }


def test_masks_are_clamped_as_planned() -> None:
    found = staged(-1e9)
    model, inputs = found.captured.model, (found.args[0], found.args[1])
    mixed = converted(found, load_rules(["default"]), F16)
    assert any(d.clamp for d in mixed.plan.eval)
    with torch.no_grad(), mixed.plan.autocast(model):
        have = model(*inputs)
    assert have.isfinite().all()
    assert bits.same_bits(have, mixed(*inputs).detach())


def test_what_the_plan_scales_runs_in_fp32() -> None:
    """The factor of one call is taken back by another: that takes a graph."""
    of = feed_forward()
    mixed = amp.convert(of.captured.model, (of.args[0],))
    assert any(is_scaled(d) for d in mixed.plan.eval)
    with torch.no_grad(), mixed.plan.autocast(of.captured.model):
        found = of.captured.model(of.args[0])
    want = of.captured.model(of.args[0]).detach()
    assert found.isfinite().all()
    assert (found - want).norm() < 1e-2 * want.norm()


class InPlace(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y += self.b.weight.mean(0).exp()  # FP32, which floods what it is added to
        return self.head(torch.relu_(y))


def test_what_writes_in_place_keeps_its_dtype_and_is_counted() -> None:
    model = net(InPlace)
    mixed = amp.convert(model, X)
    with torch.no_grad(), mixed.plan.autocast(model) as applied:
        found = model(X)
    low = {d.node: d.low for d in mixed.plan.eval}
    assert not low["/aten.add#0"]
    assert ("", "aten.add") in applied.counts.held_back
    assert (found - mixed(X)).abs().max() < 1e-2


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_layers_that_ask_for_their_weights_dtype(recurrent: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), recurrent(8, 8, batch_first=True)).eval()
    x = X.reshape(2, 2, 8)
    mixed = amp.convert(model, x)
    with torch.no_grad(), mixed.plan.autocast(model):
        found = model(x)
    with torch.no_grad():
        bits.assert_same_bits(mixed(x), found)


class WithScript(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = torch.jit.script(nn.Linear(8, 8))


def test_a_scripted_part_gets_fp32() -> None:
    model = net(WithScript)
    mixed = amp.convert(model, X)
    with torch.no_grad(), mixed.plan.autocast(model):
        found = model(X)
    with torch.no_grad():
        assert (found - mixed(X)).abs().max() < 1e-3
