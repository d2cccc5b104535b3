"""What tests of this folder share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from amp_convert.core.op_facts import HEAVY, facts_of_target


class Net(nn.Module):
    """A residual block, a norm, and a head that rules can keep in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.b(torch.relu(self.a(x))) + x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x))

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for row in x:
            yield self.a(row)

    async def later(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def net(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return kind().eval()


class Products(TorchDispatchMode):
    """Counts the dtypes that products compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if facts_of_target(func).is_a(*HEAVY):
            self.dtypes[result.dtype] += 1
        return result


def products_of(call: Callable[[], Any]) -> dict[torch.dtype, int]:
    with Products() as seen:
        call()
    return dict(seen.dtypes)


def plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return model(x)


class Looping(Net):
    """Its control flow depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1 + int(x.abs().max())):
            x = self.a(x)
        return self.head(x)
