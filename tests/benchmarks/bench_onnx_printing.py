"""The tables that bench_onnx prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """What one tool made of a model. `failure` says why there is nothing to measure."""

    tool: str
    seconds: float
    with_nodes: float = float("nan")
    failure: str = ""
    low: int = 0
    floating: int = 0
    casts: int = 0
    bytes: int = 0
    bare: int = 0
    rounded: float = float("nan")
    session: float = float("nan")

    @property
    def share(self) -> float:
        return self.low / max(self.floating, 1)

    def converts_as_much_as(self, other: File) -> bool:
        """Whether the share is no smaller, but for 2 % or two nodes."""
        more = (self.floating - self.low) - (other.floating - other.low)
        return self.share >= other.share - 0.02 or more <= 2


def print_files(name: str, files: Sequence[File]) -> None:
    print(f"\n{name}")
    print(f"  {'':<22}{'low nodes':>15}{'casts':>7}{'bytes':>12}{'bare':>12}{'error':>10}"
          f"{'in session':>12}{'seconds':>9}{'with nodes':>12}")  # fmt: skip
    for file in files:
        if file.failure:
            print(f"  {file.tool:<22}  {file.failure}"[:110])
            continue
        low = f"{file.low}/{file.floating} {file.share:.0%}"
        more = "" if math.isnan(file.with_nodes) else f"{file.with_nodes:>12.1f}"
        print(f"  {file.tool:<22}{low:>15}{file.casts:>7}{file.bytes:>12,}{file.bare:>12,}"
              f"{file.rounded:>10.2e}"
              f"{file.session:>12.2e}{file.seconds:>9.1f}{more}")  # fmt: skip


def print_summary(found: dict[str, list[File]]) -> None:
    """amp-convert over its neighbours: at most 1 is wanted of errors and times, 1.02 of sizes."""
    print("\namp-convert / neighbour: error at no smaller share, size and time of the default file")
    print(f"  {'model':<14}{'neighbour':<22}{'error':>8}{'size':>8}{'bare':>8}{'time':>8}"
          f"{'with nodes':>12}")  # fmt: skip
    for name, (default, half, *neighbours) in found.items():
        for other in neighbours:
            if other.failure:
                print(f"  {name:<14}{other.tool:<22}   {other.failure}"[:110])
                continue
            fair = [file for file in (default, half) if file.converts_as_much_as(other)]
            ours = min(fair, key=lambda file: file.share, default=None)
            error = f"{ratio(ours.rounded, other.rounded):>8.3f}" if ours else f"{'-':>8}"
            print(f"  {name:<14}{other.tool:<22}{error}"
                  f"{default.bytes / other.bytes:>8.3f}{default.bare / other.bare:>8.3f}"
                  f"{default.seconds / other.seconds:>8.2f}"
                  f"{default.with_nodes / other.seconds:>12.2f}"
                  f"{'   (half)' if ours is half else ''}")  # fmt: skip


def ratio(ours: float, other: float) -> float:
    return ours / other if other else float("nan") if ours else 1.0
