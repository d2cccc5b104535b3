"""Nodes that go by another name than in the baseline: a layer was renamed, or wrapped.

Both runs' nodes that the other lacks are laid side by side in the order of their graphs, and the
longest runs of equal operators are matched (`difflib.SequenceMatcher`). The operators of a renamed
encoder are still there, in their order; so its nodes are compared, and not merely gone and new.

SequenceMatcher takes time cubic in a graph that repeats itself. So it is shown `_WINDOW` nodes of
either side at a time, from where the last match ended: a longer insertion parts the two for good,
and what follows is gone and new.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from amp_convert.gate.baseline import Baseline

_WINDOW = 200


def under_old_names(now: Baseline, before: Baseline) -> tuple[Baseline, dict[str, str]]:
    """`now` with the names of the baseline for nodes that were renamed, and old names by new ones.
    Nothing is matched where a side does not know the places of its nodes."""
    new = _in_order(now, before.nodes.keys())
    old = _in_order(before, now.nodes.keys())
    if not new or not old:
        return now, {}
    matched = _matched([_op(name) for name in old], [_op(name) for name in new])
    renamed = {new[there]: old[here] for here, there in matched}
    nodes = {renamed.get(name, name): node for name, node in now.nodes.items()}
    return now.model_copy(update={"nodes": nodes}), renamed


def _matched(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The places of equal operators, in the order of both."""
    here = there = 0
    while here < len(old) and there < len(new):
        pair = old[here : here + _WINDOW], new[there : there + _WINDOW]
        *blocks, _ = difflib.SequenceMatcher(None, *pair, autojunk=False).get_matching_blocks()
        for block in blocks:
            yield from ((here + block.a + i, there + block.b + i) for i in range(block.size))
        last = blocks[-1] if blocks else difflib.Match(0, 0, 0)
        here += max(last.a + last.size, _WINDOW // 2)
        there += max(last.b + last.size, _WINDOW // 2)


def _in_order(baseline: Baseline, known: object) -> list[str]:
    """The nodes that the other side lacks, in the order of the graph."""
    lacking = {name: node.place for name, node in baseline.nodes.items() if name not in known}  # type: ignore[operator]
    if None in lacking.values():
        return []
    return sorted(lacking, key=lambda name: lacking[name] or 0)


def _op(name: str) -> str:
    return name.rpartition("/")[2].partition("#")[0]
