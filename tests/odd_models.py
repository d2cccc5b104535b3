"""What tests of this folder share."""

from __future__ import annotations

from typing import Any

from torch import nn


class Stateful(nn.Module):
    """Keeps something in an attribute that its next call goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.state: Any = None
