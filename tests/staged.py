"""A small model taken through capture and calibration once, ready to be planned in many ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Decision, Plan
from amp_convert.plan.planner import make_plan
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.report.records import NodeRecord
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.insert_casts import Rewritten, rewrite
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Category, GuardLimits, Rule, Rules, Target

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Staged:
    """A captured model and its calibration."""

    model: nn.Module
    args: tuple[Any, ...]
    captured: Captured
    stats: RangeStats

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *args: Any,
        calibration: Iterable[Any] | None = None,
        probes: bool = False,
    ) -> Staged:
        """`calibration` gives tuples of positional inputs; by default the example inputs. `probes`
        try inputs unlike them: they would find what other guards do."""
        captured = capture(model, args, {})
        batches = [args] if calibration is None else calibration
        stats = profile(captured, [(batch, {}) for batch in batches], probes=probes)
        return cls(model, args, captured, stats)

    def plan(
        self,
        rules: Rules | str = "default",
        dtype: torch.dtype = F16,
        refused: Mapping[str, str] | None = None,
    ) -> Plan:
        loaded = load_rules([rules]) if isinstance(rules, str) else rules
        return make_plan(self.captured, loaded, self.stats, dtype, refused or {})

    def convert(self, rules: Rules | str = "default", dtype: torch.dtype = F16) -> ConvertedModel:
        loaded = load_rules([rules]) if isinstance(rules, str) else rules
        return convert_captured(self.captured, loaded, self.stats, dtype)

    def rewritten(self, plan: Plan, mode: str = "eval") -> Rewritten:
        return rewrite(self.captured.regions[0], mode, plan)

    def inputs(self, mode: str = "eval") -> list[Any]:
        """The flat inputs of the captured graphs for the example inputs."""
        return self.captured.regions[0].runner(mode).inputs(self.args, {})


def rule(category: str, *, name: str = "test.toml:1", **target: str) -> Rule:
    """One rule: `rule("deny", layer="head.*")`."""
    ((kind, pattern),) = target.items()
    return Rule(
        Target(kind), pattern, Category(category), "the test says so", None, None, None, name
    )


def rules_with(*rules: Rule, preset: str = "default", **guards: Any) -> Rules:
    """A preset with rules after its own, and with some guards set. Those that try rounding are off
    unless they are set: they would catch what the others do; and nothing is rescaled."""
    loaded = load_rules([preset])
    tried = ("rounding_growth", "output_error", "choice_error", "increment_loss")
    found = replace(loaded.guards, **{**dict.fromkeys(tried, False), **guards})
    assert isinstance(found, GuardLimits)
    kept = replace(loaded.rewrites, scale_scores=False, rescale_layers=False)
    return replace(loaded, rules=(*loaded.rules, *rules), guards=found, rewrites=kept)


def unprobed() -> Rules:
    """The default rules without the guard on inputs unlike those of calibration."""
    loaded = load_rules(["default"])
    return replace(loaded, guards=replace(loaded.guards, probe_headroom=False))


def decisions_of(plan: Plan, mode: str) -> tuple[Decision, ...]:
    return plan.eval if mode == "eval" else plan.train


def casts_of(plan: Plan, mode: str) -> Casts:
    return plan.eval_casts if mode == "eval" else plan.train_casts


# --- reading plans -------------------------------------------------------------------------------

SHORT = {"float16": "f16", "float32": "f32", "int64": "i64", None: "."}


def table(plan: Plan, mode: str = "eval") -> list[str]:
    """A line a node: identity, category, rule, dtype, whether it is low, the casts of its inputs.

    "aten." is left out; "." is an input that nothing casts.
    """
    lines = []
    for d in map(NodeRecord.of, decisions_of(plan, mode)):
        casts = " ".join(SHORT[dtype] for dtype in d.input_dtypes)
        dtype, level = SHORT.get(d.dtype, d.dtype), "low" if d.low else "-"
        lines.append(f"{d.node} | {d.category} | {d.rule} | {dtype} | {level} | {casts}")
    return rows("\n".join(lines).replace("aten.", ""))


def rows(text: str) -> list[str]:
    """The lines of a table, however they are aligned."""
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def decision(plan: Plan, node: str, mode: str = "eval") -> Decision:
    """The decision on a node, "aten." left out of its name."""
    return next(d for d in decisions_of(plan, mode) if d.node.replace("aten.", "") == node)


def low(plan: Plan, mode: str = "eval") -> list[str]:
    """The nodes in low precision, without "aten." and "#0"."""
    found = [d.node for d in decisions_of(plan, mode) if d.low]
    return [node.replace("aten.", "").replace("#0", "") for node in found]


# --- running graphs ------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    values: dict[fx.Node, Any]

    def record(self, inputs: Iterable[Any]) -> dict[fx.Node, Any]:
        self.values = {}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            self.run(*inputs, enable_io_processing=False)
        return self.values

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def same_bits(want: Any, have: Any) -> bool:
    """Equal structure, dtypes, shapes and bits, NaN equal to NaN."""
    if pytree.tree_structure(want) != pytree.tree_structure(have):
        return False
    return all(map(_same, pytree.tree_leaves(want), pytree.tree_leaves(have)))


def _same(want: Any, have: Any) -> bool:
    if not isinstance(want, torch.Tensor):
        return bool(want == have)
    if want.dtype != have.dtype or want.shape != have.shape:
        return False
    return torch.equal(want.isnan(), have.isnan()) and torch.equal(
        want.nan_to_num(), have.nan_to_num()
    )
