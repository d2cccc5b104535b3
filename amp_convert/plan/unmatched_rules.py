"""Rules of the user's that no node answers to: misspelt, perhaps."""

from __future__ import annotations

from collections.abc import Collection

from amp_convert.capture.captured import Captured
from amp_convert.core.spelling import nearest
from amp_convert.rules.rule import Target
from amp_convert.rules.rule_set import Rules


def unmatched(captured: Captured, rules: Rules) -> tuple[str, ...]:
    """The user's node, layer and module rules that no node answers to: misspelt, perhaps."""
    infos = [
        info
        for region in captured.regions
        for graph in region.graphs.values()
        for info in graph.nodes.values()
    ]
    matched = {
        index
        for info in infos
        for index in rules.overrides(node=info.identity, layer=info.layer, modules=info.modules)
    }
    known = {
        Target.NODE: {info.identity for info in infos},
        Target.LAYER: {info.layer for info in infos},
        Target.MODULE: {path for info in infos for path in info.modules},
    }
    return tuple(
        f"{rule.name} ({rule.source}{_nearest(rule.pattern, known[rule.target])})"
        for index, rule in enumerate(rules.rules)
        if rule.target is not Target.OP and not rule.preset and index not in matched
    )


def _nearest(pattern: str, known: Collection[str]) -> str:
    """What may have been meant: the nearest layer, class or node that the model has."""
    ends = {name.rpartition(".")[2].lower(): name for name in sorted(known)}
    near = nearest(pattern, sorted(known))
    if not near:
        near = ends.get(nearest(pattern.rpartition(".")[2].lower(), ends), "")
    return f"; the nearest is {near}" if near else ""
