"""Nested outputs, whatever registered their containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from amp_convert.core.tree_paths import map_tensors

X = torch.ones(2)


@dataclass(frozen=True)
class Record:
    values: Any
    name: str = "x"


def test_tensors_are_changed_in_containers_of_their_own() -> None:
    given = {"a": [X, (X, 3)], "b": Record({"c": X})}
    found = map_tensors(lambda t: t + 1, given)
    assert torch.equal(found["a"][0], X + 1)
    assert torch.equal(found["a"][1][0], X + 1)
    assert found["a"][1][1] == 3
    assert torch.equal(found["b"].values["c"], X + 1)
    assert found["b"].name == "x"
    assert torch.equal(given["a"][0], X)


def test_outputs_of_transformers_agree_by_name_and_by_key() -> None:
    found = map_tensors(lambda t: t.half(), BaseModelOutput(X, hidden_states=(X, X)))
    assert isinstance(found, BaseModelOutput)
    assert found["last_hidden_state"] is found.last_hidden_state
    assert found["last_hidden_state"].dtype is torch.float16
    assert found[1][0].dtype is torch.float16
