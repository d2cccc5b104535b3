"""A plan as text: a rules file that anyone may edit and give back.

Beside the rules of its nodes it holds what it was made for, and the rules of operators. Planning
asks neither, since each node that there is something to decide about is pinned; who applies the
saved plan to a running model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from amp_convert.core.errors import UsageError
from amp_convert.eager import EagerPlan
from amp_convert.rules.rule_set import Category, Painting, Rewrites, Rules

if TYPE_CHECKING:
    from torch import nn

    from amp_convert.plan.plan import Decision, Plan


def plan_toml(plan: Plan) -> str:
    """The plan as a rules file with one `[[rule]]` a decided node; `--rules plan.toml` gives it
    back.

    With Grappler's painting a node is pinned by what it became (allow: low, deny: FP32); with
    autocast's by its category, which decides about each of its inputs. A node that the two
    graphs decide differently about gets a rule for each mode.
    """
    rules = ", ".join(map(quoted, plan.rules))
    lines = [
        f"# amp-convert's plan for {plan.dtype}, made from {rules}.",
        "# Copy it, change a category (allow: low precision, deny: FP32), and give that back",
        "# with --rules. This file itself is replaced by the next run.",
        f"painting = {quoted(plan.painting)}",
        "# What the guards found is already decided below.",
        "guards = false",
        "",
        "[made_for]",
        f"dtype = {quoted(plan.dtype)}",
        f"device = {quoted(plan.device)}",
        *_treated(plan),
        "",
        "[rewrites]",
        *(f"{name} = {str(used).lower()}" for name, used in _rewrites(plan).items()),
    ]
    for decision, mode in _pinned(plan):
        lines += [
            "",
            "[[rule]]",
            f"node = {quoted(decision.node)}",
            f"category = {quoted(_category(plan, decision))}",
            *([f"mode = {quoted(mode)}"] if mode else []),
            *([f"location = {quoted(decision.location)}"] if decision.location else []),
            f"reason = {quoted(decision.reason)}",
        ]
    if plan.operators:
        lines += ["", "# What the rules say of operators, for calls that are no node above."]
    for (category, mode), patterns in _operators_by_category(plan).items():
        lines += [
            "",
            "[[rule]]",
            f"ops = [{', '.join(map(quoted, patterns))}]",
            f"category = {quoted(category)}",
            *([f"mode = {quoted(mode)}"] if mode else []),
            'reason = "the rule for the operator"',
        ]
    return "\n".join(lines) + "\n"


def eager_plan(rules: Rules, shown: str, model: nn.Module | None) -> EagerPlan:
    """A saved plan, read as `rules`, to be applied to `model` as it is; `shown` is what errors call
    it. Raises UsageError for what is no saved plan."""
    if rules.made_for is None:
        raise UsageError(
            f"{shown} is no saved plan: it does not say what it was made for",
            mend="Give a plan.toml that amp-convert wrote, with its table [made_for].",
        )
    return EagerPlan(rules, rules.made_for, model)


_SCALING = frozenset({"scale_scores", "rescale_layers"})


def is_scaled(decision: Decision) -> bool:
    """Whether a power of two goes in with its arguments or its result."""
    return not _SCALING.isdisjoint(decision.rewrites)


def _treated(plan: Plan) -> Iterator[str]:
    """What is done to nodes besides casting, as lines of `[made_for]`."""
    nodes = (*plan.eval, *plan.train)
    treated = {
        "clamped": [d.node for d in nodes if "clamp_masks" in d.rewrites],
        "rescaled": [d.node for d in nodes if is_scaled(d)],
    }
    for name, found in treated.items():
        if found:
            yield f"{name} = [{', '.join(map(quoted, dict.fromkeys(found)))}]"


def _operators_by_category(plan: Plan) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for rule in plan.operators:
        found.setdefault((rule.category, rule.mode), []).append(rule.pattern)
    return found


def _rewrites(plan: Plan) -> dict[str, bool]:
    """The name of each rewrite, and whether some node of the plan has it."""
    used = {kind for d in (*plan.eval, *plan.train) for kind in d.rewrites}
    return {rewrite.name: rewrite.name in used for rewrite in fields(Rewrites)}


def _pinned(plan: Plan) -> Iterator[tuple[Decision, str]]:
    """Each decided node, with the one mode that it is pinned for, or "" for both."""
    in_train = {d.node: d for d in plan.train if d.decided}
    for decision in plan.eval:
        twin = in_train.pop(decision.node, None)
        if decision.decided:
            differs = twin is not None and _category(plan, twin) != _category(plan, decision)
            yield decision, "eval" if differs else ""
            if twin is not None and differs:
                yield twin, "train"
        elif twin is not None:
            yield twin, ""
    for decision in in_train.values():
        yield decision, ""


def _category(plan: Plan, decision: Decision) -> str:
    if plan.painting == Painting.AUTOCAST and decision.category is not None:
        return decision.category
    return Category.ALLOW if decision.low else Category.DENY


def quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
