"""Nodes that go by another name than in the baseline: a layer was renamed, or wrapped.

Both runs' nodes that the other lacks are laid side by side in the order of their graphs, and the
longest runs of equal operators are matched (`difflib.SequenceMatcher`). The operators of a renamed
encoder are still there, in their order; so its nodes are compared, and not merely gone and new.
"""

from __future__ import annotations

import difflib

from amp_convert.gate.baseline import Baseline


def under_old_names(now: Baseline, before: Baseline) -> tuple[Baseline, dict[str, str]]:
    """`now` with the names of the baseline for nodes that were renamed, and old names by new ones.
    Nothing is matched where a side does not know the places of its nodes."""
    new = _in_order(now, before.nodes.keys())
    old = _in_order(before, now.nodes.keys())
    if not new or not old:
        return now, {}
    blocks = difflib.SequenceMatcher(
        None, [_op(name) for name in old], [_op(name) for name in new], autojunk=False
    ).get_matching_blocks()
    renamed = {new[block.b + i]: old[block.a + i] for block in blocks for i in range(block.size)}
    nodes = {renamed.get(name, name): node for name, node in now.nodes.items()}
    return now.model_copy(update={"nodes": nodes}), renamed


def _in_order(baseline: Baseline, known: object) -> list[str]:
    """The nodes that the other side lacks, in the order of the graph."""
    lacking = {name: node.place for name, node in baseline.nodes.items() if name not in known}  # type: ignore[operator]
    if None in lacking.values():
        return []
    return sorted(lacking, key=lambda name: lacking[name] or 0)


def _op(name: str) -> str:
    return name.rpartition("/")[2].partition("#")[0]
