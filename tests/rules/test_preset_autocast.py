"""The preset `autocast` is torch.autocast.

Oracles: what the installed torch registers with its dispatcher, the lists that PyTorch's own tests
of autocast use, and the bits that torch.autocast gives on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.autocast_test_lists import AutocastCPUTestLists, AutocastTestLists
from torch.utils import _pytree as pytree

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Rules

aten = torch.ops.aten
DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def category(rules: Rules, op: str, device: str = "cpu") -> str | None:
    found = rules.match_op(Place("bfloat16", device, "eval"), op)
    return found and found.category.value


def registered(device: str) -> set[str]:
    """All ops that the installed torch treats under autocast, such as "aten.sum.dim_IntList"."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(DEVICES[device])
    split = (name.removeprefix("aten::").partition(".") for name in names)
    return {f"aten.{base}.{overload or 'default'}" for base, _, overload in split}


def listed(device: str) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """(category, Python name, args, kwargs) from the lists that PyTorch tests autocast with."""
    lists = vars((AutocastCPUTestLists if device == "cpu" else AutocastTestLists)("cpu"))
    for name, entries in lists.items():
        ending = re.search(r"^(?!methods).*(16|fp32|autocast_promote|banned)$", name)
        meaning = {"16": "allow", "fp32": "deny", "banned": "deny", "autocast_promote": "infer"}
        for entry in entries if ending else ():
            kwargs = entry[2] if len(entry) > 2 and isinstance(entry[2], dict) else {}
            yield meaning[ending[1]], entry[0], entry[1], kwargs


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_has_every_op_that_torch_registers_and_no_other(device: str) -> None:
    rules = load_rules(["autocast"])
    stated = [
        r.pattern
        for r in rules.rules
        if r.device == device and r.reason.startswith(("in autocast's", "autocast raises"))
    ]
    assert sorted(stated) == sorted(registered(device))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_has_the_categories_of_torchs_own_tests(device: str) -> None:
    rules, names, checked = load_rules(["autocast"]), registered(device), 0
    for expected, python_name, _, _ in listed(device):
        overloads = [n for n in names if n.split(".")[1] == python_name]
        assert overloads, python_name
        for name in overloads:
            assert (name, category(rules, name, device)) == (name, expected)
            checked += 1
    assert checked > 30


def test_autocast_leaves_what_promotes_by_itself() -> None:
    rules = load_rules(["autocast"])
    for entry in AutocastTestLists("cpu").torch_expect_builtin_promote:
        assert (entry[0], category(rules, f"aten.{entry[0]}.default", "cuda")) == (
            entry[0],
            "clear",
        )


def cast(expected: str, args: Any, low: torch.dtype) -> Any:
    """What the autocast painting does to the inputs of a node."""
    wide = any(t.dtype == torch.float32 for t in pytree.tree_leaves(args) if is_float(t))
    to = {"allow": low, "deny": torch.float32, "infer": torch.float32 if wide else low}[expected]
    return pytree.tree_map(lambda t: t.to(to) if is_float(t) else t, args)


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def assert_same_as_autocast(
    call: Callable[..., Any], expected: str, args: Any, kwargs: dict[str, Any]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        eager = pytree.tree_leaves(call(*args, **kwargs))
    ours = pytree.tree_leaves(call(*cast(expected, args, torch.bfloat16), **kwargs))
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    assert all(torch.equal(o, e) for o, e in zip(ours, eager, strict=True))


@pytest.mark.parametrize("index", range(len(list(listed("cpu")))))
def test_casting_by_the_rules_gives_autocasts_bits(index: int) -> None:
    expected, name, args, kwargs = list(listed("cpu"))[index]
    assert_same_as_autocast(getattr(aten, name), expected, args, kwargs)


def matrices(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def recurrent(gates: int, *, bidirectional: bool = False) -> tuple[Any, ...]:
    copies = 2 if bidirectional else 1
    weights = matrices(*[(gates * 8, 4), (gates * 8, 8), (gates * 8,), (gates * 8,)] * copies)
    (x,), states = matrices((3, 5, 4)), matrices(*[(copies, 3, 8)] * 2)
    state = states if gates == 4 else states[0]
    return x, state, weights, True, 1, 0.0, False, bidirectional, True


COMPOSITES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "einsum.default": ("allow", ("bij,bjk->bik", matrices((2, 3, 4), (2, 4, 5)))),
    "tensordot.default": ("allow", (*matrices((3, 4), (4, 5)), [1], [0])),
    "inner.default": ("allow", tuple(matrices((3, 4), (5, 4)))),
    "linalg_multi_dot.default": ("allow", (matrices((3, 4), (4, 5), (5, 2)),)),
    "linalg_matmul.default": ("allow", tuple(matrices((3, 4), (4, 5)))),
    "lstm.input": ("allow", recurrent(4, bidirectional=True)),
    "rnn_tanh.input": ("allow", recurrent(1)),
    "rnn_relu.input": ("allow", recurrent(1, bidirectional=True)),
    "rnn_tanh_cell.default": ("allow", tuple(matrices((3, 4), (3, 8), (8, 4), (8, 8), (8,), (8,)))),
    "rnn_relu_cell.default": ("allow", tuple(matrices((3, 4), (3, 8), (8, 4), (8, 8), (8,), (8,)))),
    "nll_loss_nd.default": ("deny", (*matrices((3, 4)), torch.tensor([0, 1, 3]))),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_with_a_listed_op_inside_give_autocasts_bits(name: str) -> None:
    if name == "lstm.input" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no BF16 instructions, so autocast's LSTM takes another kernel")
    expected, args = COMPOSITES[name]
    assert category(load_rules(["autocast"]), f"aten.{name}") == expected
    base, overload = name.split(".")
    call = getattr(getattr(aten, base), overload)
    assert_same_as_autocast(call, expected, args, {})
    low = pytree.tree_map(lambda t: t.bfloat16() if is_float(t) else t, args)
    assert_same_as_autocast(call, expected, low, {})


def test_max_pool3d_is_captured_under_another_name() -> None:
    (x,) = matrices((1, 2, 4, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.max_pool3d(x.bfloat16(), 2).dtype == torch.float32
    name = "aten.max_pool3d_with_indices.default"
    assert category(load_rules(["autocast"]), name) == "deny"
