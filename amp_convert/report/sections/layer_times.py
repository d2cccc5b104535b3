"""Where the time of a call goes: layers of one class that differ only in an index are one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import layer_name, pattern_of
from amp_convert.validate.inference.results import LayerTime

LEAD = (
    "The operators of each layer, timed one by one on the example inputs: the median of a few "
    "calls. What runs between two of them counts, so the sum is more than a whole call takes: "
    "compare layers and arms with each other."
)
TIMED = ("fp32", "autocast", "mixed", "frozen")


@dataclass(frozen=True)
class TimeRow:
    """The times of some layers added up, as text, an arm each; `share` is that of the frozen
    model's, `slower` whether it takes longer frozen than in FP32."""

    layer: str
    times: tuple[str, ...]
    share: str
    slower: bool = False


def time_rows(times: Iterable[LayerTime], most: int = 20) -> list[TimeRow]:
    """The `most` rows of the longest frozen times, the rest as one, and the sum; none where nothing
    was timed."""
    groups: dict[tuple[str, str], list[LayerTime]] = {}
    for each in times:
        groups.setdefault((pattern_of(each.layer), each.module), []).append(each)
    if not groups:
        return []
    every = [each for members in groups.values() for each in members]
    total = sum(each.frozen for each in every)
    ranked = sorted(groups.values(), key=lambda members: -sum(m.frozen for m in members))
    rows = [_row(_name(members), members, total) for members in ranked[:most]]
    if left := [each for members in ranked[most:] for each in members]:
        rows.append(_row(f"{fmt.count(len(left), 'other layer')}", left, total))
    return [*rows, _row("all", every, total)]


def _name(members: list[LayerTime]) -> str:
    first = members[0]
    kind = f", {fmt.printable(first.module)}" if first.module else ""
    if len(members) == 1:
        return f"{layer_name(first.layer)}{kind}"
    return f"{layer_name(pattern_of(first.layer))}{kind} ({len(members)} layers)"


def _row(name: str, members: list[LayerTime], total: float) -> TimeRow:
    sums: list[float | None] = []
    for arm in TIMED:
        times = [getattr(each, arm) for each in members]
        sums.append(None if None in times else sum(times))
    fp32, frozen = (sum(getattr(each, arm) for each in members) for arm in ("fp32", "frozen"))
    share = fmt.percent(frozen / total if total else 0.0)
    return TimeRow(name, tuple(map(fmt.milliseconds, sums)), share, frozen > fp32)
