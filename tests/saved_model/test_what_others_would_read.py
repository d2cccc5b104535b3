"""Archives that gave other numbers than the frozen model without an error, or could not be read:
each was found by a reviewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.saved_model.plain_call import plain
from tests.archives import Named, Pair, loaded, saved


def test_conditions_on_sizes_are_in_the_file(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x = self.a(x) * (2 if x.shape[0] > 4 else 1)
            return x if x.shape[0] != y.shape[0] else x + y

    frozen, _ = saved(Branch(), tmp_path / "m.pt2", torch.randn(3, 4), torch.randn(3, 4))
    program = loaded(tmp_path / "m.pt2")
    x = torch.randn(4, 4)
    with torch.no_grad():
        assert torch.equal(program(x, x), frozen(x, x))
    for rows in ((5, 5), (3, 2)):
        with pytest.raises(AssertionError, match="Guard failed"):
            program(*(torch.randn(n, 4) for n in rows))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_tensor_in_place_of_none_is_refused(by_keyword: bool, tmp_path: Path) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(
            self, x: torch.Tensor, mask: Any = None, y: torch.Tensor | None = None
        ) -> torch.Tensor:
            x = self.a(x) if mask is None else self.a(x).masked_fill(mask, 0.0)
            return x if y is None else x + y

    x = torch.randn(3, 4)
    args, kwargs = ((x,), {"mask": None, "y": x}) if by_keyword else ((x, None, x), {})
    frozen, _ = saved(Optional(), tmp_path / "m.pt2", *args, **kwargs)
    program = loaded(tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(program(x, y=x), frozen(*args, **kwargs))
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises((TypeError, ValueError, AssertionError)):
        program(x, mask=mask, y=x)
    with pytest.raises((TypeError, ValueError, AssertionError)):
        program(x, mask, x)


def test_a_file_that_pytorch_does_not_read_is_not_written(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return {"y": self.a(x), "name": "aa"}

    frozen = amp.convert(Text().eval(), torch.randn(3, 4), train=False).freeze()
    with pytest.raises(UnsupportedModelError, match="does not read the file that it wrote"):
        amp.save(frozen, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Pair, Named])
def test_inputs_in_containers(kind: type, tmp_path: Path) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, given: Any) -> torch.Tensor:
            first, second = given if isinstance(given, tuple) else (given.logits, given.states)
            return self.a(first) - (second[0] if isinstance(second, tuple) else second)

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    given = Pair(x, y) if kind is Pair else Named(x, (y,))
    frozen, archive = saved(Takes(), tmp_path / "m.pt2", given)
    # PyTorch 2.13 fixes the sizes in a dataclass: "Node type mismatch".
    assert [each.shape for each in archive.inputs] == [(None if kind is Pair else 3, 4)] * 2
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "m.pt2")(plain(given)), frozen(given))
