"""Rewriting: whole expected graphs, and that it does what the plan says and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.plan.plan import Decision, Plan
from amp_convert.rewrite.insert_casts import Rewritten
from tests.small_models import EXAMPLES, example, ramp
from tests.staged import (
    BF16,
    Recorder,
    Staged,
    decisions_of,
    rows,
    rule,
    rules_with,
    same_bits,
)


def listing(rewritten: Rewritten) -> list[str]:
    """A line a node that is not an input, such as "linear0 = linear(x.f16, p_weight.f16)".

    Constants are left out. A cast that was inserted is called after what it casts: "x.f16 = x".
    """
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in rewritten.graph_module.graph.nodes:
        args = [names[leaf] for leaf in read_by(node)]
        if node.name in rewritten.casts:
            short = {torch.float16: "f16", torch.float32: "f32"}[node.kwargs["dtype"]]
            names[node] = f"{args[0]}.{short}"
            lines.append(f"{names[node]} = {args[0]}")
        elif node.op == "output":
            lines.append(f"return {', '.join(args)}")
        elif node.op == "placeholder":
            names[node] = node.name
        else:
            op = str(getattr(node.target, "_opname", "getitem"))
            names[node] = f"{op}{counts[op]}"
            counts[op] += 1
            made = f"{args[0]}[{node.args[1]}]" if op == "getitem" else f"{op}({', '.join(args)})"
            lines.append(f"{names[node]} = {made}")
    return lines


def read_by(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


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


# --- it carries out, and never decides -----------------------------------------------------------


def changed(plan: Plan, node: str, **changes: Any) -> Plan:
    """The plan with one decision of the eval graph changed by hand."""
    dtypes = changes.pop("input_dtypes", None)

    def cast(d: Decision) -> Decision:
        pairs = zip(d.inputs, dtypes or d.input_dtypes, strict=True)
        return replace(d, inputs=tuple(replace(i, dtype=dtype) for i, dtype in pairs), **changes)

    return replace(plan, eval=tuple(cast(d) if d.node == node else d for d in plan.eval))


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


# --- sharing -------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One weight in two layers; one input and one result with several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> Any:
        first, second = self.one(x), self.two(x)
        low = self.one(first)
        return torch.exp(low) + torch.cumsum(low, 0), second, low, low


@pytest.mark.slow
def test_a_value_is_cast_once_for_all_its_readers() -> None:
    staged = Staged.of(Shared(), ramp(2, 8))
    lines = listing(staged.rewritten(staged.plan()))
    # Export calls a tied weight by either of its names.
    assert [re.sub("p_(one|two)_weight", "w", line) for line in lines] == rows(
        """
        x.f16 = x
        w.f16 = w
        linear0 = linear(x.f16, w.f16)
        linear1 = linear(x.f16, w.f16)
        linear2 = linear(linear0, w.f16)
        linear2.f32 = linear2
        exp0 = exp(linear2.f32)
        cumsum0 = cumsum(linear2.f32)
        add0 = add(exp0, cumsum0)
        linear1.f32 = linear1
        return add0, linear1.f32, linear2.f32, linear2.f32
        """
    )
    counted = staged.plan().eval_casts
    assert (counted.activations, counted.weights) == (3, 1)


@pytest.mark.parametrize("model", EXAMPLES)
@pytest.mark.parametrize("preset", ["default", "autocast", "half"])
def test_a_cast_stands_right_before_its_first_reader(model: str, preset: str) -> None:
    rewritten = example(model).rewritten(example(model).plan(preset))
    nodes = list(rewritten.graph_module.graph.nodes)
    for position, node in enumerate(nodes):
        if node.name in rewritten.casts:
            later = [n for n in nodes[position:] if n.name not in rewritten.casts]
            assert node in later[0].all_input_nodes


# --- what stays FP32 beside a low value ----------------------------------------------------------


def readers(rewritten: Rewritten, op: str) -> list[fx.Node]:
    return [
        n
        for n in rewritten.graph_module.graph.nodes
        if n.op == "call_function" and op in str(n.target)
    ]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_reads_its_statistics_and_parameters_as_they_are(mode: str) -> None:
    staged = example("cnn")
    rewritten = staged.rewritten(staged.plan("half"), mode)
    norms = readers(rewritten, "batch_norm")
    assert len(norms) == 2
    for norm in norms:
        x, *parameters = norm.all_input_nodes
        assert x.op == "call_function"
        assert [p.op for p in parameters] == ["placeholder"] * 4
    module = staged.convert("half").train(mode == "train")
    module(*staged.args)
    assert {b.dtype for n, b in module.named_buffers() if "running" in n} == {torch.float32}


class Tagged(nn.Module):
    """A table that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids)), self.out(self.table(more))


@pytest.mark.slow
def test_a_table_is_looked_up_before_it_is_cast() -> None:
    """The bits are those of a cast table, for the work of casting what was looked up."""
    staged = Staged.of(Tagged(), torch.tensor([[1, 2]]), torch.tensor([[3, 10]]))
    rewritten = staged.rewritten(staged.plan())
    lookups = readers(rewritten, "embedding")
    assert len(lookups) == 2
    for lookup in lookups:
        assert [n.op for n in lookup.all_input_nodes] == ["placeholder", "placeholder"]
        (cast,) = lookup.users
        assert cast.name in rewritten.casts
        assert cast.kwargs == {"dtype": torch.float16}
        (linear,) = cast.users
        assert "linear" in str(linear.target)


class Looked(nn.Module):
    """A looked-up value with a low and an FP32 reader, and one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> Any:
        h = self.table(ids)
        return self.out(h), torch.exp(h), h


@pytest.mark.slow
def test_a_looked_up_value_is_not_cast_down_and_up_again() -> None:
    """FP32 readers of a lookup get what was looked up."""
    staged = Staged.of(Looked(), torch.tensor([[1, 2]]))
    for preset in ("default", "half"):
        rewritten = staged.rewritten(staged.plan(preset))
        casts = [n for n in rewritten.graph_module.graph.nodes if n.name in rewritten.casts]
        assert [n.name for n in casts if n.args[0].name in rewritten.casts] == []


torch.library.define("amp_convert_tests::raised", "(Tensor x, *, Tensor by) -> Tensor")


@torch.library.impl("amp_convert_tests::raised", "CompositeExplicitAutograd")
def raised(x: torch.Tensor, *, by: torch.Tensor) -> torch.Tensor:
    """An operator with a tensor that can be given by keyword only."""
    return x + by


class Raised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.amp_convert_tests.raised(self.lin(x).detach(), by=x)


@pytest.mark.slow
def test_keywords_are_cast_like_any_argument() -> None:
    staged = Staged.of(Raised(), ramp(2, 8))
    assert listing(staged.rewritten(staged.plan("half")))[-3:] == [
        "raised0 = raised(detach0, x.f16)",
        "raised0.f32 = raised0",
        "return raised0.f32",
    ]


# --- outputs -------------------------------------------------------------------------------------


class Returning(nn.Module):
    """Outputs that are inputs, weights, numbers, nothing, views of one value, low and not."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor, n: int = 3) -> Any:
        h = self.lin(x)
        return {
            "low": h,
            "parts": [h.split(4, -1), None, n],
            "input": x,
            "weight": self.lin.weight,
            "double": h.double(),
            "half": h.half(),
            "best": h.argmax(-1),
            "mask": h > 0,
        }


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "autocast", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_keep_dtype_shape_and_structure(preset: str, dtype: torch.dtype) -> None:
    staged = Staged.of(Returning(), ramp(2, 8))
    want = staged.model.eval()(*staged.args)
    have = staged.convert(preset, dtype).eval()(*staged.args)
    assert list(want) == list(have)
    left, right = have["parts"][0]
    assert (left.dtype, left.shape, right.dtype) == (torch.float32, (2, 4), torch.float32)
    assert have["parts"][1:] == [None, 3]
    assert torch.equal(have["input"], staged.args[0])
    assert torch.equal(have["weight"], want["weight"])
    for name in ("low", "double", "half", "best", "mask", "input", "weight"):
        assert (have[name].dtype, have[name].shape) == (want[name].dtype, want[name].shape), name
    assert torch.equal(have["low"], have["double"].float())
    assert not torch.equal(have["low"], want["low"])


class Averaging(nn.Module):
    """A buffer that the forward pass updates from a low value."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        self.average.mul_(0.5).add_(h.detach())
        return h


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "half"])
def test_a_changed_buffer_keeps_its_dtype(preset: str) -> None:
    staged = Staged.of(Averaging(), ramp(2, 8))
    mixed = staged.convert(preset)
    mixed.train()(*staged.args)
    mixed.eval()(*staged.args)
    average = dict(mixed.named_buffers())["average"]
    assert average.dtype == torch.float32
    want = 1.5 * staged.model.lin(*staged.args)
    torch.testing.assert_close(average, want, rtol=2e-3, atol=2e-3)
    assert not torch.equal(average, want)


class Direct(nn.Module):
    """The one output is what a pinned layer makes of a low value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.lin(x))


def test_an_fp32_output_is_not_cast_again() -> None:
    staged = Staged.of(Direct(), ramp(2, 8))
    rewritten = staged.rewritten(staged.plan(rules_with(rule("deny", layer="act"))))
    assert listing(rewritten)[-3:] == [
        "linear0.f32 = linear0",
        "tanh0 = tanh(linear0.f32)",
        "return tanh0",
    ]


# --- both graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", EXAMPLES)
def test_eval_and_train_are_rewritten_from_their_own_decisions(model: str) -> None:
    staged = example(model)
    plan = staged.plan()
    for mode in ("eval", "train"):
        rewritten = staged.rewritten(plan, mode)
        planned = decisions_of(plan, mode)
        assert [rewritten.values[d.name].name for d in planned] == [d.name for d in planned]
        values = Recorder(rewritten.graph_module).record(staged.inputs(mode))
        again = Recorder(rewritten.graph_module).record(staged.inputs(mode))
        assert same_bits(list(values.values()), list(again.values()))
