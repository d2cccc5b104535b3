"""What later stages ask of a Case: one eager run, and calls."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from amp_convert.core.errors import ModelError
from amp_convert.core.tree_paths import named_leaves
from amp_convert.loading.first_run import check_forward
from amp_convert.loading.model_file import Case, as_call


def refusal(function: Callable[..., object], *args: object) -> str:
    with pytest.raises(ModelError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def case_of(model: nn.Module, *args: Any, **kwargs: Any) -> Case:
    return Case("net", "net", "", model, args, kwargs)


# check_forward


class Recorder(nn.Module):
    """Draws random numbers, writes to a buffer in both ways and changes its input."""

    seen: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(3, 2), nn.Dropout()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.add_(1)
        self.count = self.count + 1
        y: torch.Tensor = self.layer(x) + torch.rand(2) * scale
        x.zero_()
        return y


def test_forward_leaves_everything_as_it_was() -> None:
    model, x = Recorder(), torch.ones(4, 3)
    model.frozen.eval()
    seen, count, state = model.seen, model.count, torch.get_rng_state()
    outputs = check_forward(case_of(model, x, scale=0.0))
    assert torch.equal(outputs, model.layer(torch.ones(4, 3)))
    assert not outputs.requires_grad
    assert (model.seen is seen, model.count is count) == (True, True)
    assert (seen.sum(), count, x.sum()) == (0, 0, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (model, model.layer, model.frozen)] == [True, True, False]


class Give(nn.Module):
    """Returns whatever it is made with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Any:
        return self.value


def test_nan_in_fp32_is_counted_by_output() -> None:
    nan, inf = float("nan"), float("inf")
    good = {"mask": torch.tensor([-inf, 0.0]), "ids": torch.ones(2, dtype=torch.int64)}
    assert check_forward(case_of(Give(good))) is good
    bad = {**good, "states": (torch.ones(2), torch.tensor([[nan, 1, nan]])), "p": torch.tensor(nan)}
    assert refusal(check_forward, case_of(Give(bad))) == (
        "the FP32 model itself gives NaN in its output (states[1]: 2 of 3 values; p: 1 of 1 "
        "values). Correct the model or example_inputs first: NaN cannot be compared with anything."
    )


def test_outputs_without_a_tensor_are_refused() -> None:
    assert refusal(check_forward, case_of(Give(None))).startswith(
        "the model returns None, in which"
    )
    assert "returns a dict, in which no tensor can be found" in refusal(
        check_forward, case_of(Give({"a": 1}))
    )


def test_tensors_without_values_are_not_examined() -> None:
    meta = nn.Linear(3, 2, device="meta")
    assert check_forward(case_of(meta, torch.ones(4, 3, device="meta"))).is_meta
    with FakeTensorMode():
        case = case_of(nn.Linear(3, 2), torch.ones(4, 3))
    assert check_forward(case).shape == (4, 2)


# as_call, named_leaves, user_batches, score


def test_as_call() -> None:
    x = torch.ones(1)
    assert as_call(x) == ((x,), {})
    assert as_call((x, 2)) == ((x, 2), {})
    assert as_call(()) == ((), {})
    assert as_call(namedtuple("Pair", "a b")(x, x)) == ((x, x), {})
    assert as_call(OrderedDict(a=x)) == ((), {"a": x})


def test_named_leaves_follow_the_path_in_order() -> None:
    @dataclass
    class Out:
        x: int
        y: tuple[int, int]

    value = {"logits": 1, "states": [Out(2, (3, 4)), {"k": None}]}
    assert named_leaves(value) == [
        ("logits", 1),
        ("states[0].x", 2),
        ("states[0].y[0]", 3),
        ("states[0].y[1]", 4),
        ("states[1].k", None),
    ]
    assert named_leaves((5,)) == [("[0]", 5)]
    assert named_leaves(6) == [("output", 6)]
    assert named_leaves({}) == []
