"""What tests of this folder share."""

from __future__ import annotations

from tests.command import net

# Draws its weights without a seed and counts the batches that are asked for.
COUNTING = (
    net("return self.a(x)")
    + """
drawn = []

def eval_batches():
    for seed in range(100):
        drawn.append(seed)
        yield torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), None
"""
)


class Recorder:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.advanced: list[str] = []
        self.nodes: list[tuple[int, int]] = []

    def stage(self, name: str, steps: int | None = None) -> None:
        self.stages.append((name, steps))

    def node(self, done: int, nodes: int) -> None:
        self.nodes.append((done, nodes))

    def advance(self) -> None:
        self.advanced.append(self.stages[-1][0])
