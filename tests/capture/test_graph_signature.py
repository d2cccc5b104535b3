"""What tracing assumed of sizes: a condition that nobody can check never counts as held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture import export, graph_signature
from amp_convert.core.mode import Mode


@pytest.mark.parametrize(
    ("codes", "why"),
    [
        (None, "this PyTorch does not tell what tracing assumed of sizes"),
        (["new_words(L['input'].size()[0])"], "the example inputs themselves break new_words("),
        (["L['input'].size()[0] > 100"], "the example inputs themselves break input.size()[0] >"),
    ],
)
def test_conditions_that_nobody_can_check_fix_the_sizes(
    codes: list[str] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = export._program

    def changed(*args: Any, vary: Any, words: Any) -> Any:
        made = program(*args, vary=vary, words=words)
        if vary is not None and codes is None:
            del made._guards_code
        elif vary is not None:
            made._guards_code = codes
        return made

    monkeypatch.setattr(export, "_program", changed)
    graph = export.export_graph(nn.Linear(4, 2), (torch.ones(3, 4),), {}, Mode.EVAL)
    assert graph.fixed_sizes.startswith(why)
    assert graph.signature.user_inputs[0].shape == (3, 4)


def test_a_condition_that_cannot_be_evaluated_does_not_hold() -> None:
    arguments = {"x": torch.ones(0, 3)}
    assert graph_signature._Condition("L['x'].size()[1] == 3")(arguments)
    assert not graph_signature._Condition("8 % L['x'].size()[0] == 0")(arguments)
    assert not graph_signature._Condition("unheard_of(L['x'])")(arguments)
