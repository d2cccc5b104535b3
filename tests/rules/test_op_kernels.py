"""The default rules and the kernels of each device, and PyTorch's own lists for autocast."""

from __future__ import annotations

import pytest
import torch

from tests.op_samples import (
    NOT_ON_CPU,
    calls_of,
    database,
    float_calls,
)
from tests.rules.default_rules import by_hand, category, default_rule
from tests.rules.test_preset_autocast import DEVICES, listed, registered
from tests.staged import BF16, F16

pytestmark = pytest.mark.slow  # the first to need them records the samples


LOW = (F16, BF16)


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


# --- kernels of each device ----------------------------------------------------------------------


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


# --- PyTorch's own lists for autocast ------------------------------------------------------------


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
