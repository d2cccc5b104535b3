"""Law 5 on every model of the tests and of the benchmark, counted: a frozen model asks no more of a
device than the model in the low dtype does, but for what its budget names; a training step no more
than autocast. And what the counter counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

from tests import zoo
from tests.benchmarks import counted_models
from tests.benchmarks.dispatch import counted, inference_arms, training_arms
from tests.benchmarks.dispatch_budget import budget, regions

every_counted_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(name)])
        for name in budget()
    ],
)


@every_counted_model
def test_a_frozen_model_keeps_to_its_budget(name: str) -> None:
    model, args, kwargs = counted_models.example(name)
    converted = counted_models.converted(name, torch.bfloat16)
    arms = inference_arms(model, converted, args, kwargs)
    frozen, low, allowed = arms["frozen"], arms["all low"], budget()[name]
    count = frozen.count
    assert count.total <= allowed["calls"]
    assert count.casts <= allowed["casts"]
    assert count.moved <= allowed["moved"]
    assert frozen.stored <= allowed["stored"]
    assert frozen.peak <= allowed["peak"]

    # The law: what the model in BF16 asks for, a cast for each input and output, and two for each
    # FP32 region that is named.
    with zoo.mode(model), torch.no_grad():
        given = pytree.tree_leaves((args, kwargs, model(*args, **kwargs)))
    ends = sum(isinstance(t, torch.Tensor) and t.is_floating_point() for t in given)
    named = regions(allowed.get("regions", ""))
    assert count.total <= low.count.total + ends + 2 * named
    assert count.casts <= low.count.casts + ends + 2 * named
    assert count.moved - count.wide <= 1.02 * low.count.moved
    if "tables" not in allowed:
        assert frozen.stored <= 1.02 * low.stored + 1024  # norms' statistics, a scale
    assert _attention(count.calls) == _attention(low.count.calls)


@every_counted_model
def test_a_training_step_keeps_to_its_budget(name: str) -> None:
    """Never more kernel calls than under autocast, nor, but for FP32 regions, more bytes."""
    model, args, kwargs = counted_models.example(name)
    converted = counted_models.converted(name, torch.bfloat16)
    steps, allowed = training_arms(model, converted, args, kwargs), budget()[name]
    mixed, step = steps["mixed"], allowed["step"]
    assert mixed.total <= step["calls"]
    assert mixed.moved <= step["moved"]
    if (native := steps.get("autocast")) is not None:
        assert mixed.total <= native.total
        if "step_regions" not in allowed:
            assert mixed.moved <= native.moved
        assert _attention(mixed.calls) == _attention(native.calls)


def _attention(calls: dict[str, int]) -> dict[str, int]:
    return {kernel: n for kernel, n in calls.items() if "attention" in kernel}


def test_each_model_of_the_tests_has_a_budget() -> None:
    assert zoo.BUILDERS.keys() <= budget().keys()


def test_regions_are_counted() -> None:
    found = map(regions, ("", "one; another", "7 x seven alike; one", "x of one"))
    assert list(found) == [0, 2, 8, 1]


def test_what_is_counted() -> None:
    x = torch.randn(4, 6)

    def call() -> None:
        y = x.t().expand(2, 6, 4)  # views
        y = torch.empty(6, 4).copy_(y[0])  # an allocation, and a copy in one dtype
        y = y.to(torch.float16)  # a cast
        y.mul_(2)
        q = torch.zeros(1, 1, 3, 8)
        scaled_dot_product_attention(q, q, q, is_causal=True)

    count = counted(call)
    assert dict(count.calls) == {
        "copy_": 1, "_to_copy": 1, "mul_.Tensor": 1, "zeros": 1,
        "_scaled_dot_product_flash_attention_for_cpu(no mask, causal)": 1,
    }  # fmt: skip
    assert count.casts == 1
    only = counted(lambda: x.to(torch.float16))
    assert (only.read, only.written, only.moved, only.wide) == (96, 48, 144, 144)
    assert counted(lambda: x.half().add_(1)).moved == 144 + 96
    spread = torch.randn(6).expand(4, 6)
    assert counted(lambda: spread + 1).read == 24
