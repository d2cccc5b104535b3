"""The lists of `default` against PyTorch's own databases of operators and modules.

Every operator that their FP32 samples reach is in a category. Every operator, with each node pinned
low, gives in a converted graph the bits that it gives when called by hand on inputs cast as
planned, and the dtypes that the plan states; what has no kernel stays FP32 and says so. How the
operators are found: see `op_samples`.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.export import export_graph
from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.plan import Decision
from amp_convert.profile.calibrate import no_evidence
from amp_convert.rewrite.converted_model import ConvertedModel, convert_captured
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Rule, Rules
from tests.op_samples import (
    NOT_ON_CPU,
    Call,
    OneCall,
    calls_of,
    calls_of_modules,
    captured,
    database,
    float_calls,
    samples,
)
from tests.rules.test_preset_autocast import DEVICES, listed, registered
from tests.staged import BF16, F16, F32, Recorder, rule

pytestmark = pytest.mark.slow  # the first to need them records the samples
aten = torch.ops.aten
LOW = (F16, BF16)

# Every worker records the samples anew, so the work goes to few of them.
dtypes = pytest.mark.parametrize(
    "low",
    [
        pytest.param(F16, id="float16", marks=pytest.mark.xdist_group("op_lists_float16")),
        pytest.param(BF16, id="bfloat16", marks=pytest.mark.xdist_group("op_lists_bfloat16")),
    ],
)


def default_rule(name: str, dtype: torch.dtype = F16, device: str = "cpu") -> Rule | None:
    place = Place(str(dtype).removeprefix("torch."), device, "eval")
    return load_default().match_op(place, name)


@functools.lru_cache(maxsize=1)
def load_default() -> Rules:
    """The preset `default` with its guards off: this is about the lists."""
    return replace(load_rules(["default"]), guards=load_rules(["fp32"]).guards)


def category(name: str, low: torch.dtype = F16, device: str = "cpu") -> str | None:
    found = default_rule(name, low, device)
    return found and found.category.value


# --- every operator is listed --------------------------------------------------------------------

# `torch.nn.functional` makes these out of Python code: not ATen, and in the lists all the same.
NOT_ATEN = ("torch_nn._linear_cross_entropy",)


@pytest.mark.xdist_group("op_lists_float16")
def test_every_op_that_the_samples_reach_has_a_category() -> None:
    reached = {call.name for call in calls_of_modules(2)}
    for info in database():
        if info.name not in NOT_ON_CPU:
            reached |= {call.name for call in calls_of(info, 1000)}
    aten_ops = {name for name in reached if not name.startswith(NOT_ATEN)}
    assert len(aten_ops) > 600
    assert all(name.startswith("aten.") for name in aten_ops)
    unlisted = {
        name
        for name in reached
        for low in LOW
        for device in ("cpu", "cuda")
        if default_rule(name, low, device) is None
    }
    assert sorted(unlisted) == []


# What only export has: sizes of dynamic shapes and their checks, tuple access, and two repairs.
OF_EXPORT = ("operator.", "aten.sym_", "aten._assert_", "aten.reshape.", "aten.to.dtype")


@pytest.mark.xdist_group("op_lists_bfloat16")
def test_the_recorder_sees_the_ops_that_capture_sees() -> None:
    compared = 0
    for info in database()[::25]:
        (sample,) = samples(info, 1)
        whole = Call(info.op, (sample.input, *sample.args), sample.kwargs)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = export_graph(OneCall(whole), whole.tensors(), {}, "eval", dynamic=False)
        exported = {node.op for node in graph.nodes.values()}
        recorded = {call.name for call in calls_of(info, 1)}
        assert {op for op in exported if not op.startswith(OF_EXPORT)} <= recorded, info.full_name
        compared += 1
    assert compared > 25


# --- the bits of the op by hand, and the stated dtypes -------------------------------------------


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


def is_untouched(call: Call) -> bool:
    """Whether not even an override has the node cast: it reads raw memory, or it is the model's own
    cast."""
    return call.op is aten.as_strided.default or (
        call.op is aten._to_copy.default and "dtype" in call.kwargs
    )


def by_hand(call: Call, low: torch.dtype) -> Any:
    """The operator on inputs cast as planned, or what it raises."""
    if is_untouched(call):
        return call.run()
    if facts_of_target(call.op).delivers_low:
        return call.run().to(low)
    kept = facts_of_target(call.op).kept_arguments("cpu")

    def cast(name: str, argument: Any) -> Any:
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(low) if t.dtype == F32 and name not in kept else t,
            argument,
        )

    names = [argument.name for argument in call.op._schema.arguments]
    args = tuple(cast(name, a) for name, a in zip(names, call.args, strict=False))
    kwargs = {name: cast(name, a) for name, a in call.kwargs.items()}
    try:
        return Call(call.op, args, kwargs).run()
    except (RuntimeError, TypeError, ValueError) as error:
        return error


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


# --- kernels of each device ----------------------------------------------------------------------

# OpInfo asks whether the device at hand has compute capability 5.3; here there may be no device.
NEEDS_DEVICE = ("aten.addbmm.default", "aten.bilinear.default", "aten.matmul.default")


def supported(device: str) -> dict[str, set[torch.dtype]]:
    """For each op that is all that some OpInfo reaches, the low dtypes that PyTorch's own tests
    run it with."""
    found: dict[str, set[torch.dtype]] = {}
    for info in database():
        if info.name not in NOT_ON_CPU:
            names = {call.name for call in calls_of(info, 3)}
            if len(names) == 1:
                known = found.setdefault(names.pop(), set())
                known |= {low for low in LOW if low in info.supported_dtypes(device)}
    return found


@pytest.mark.xdist_group("op_lists_bfloat16")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_whatever_may_be_low_has_kernels_by_pytorchs_own_tests(device: str) -> None:
    kernels = supported(device)
    may_be_low = [(name, low) for name in kernels for low in LOW
                  if category(name, low, device) not in ("deny", None)]  # fmt: skip
    assert len(may_be_low) > 450
    missing = [(name, low) for name, low in may_be_low if low not in kernels[name]]
    assert [pair for pair in missing if pair[0] not in NEEDS_DEVICE] == []


@pytest.mark.xdist_group("op_lists_float16")
def test_what_only_the_cpu_denies_for_want_of_a_kernel_has_none_there() -> None:
    checked = set()
    for call in float_calls():
        for low in LOW:
            found = default_rule(call.name, low)
            if found is not None and "the CPU has no kernel" in found.reason:
                assert isinstance(by_hand(call, low), NotImplementedError), (call.name, low)
                assert category(call.name, low, "cuda") in ("allow", "infer", "clear")
                checked.add(found.pattern)
    assert checked == {"aten.avg_pool3d", "aten._upsample_*_aa", "aten.rrelu"}


# --- PyTorch's own lists for autocast ------------------------------------------------------------

# Where `default` goes another way, by device: (op, autocast's category, ours).
DEVIATIONS = {
    "cpu": {
        ("aten.prelu.default", "allow", "infer"),
        ("aten.reflection_pad1d.default", "deny", "clear"),
        ("aten.cat.default", "infer", "clear"),
        ("aten.stack.default", "infer", "clear"),
    },
    "cuda": {
        ("aten.prelu.default", "allow", "infer"),
        # Their kernels compute in FP32 inside.
        ("aten.softmax.int", "deny", "infer"),
        ("aten.layer_norm.default", "deny", "infer"),
        ("aten.rms_norm.default", "deny", "infer"),
        ("aten.group_norm.default", "deny", "infer"),
        # The activation guard knows how much room a power needs.
        ("aten.pow.Tensor_Scalar", "deny", "infer"),
        # Autocast only brings their inputs to one dtype.
        ("aten.bilinear.default", "infer", "allow"),
        ("aten.tensordot.default", "infer", "allow"),
        ("aten.atan2.default", "infer", "deny"),
        ("aten.dot.default", "infer", "deny"),
        ("aten.vdot.default", "infer", "deny"),
        ("aten.grid_sampler.default", "infer", "deny"),
        ("aten.scatter_add.default", "infer", "deny"),
        # Nothing bounds its state.
        ("aten.rnn_relu_cell.default", "allow", "deny"),
    },
}


@pytest.mark.parametrize("device", DEVICES)
def test_default_deviates_from_autocasts_lists_only_where_it_means_to(device: str) -> None:
    names = registered(device)
    found = {
        (name, theirs, category(name, BF16, device))
        for theirs, python_name, _, _ in listed(device)
        for name in names
        if name.split(".")[1] == python_name
    }
    assert {entry for entry in found if entry[1] != entry[2]} == DEVIATIONS[device]
