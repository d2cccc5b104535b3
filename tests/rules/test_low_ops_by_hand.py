"""The default rules and the bits of each operator by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.plan import Decision
from amp_convert.profile.calibrate import no_evidence
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.op_samples import (
    Call,
    captured,
    float_calls,
)
from tests.rules.default_rules import by_hand, category, load_default
from tests.staged import BF16, F16, Recorder, rule

pytestmark = pytest.mark.slow  # the first to need them records the samples


aten = torch.ops.aten


# Every worker records the samples anew, so the work goes to few of them.
dtypes = pytest.mark.parametrize(
    "low",
    [
        pytest.param(F16, id="float16", marks=pytest.mark.xdist_group("op_lists_float16")),
        pytest.param(BF16, id="bfloat16", marks=pytest.mark.xdist_group("op_lists_bfloat16")),
    ],
)


@dataclass(frozen=True)
class Outcome:
    """A converted graph of one call: what was decided about it and what it gave."""

    decision: Decision
    result: Any


def converted_call(call: Call, low: torch.dtype, *, pinned: bool) -> Outcome:
    """Convert and run the graph of one call, its nodes pinned low or left to the default rules."""
    # A lookup delivers low values to low readers only.
    reader = aten.clone.default if facts_of_target(call.op).delivers_low else None
    model = captured(call, reader)
    graph = model.regions[0].graphs["eval"]
    rules = load_default()
    if pinned:
        pins = [rule("allow", node=info.identity) for info in graph.nodes.values()]
        rules = replace(rules, rules=(*rules.rules, *pins))
    converted: ConvertedModel = convert_captured(model, rules, no_evidence(), low)
    decision = converted.plan.eval[0]
    rewritten = converted.rewritten[""]["eval"]
    values = Recorder(rewritten.graph_module).record(call.fresh().tensors())
    return Outcome(decision, values[rewritten.values[decision.name]])


@dataclass(frozen=True)
class Low:
    """A call whose nodes are all pinned low, next to what it gives by hand."""

    call: Call
    decision: Decision
    result: Any
    expected: Any

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def is_refused(self) -> bool:
        """Whether the operator raises when it is called by hand."""
        return isinstance(self.expected, Exception)

    @property
    def is_kept(self) -> bool:
        """Whether the plan keeps it in FP32 for want of a kernel."""
        return self.decision.rule == "no kernel"


@functools.lru_cache(maxsize=2)
def all_low(low: torch.dtype) -> tuple[Low, ...]:
    found = []
    for call in float_calls():
        outcome = converted_call(call, low, pinned=True)
        found.append(Low(call, outcome.decision, outcome.result, by_hand(call, low)))
    return tuple(found)


def is_uninitialised(name: str) -> bool:
    """Whether an operator gives memory as it finds it."""
    return "empty" in name or "resize" in name


def tensor_dtypes(result: Any) -> list[str]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return [str(leaf.dtype).removeprefix("torch.") for leaf in leaves]


def identical(want: Any, have: Any) -> bool:
    """Whether all leaves are the same to the bit, zeros' signs included; NaN equals NaN."""
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
    return all(_identical(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def _identical(want: torch.Tensor, have: torch.Tensor) -> bool:
    if want.dtype != have.dtype or want.shape != have.shape:
        return False
    want, have = want.to_dense(), have.to_dense()
    if want.is_complex():
        want, have = (torch.view_as_real(t.resolve_conj()) for t in (want, have))
    if not want.is_floating_point():
        return torch.equal(want, have)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    number = ~want.isnan()
    return torch.equal(number, ~have.isnan()) and torch.equal(
        want[number].view(integers), have[number].view(integers)
    )


@dtypes
def test_a_low_op_gives_the_bits_of_the_op_by_hand(low: torch.dtype) -> None:
    compared, other = 0, set()
    for case in all_low(low):
        if case.is_refused or case.is_kept or is_uninitialised(case.name):
            continue
        compared += 1
        if not identical(case.expected, case.result):
            other.add(case.name)
    assert compared > 800
    assert sorted(other) == []


@dtypes
def test_the_outputs_of_a_low_op_have_the_stated_dtypes(low: torch.dtype) -> None:
    other = set()
    for case in all_low(low):
        stated = [dtype for dtype in case.decision.output_dtypes if dtype]
        actual = tensor_dtypes(case.result)
        if stated != actual or case.decision.dtype != actual[0]:
            other.add(case.name)
    # Its FP32 result is asked for by an argument that only the fake kernel heeds. It is denied.
    assert other <= {"aten._softmax_backward_data.default"}


@dtypes
def test_an_op_is_refused_if_and_only_if_it_raises_by_hand(low: torch.dtype) -> None:
    cases = all_low(low)
    assert sum(case.is_refused for case in cases) > 90
    assert sorted({case.name for case in cases if case.is_refused and not case.is_kept}) == []
    assert sorted({case.name for case in cases if case.is_kept and not case.is_refused}) == []


@dtypes
def test_a_refused_op_keeps_the_bits_of_float32(low: torch.dtype) -> None:
    for case in all_low(low):
        if case.is_kept:
            assert not case.decision.low, case.name
            assert identical(case.call.run(), case.result), case.name


@dtypes
def test_a_refusal_comes_with_evidence(low: torch.dtype) -> None:
    """What the kernel said, that is: not a range, and not that nothing was measured."""
    silent = {
        case.name
        for case in all_low(low)
        if case.is_refused and case.decision.evidence.startswith(("no evidence", "abs max"))
    }
    assert sorted(silent) == []


@dtypes
def test_a_denied_op_keeps_the_bits_of_float32(low: torch.dtype) -> None:
    denied = [call for call in float_calls() if category(call.name, low) == "deny"]
    assert len(denied) > 300
    for call in denied:
        outcome = converted_call(call, low, pinned=False)
        assert not outcome.decision.low, call.name
        assert identical(call.run(), outcome.result), call.name
