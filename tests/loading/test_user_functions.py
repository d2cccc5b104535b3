"""Batches and metrics of the user's, checked as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.core.errors import ModelError
from amp_convert.loading.model_file import Case
from amp_convert.loading.user_functions import score, user_batches


def refusal(function: Callable[..., object], *args: object) -> str:
    with pytest.raises(ModelError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def case_of(model: nn.Module, *args: Any, **kwargs: Any) -> Case:
    return Case("net", "net", "", model, args, kwargs)


def test_user_batches() -> None:
    x = torch.ones(1)
    given: list[Any] = [(x, 0), [(x, x), 1], ({"a": x}, 2), "never reached"]
    assert [*user_batches("eval_batches", lambda: given, "", 3)] == [
        ((x,), {}, 0),
        ((x, x), {}, 1),
        ((), {"a": x}, 2),
    ]
    assert len([*user_batches("eval_batches", lambda: given[:2], "", 99)]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "train_batches() gives no batches (at model.py). Let it give (inputs, target) pairs"),
        ([torch.ones(2, 3)], "batch 0 of train_batches() is a Tensor, not a pair (at model.py)."),
        ([(1, 2, 3)], "batch 0 of train_batches() is a tuple, not a pair (at model.py). "),
        ([((), 1), ([], 2)], "batch 1 of train_batches() gives a list (at model.py). Use a tuple"),
        (None, "train_batches() raised TypeError: 'NoneType' object is not iterable (at "),
    ],
)
def test_refused_batches(given: Any, said: str) -> None:
    batches = user_batches("train_batches", lambda: given, "/x/model.py", 9)
    assert refusal(lambda: [*batches]).startswith(said)


def test_prints_between_batches_are_not_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    def batches() -> Iterator[tuple[Any, int]]:
        sys.stdout.write("theirs")
        yield (), 0

    for _ in user_batches("eval_batches", batches, "", 1):
        sys.stdout.write("ours")
    assert capsys.readouterr() == ("ours", "theirs")


def test_score() -> None:
    case = case_of(nn.Linear(1, 1))
    assert score(case, 1, 2) == {}
    wrong: Any = lambda outputs, target: outputs  # noqa: E731
    assert score(replace(case, metrics=wrong), {"a": torch.tensor([2.0])}, 0) == {"a": 2.0}
    assert refusal(score, replace(case, metrics=wrong), 0.5, 0) == (
        'metrics() gives a float, not a dict. Return a dict of numbers, such as {"accuracy": 0.98}.'
    )
    said = refusal(score, replace(case, metrics=wrong), {"a": "x"}, 0)
    assert said.startswith("metrics() raised ValueError: could not convert string to float: 'x'")
