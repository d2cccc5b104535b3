"""Laws that hold for every model: capture, plan, rewrite and freeze random small graphs.

Each example is captured once; every law then looks at it, converted by several rules.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.core.number_formats import LOW_DTYPES, name_of
from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Plan
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from tests.graphs import RandomModule, Recipe, covering, inputs_of, recipes
from tests.property.law_runs import (
    MODES,
    Run,
    consequences,
    is_tensor,
    leaves,
    runs_of,
    signature_of,
    signatures_of,
    trace,
)
from tests.staged import Staged, casts_of, decisions_of, rule, rules_with, same_bits

PRESETS = ("default", "autocast", "half")
COVERING = covering(times=2)


# --- the laws ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COVERING)))
def test_laws_on_every_operation(number: int) -> None:
    the_laws_hold(COVERING[number], LOW_DTYPES[number % 2])


@pytest.mark.slow
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(recipe=recipes(), dtype=st.sampled_from(LOW_DTYPES))
def test_laws_on_random_graphs(recipe: Recipe, dtype: torch.dtype) -> None:
    the_laws_hold(recipe, dtype)


def the_laws_hold(recipe: Recipe, dtype: torch.dtype) -> None:
    staged = Staged.of(RandomModule(recipe), *inputs_of(recipe))
    assert [f.status for f in staged.captured.fidelity] == ["identical", "identical"]
    all_fp32_is_the_identity(staged)
    denying_a_node_lowers_no_other(staged)
    for preset in PRESETS:
        assert staged.plan(preset, dtype) == staged.plan(preset, dtype)
        mixed = staged.convert(preset, dtype)
        outputs_and_gradients_keep_their_types(staged, mixed)
        a_saved_plan_decides_the_same(staged, mixed)
        freezing_changes_no_bit(staged, mixed)
        for run in runs_of(staged, mixed):
            the_plan_tells_the_dtypes(run)
            low_means_low(run)
            casts_are_necessary(run)
            casts_are_as_counted(run)
            only_fp32_and_low_values_are_cast(run)


def all_fp32_is_the_identity(staged: Staged) -> None:
    """`rules="fp32"` gives the original's bits, forward and backward, without a cast."""
    mixed = staged.convert("fp32")
    for mode in MODES:
        assert not mixed.rewritten[""][mode].casts
        assert casts_of(mixed.plan, mode) == Casts(0, 0, 0)
        assert not any(d.low for d in decisions_of(mixed.plan, mode))
        assert same_bits(trace(staged, staged.model, mode), trace(staged, mixed, mode))


def denying_a_node_lowers_no_other(staged: Staged) -> None:
    """A node that is pinned to FP32 is FP32, and no other becomes low for it."""
    before = {d.node: d.low for d in staged.plan(rules_with()).eval if d.decided}
    for node in list(before)[:: max(1, len(before) // 5)]:
        for decision in staged.plan(rules_with(rule("deny", node=node))).eval:
            may_be_low = decision.node != node and before.get(decision.node)
            assert may_be_low or not decision.low, node


def outputs_and_gradients_keep_their_types(staged: Staged, mixed: ConvertedModel) -> None:
    """The converted model returns what the original does, and trains what the original trains."""
    parameters = dict(staged.model.named_parameters())
    for mode in MODES:
        want, have = trace(staged, staged.model, mode), trace(staged, mixed, mode)
        assert pytree.tree_structure(want.outputs) == pytree.tree_structure(have.outputs)
        for one, other in zip(leaves(want.outputs), leaves(have.outputs), strict=True):
            assert signature_of(one) == signature_of(other)
        assert want.gradients.keys() == have.gradients.keys()
        for name, gradient in have.gradients.items():
            assert signature_of(gradient) == signature_of(parameters[name])
        assert signatures_of(want.buffers) == signatures_of(have.buffers)


def a_saved_plan_decides_the_same(staged: Staged, mixed: ConvertedModel) -> None:
    """`plan.to_toml()`, given back as rules, gives the same dtypes, casts and low flags.

    A rules file names a node once: where the graphs differ on one, it speaks for the eval graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.toml"
        file.write_text(mixed.plan.to_toml(), encoding="utf-8")
        again = staged.plan(load_rules([str(file)]), getattr(torch, mixed.plan.dtype))
    for mode in MODES if the_graphs_agree(mixed.plan) else ("eval",):
        ones, others = decisions_of(mixed.plan, mode), decisions_of(again, mode)
        for one, other in zip(ones, others, strict=True):
            assert consequences(one) == consequences(other)
        assert casts_of(mixed.plan, mode) == casts_of(again, mode)


def the_graphs_agree(plan: Plan) -> bool:
    """Whether each node is one and the same in both graphs."""
    trained = {d.node: (d.category, d.low) for d in plan.train}
    return all(trained.get(d.node, (d.category, d.low)) == (d.category, d.low) for d in plan.eval)


def freezing_changes_no_bit(staged: Staged, mixed: ConvertedModel) -> None:
    """Weights cast ahead give what weights cast on every call give."""
    with torch.no_grad():
        assert same_bits(mixed.eval()(*staged.args), mixed.freeze()(*staged.args))


def the_plan_tells_the_dtypes(run: Run) -> None:
    """The dtypes that the plan names for a node's results are those that the run shows."""
    for decision in run.decisions:
        seen = tuple(name_of(v.dtype) for v in leaves(run.result(decision)) if is_tensor(v))
        named = tuple(name for name in decision.output_dtypes if name is not None)
        assert seen == named, decision.node
        assert decision.dtype == next(iter(seen), ""), decision.node


def low_means_low(run: Run) -> None:
    """A node is low when it makes a low value of an FP32 one, or reads nothing but low ones."""
    for decision in run.decisions:
        if decision.decided and decision.rule != "explicit cast":
            assert decision.low == run.is_low(decision), decision.node


def casts_are_necessary(run: Run) -> None:
    """Each changes a dtype and is used, once per value and dtype, and none reads another."""
    for cast in run.casts:
        source = cast.args[0]
        assert isinstance(source, fx.Node)
        assert cast.users, cast
        assert source.name not in run.rewritten.casts, cast
        assert run.values[source].dtype != cast.kwargs["dtype"], cast
    distinct = {(cast.args[0], cast.kwargs["dtype"]) for cast in run.casts}
    assert len(distinct) == len(run.casts)


def casts_are_as_counted(run: Run) -> None:
    """The plan counts the casts that the rewriting inserts, and there are no more than borders."""
    original = run.rewritten.captured.graph_module.graph
    assert len(run.nodes) == len(original.nodes) + len(run.casts)
    weights = sum(cast.args[0] in run.weights for cast in run.casts)
    counted = casts_of(run.plan, run.mode)
    assert (counted.activations, counted.weights) == (len(run.casts) - weights, weights)
    assert len(run.casts) <= counted.borders


def only_fp32_and_low_values_are_cast(run: Run) -> None:
    """Integers, booleans and FP64 values stay what they are."""
    for cast in run.casts:
        before, after = run.values[cast.all_input_nodes[0]].dtype, run.values[cast].dtype
        assert {before, after} == {torch.float32, getattr(torch, run.plan.dtype)}, cast


# --- what the laws look at -----------------------------------------------------------------------
