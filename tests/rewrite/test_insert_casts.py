"""Rewriting: whole expected graphs, and that it does what the plan says and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from amp_convert.plan.plan import Decision, Plan
from tests.rewrite.listing import listing
from tests.small_models import EXAMPLES, example
from tests.staged import (
    BF16,
    Recorder,
    rows,
)


def code(graph_module: fx.GraphModule) -> str:
    return str(graph_module.graph)


# --- whole graphs --------------------------------------------------------------------------------


def test_a_residual_block() -> None:
    """Each cast stands before its first reader; the sum and the softmax stay FP32."""
    staged = example("block")
    assert listing(staged.rewritten(staged.plan())) == rows(
        """
        x.f16 = x
        p_up_weight.f16 = p_up_weight
        p_up_bias.f16 = p_up_bias
        linear0 = linear(x.f16, p_up_weight.f16, p_up_bias.f16)
        layer_norm0 = layer_norm(linear0, p_norm_weight, p_norm_bias)
        gelu0 = gelu(layer_norm0)
        p_down_weight.f16 = p_down_weight
        p_down_bias.f16 = p_down_bias
        linear1 = linear(gelu0, p_down_weight.f16, p_down_bias.f16)
        linear1.f32 = linear1
        add0 = add(x, linear1.f32)
        softmax0 = softmax(add0)
        return softmax0
        """
    )


def test_two_branches_and_a_dictionary() -> None:
    """`gate` is returned as it is, `y` cast back; the count is an integer."""
    staged = example("gated")
    assert listing(staged.rewritten(staged.plan())) == rows(
        """
        x.f16 = x
        p_a_weight.f16 = p_a_weight
        p_a_bias.f16 = p_a_bias
        linear0 = linear(x.f16, p_a_weight.f16, p_a_bias.f16)
        split0 = split(linear0)
        getitem0 = split0[0]
        getitem1 = split0[1]
        getitem0.f32 = getitem0
        exp0 = exp(getitem0.f32)
        sum0 = sum(exp0)
        add0 = add(sum0)
        div0 = div(exp0, add0)
        div0.f16 = div0
        relu0 = relu(div0.f16)
        tanh0 = tanh(getitem1)
        p_scale.f16 = p_scale
        mul0 = mul(tanh0, p_scale.f16)
        cat0 = cat(relu0, mul0)
        p_b_weight.f16 = p_b_weight
        p_b_bias.f16 = p_b_bias
        linear1 = linear(cat0, p_b_weight.f16, p_b_bias.f16)
        gt0 = gt(x)
        sum1 = sum(gt0)
        linear1.f32 = linear1
        return linear1.f32, div0, sum1
        """
    )


def test_a_cnn_in_training() -> None:
    """BatchNorm takes and returns FP32 statistics beside a low value: a tuple costs no cast."""
    staged = example("cnn")
    lines = listing(staged.rewritten(staged.plan(), "train"))
    bn = "_native_batch_norm_legit_functional"
    assert lines[:10] == rows(
        f"""
        x.f16 = x
        p_c1_weight.f16 = p_c1_weight
        conv2d0 = conv2d(x.f16, p_c1_weight.f16)
        add0 = add(b_b1_num_batches_tracked)
        {bn}0 = {bn}(conv2d0, p_b1_weight, p_b1_bias, b_b1_running_mean, b_b1_running_var)
        getitem0 = {bn}0[0]
        getitem1 = {bn}0[3]
        getitem2 = {bn}0[4]
        relu0 = relu(getitem0)
        p_c2_weight.f16 = p_c2_weight
        """
    )
    assert lines[-2:] == rows(
        """
        linear0.f32 = linear0
        return getitem1, getitem2, add0, getitem4, getitem5, add1, linear0.f32
        """
    )


@pytest.mark.parametrize("model", EXAMPLES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_without_a_cast_the_graph_is_the_captured_one(model: str, mode: str) -> None:
    staged = example(model)
    rewritten = staged.rewritten(staged.plan("fp32"), mode)
    captured = staged.captured.regions[0].graphs[mode]
    assert code(rewritten.graph_module) == code(captured.graph_module)
    assert rewritten.casts == ()
    assert rewritten.captured is captured


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "half"])
def test_the_captured_graph_stays_as_it_is(preset: str) -> None:
    for model in EXAMPLES:
        staged = example(model)
        graphs = staged.captured.regions[0].graphs
        before = {mode: code(graph.graph_module) for mode, graph in graphs.items()}
        for mode in graphs:
            assert staged.rewritten(staged.plan(preset), mode).casts
        assert {mode: code(graph.graph_module) for mode, graph in graphs.items()} == before


@pytest.mark.parametrize("model", EXAMPLES)
def test_every_fp32_node_has_a_twin_and_every_other_node_is_a_cast(model: str) -> None:
    staged = example(model)
    rewritten = staged.rewritten(staged.plan())
    nodes = {node.name: node for node in rewritten.graph_module.graph.nodes if node.op != "output"}
    originals = {
        node.name: node
        for node in rewritten.captured.graph_module.graph.nodes
        if node.op != "output"
    }
    assert rewritten.values.keys() == originals.keys()
    assert set(rewritten.origins) | set(rewritten.casts) == nodes.keys()
    assert not set(rewritten.origins) & set(rewritten.casts)
    assert sorted(rewritten.origins.values()) == sorted(originals)
    for name, original in rewritten.origins.items():
        assert nodes[name].target == originals[original].target or nodes[name].op == "placeholder"
        # The dtype that was traced need not hold any more.
        assert "val" not in nodes[name].meta
        assert nodes[name].meta.get("stack_trace") == originals[original].meta.get("stack_trace")


def changed(plan: Plan, node: str, **changes: Any) -> Plan:
    """The plan with one decision of the eval graph changed by hand."""
    dtypes = changes.pop("input_dtypes", None)

    def cast(d: Decision) -> Decision:
        pairs = zip(d.inputs, dtypes or d.input_dtypes, strict=True)
        return replace(d, inputs=tuple(replace(i, dtype=dtype) for i, dtype in pairs), **changes)

    return replace(plan, eval=tuple(cast(d) if d.node == node else d for d in plan.eval))


# --- it carries out, and never decides -----------------------------------------------------------


def test_a_cast_is_where_the_plan_says_however_odd() -> None:
    """FP32 everywhere but for one value, which `tanh` reads in FP16 and a sum in BF16."""
    staged = example("residual")
    plan = changed(staged.plan("fp32"), "inner.act/aten.tanh#0", input_dtypes=("float16",))
    plan = changed(plan, "/aten.add#0", input_dtypes=(None, "bfloat16"))
    rewritten = staged.rewritten(plan)
    casts = [n for n in rewritten.graph_module.graph.nodes if n.name in rewritten.casts]
    assert [cast.args[0].name for cast in casts] == ["linear", "linear"]
    assert [cast.kwargs for cast in casts] == [{"dtype": torch.float16}, {"dtype": BF16}]
    readers = [[user.target for user in cast.users] for cast in casts]
    assert readers == [[torch.ops.aten.tanh.default], [torch.ops.aten.add.Tensor]]
    values = Recorder(rewritten.graph_module).record(staged.inputs())
    value = values[rewritten.values["linear"]]
    assert torch.equal(values[rewritten.values["tanh"]], torch.tanh(value.half()))
    (total,) = casts[1].users
    assert torch.equal(values[total], torch.tanh(value.half()) + value.bfloat16())


def test_a_plan_that_knows_of_a_low_result_gets_it_cast_back() -> None:
    staged = example("residual")
    plan = changed(staged.plan("fp32"), "last/aten.linear#0", dtype="float16")
    lines = listing(staged.rewritten(plan))
    assert lines[-2:] == ["linear1.f32 = linear1", "return linear1.f32"]
