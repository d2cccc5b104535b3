"""The lists of `default` against PyTorch's own databases of operators and modules.

Every operator that their FP32 samples reach is in a category. Every operator, with each node pinned
low, gives in a converted graph the bits that it gives when called by hand on inputs cast as
planned, and the dtypes that the plan states; what has no kernel stays FP32 and says so. How the
operators are found: see `op_samples`.
"""

from __future__ import annotations

import warnings

import pytest

from amp_convert.capture.export import export_graph
from tests.op_samples import (
    NOT_ON_CPU,
    Call,
    OneCall,
    calls_of,
    calls_of_modules,
    database,
    samples,
)
from tests.rules.default_rules import default_rule
from tests.staged import BF16, F16

pytestmark = pytest.mark.slow  # the first to need them records the samples


LOW = (F16, BF16)


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
