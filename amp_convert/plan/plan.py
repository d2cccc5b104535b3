"""The `Plan`: what was decided about every node, why, and on what evidence. Plain data.

A plan can be printed (`to_frame`), compared (equal inputs give equal plans) and saved as a rules
file (`to_toml`), which anyone may edit and give back with `--rules`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from amp_convert.capture.captured import Uncaptured
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import FULL
from amp_convert.plan.costs import Casts, Island, StoredTwice
from amp_convert.rules.rule_set import Category, Painting, ask_for_fp32

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from amp_convert.eager import EagerPlan


class DecisionKind(StrEnum):
    """What had the last word about a node."""

    NONE = "none"
    """Nothing: it has no FP32 input to decide about."""
    RULE = "rule"
    """The rule for its operator."""
    OVERRIDE = "override"
    """A rule for its node, layer or module."""
    GUARD = "guard"
    """A guard, on a measured value."""
    PAINTING = "painting"
    """The nodes around it: it joins them, or would gain nothing by it."""
    PROPAGATION = "propagation"
    """A node before it that stays in FP32."""
    REFUSED = "refused"
    """Its kernel, which does not take the low dtype."""
    EXPLICIT = "explicit"
    """The model's own code, which asks for a dtype."""
    UNKNOWN = "unknown"
    """Nothing: no rule names its operator, so it stays in FP32."""


class RewriteKind(StrEnum):
    """What is done to a node besides casting; the names are those of the table `[rewrites]`."""

    CLAMP_MASKS = "clamp_masks"
    SCALE_SCORES = "scale_scores"
    RESCALE_LAYERS = "rescale_layers"


@dataclass(frozen=True)
class PlannedInput:
    """What is done to one tensor argument on its way in. `argument` is its name in the operator's
    schema: the tensors of a list share one. It is multiplied by `scale`, a power of two, and then
    cast to `dtype`; None leaves it as it is."""

    argument: str
    dtype: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Decision:
    """What was decided about one node, by which rule, and on what evidence.

    `node` is its stable identity, `name` its FX name, `op` the operator without overload, `module`
    the class around it, `location` the user's file and line. `kind` says what had the last word,
    and `category` is what the rules say of it, None where there was nothing to decide or no rule
    names it. `precision` is the number format that it computes in (for a lookup: delivers);
    `dtype` is that of its first tensor result. `macs` are multiply-adds for the example inputs.

    `rule`, `reason` and `source` are for people: the rule's name, its sentence and its place. Where
    a guard fired, `guard` is its name, `measured` the value that it saw and `limit` what that was
    held to; `evidence` says what was measured in words. `follows` is the node that keeps this one
    in FP32, by identity, where that is the reason.

    The casts: `inputs` has an entry a tensor argument, in order; `output_dtype` is for the result:
    the dtype to cast to, or None. `output_dtypes` are those that the node's consumers see.

    `rewrites` names what else than casts is done. `clamp` is the value that finite FP32 inputs and
    number arguments below it are raised to before they become low, or None. The result is held
    times `scale`, a power of two, and number arguments are multiplied by `number_scale`.
    """

    node: str
    name: str
    layer: str
    module: str
    op: str
    location: str
    kind: DecisionKind
    category: Category | None
    precision: str
    dtype: str
    rule: str
    reason: str
    source: str
    evidence: str
    macs: int
    inputs: tuple[PlannedInput, ...]
    output_dtype: str | None
    output_dtypes: tuple[str | None, ...]
    guard: str = ""
    measured: float | None = None
    limit: float | None = None
    rewrites: tuple[RewriteKind, ...] = ()
    clamp: float | None = None
    scale: float = 1.0
    number_scale: float = 1.0
    follows: str = ""

    @property
    def decided(self) -> bool:
        """Whether there was anything to decide."""
        return self.kind is not DecisionKind.NONE

    @property
    def low(self) -> bool:
        """Whether it computes in another number format than FP32."""
        return self.precision not in ("", FULL)

    @property
    def input_dtypes(self) -> tuple[str | None, ...]:
        """The dtypes that its tensor arguments are cast to, in order; None for no cast."""
        return tuple(planned.dtype for planned in self.inputs)

    @property
    def rewrite(self) -> str:
        """What its rewrites do, as a clause; "" for most nodes."""
        return "; ".join(f"{self._done(kind)} (rewrite {kind})" for kind in self.rewrites)

    @property
    def why(self) -> str:
        """The whole reason in words, rewrites included."""
        return f"{self.reason}; {self.rewrite}" if self.rewrites else self.reason

    def _done(self, kind: RewriteKind) -> str:
        if kind is RewriteKind.CLAMP_MASKS:
            return "its mask is raised into range"
        if self.scale == 1:
            return "it takes the factor of what it reads back"
        return f"its result is held times {self.scale:g}"


@dataclass(frozen=True)
class BatchNormFold:
    """A BatchNorm behind a product, both by identity, and why it does not go into the product's
    weights where a model is frozen so; "" where it does."""

    product: str
    norm: str
    reason: str = ""


@dataclass(frozen=True)
class OperatorRule:
    """What the rules say of an operator, or a glob of operators, in a mode ("" for both)."""

    pattern: str
    category: Category
    mode: str


@dataclass(frozen=True)
class Plan:
    """The decisions for a model's eval and train graphs.

    `dtype` is the low dtype, `device` the device type, `rules` the rules files in order,
    `calibration_batches` the number of batches that the evidence rests on, and `unmatched_rules`
    the node, layer and module rules that no node answers to. `eager_macs` are the multiply-adds of
    what was not captured, `islands` the FP32 regions of the eval graph, the dearest first,
    `stored_twice` the weights that freezing leaves in two dtypes, which rewriting shows.
    `batch_norm_folds` are for
    `freeze(fold_batch_norm=True)` alone, which looks again at the weights of then. `operators` are
    for calls that no decision answers to, where the plan is applied to a running model.
    """

    dtype: str
    device: str
    rules: tuple[str, ...]
    painting: str
    calibration_batches: int
    eval: tuple[Decision, ...]
    train: tuple[Decision, ...]
    eval_casts: Casts
    train_casts: Casts
    uncaptured: tuple[Uncaptured, ...]
    unmatched_rules: tuple[str, ...]
    eager_macs: int = 0
    islands: tuple[Island, ...] = ()
    stored_twice: tuple[StoredTwice, ...] = ()
    batch_norm_folds: tuple[BatchNormFold, ...] = ()
    operators: tuple[OperatorRule, ...] = field(default=(), compare=False, repr=False)

    @property
    def asks_for_bits(self) -> bool:
        """Whether the rules are those that ask for the bits of PyTorch itself."""
        return self.painting == Painting.AUTOCAST or ask_for_fp32(self.rules)

    @property
    def exact(self) -> bool:
        """Whether the bits are to be those of PyTorch itself: of autocast, or of the original."""
        return self.painting == Painting.AUTOCAST or not any(
            d.low for d in (*self.eval, *self.train)
        )

    def unknown_ops(self) -> dict[str, int]:
        """Operators that no rule names and how many nodes of each stayed FP32 for that, sorted."""
        unknown = Counter(d.op for d in self.eval if d.kind is DecisionKind.UNKNOWN)
        return dict(sorted(unknown.items()))

    def low_nodes(self) -> int:
        """Nodes of the eval graph that compute in low precision."""
        return sum(d.low for d in self.eval)

    def decided_nodes(self) -> int:
        """Nodes of the eval graph with an FP32 input: those that there was something to decide
        about.
        """
        return sum(d.decided for d in self.eval)

    def share_nodes_low(self) -> float:
        """Low nodes as a share of the decided ones, 0 to 1."""
        return self.low_nodes() / max(self.decided_nodes(), 1)

    def share_macs_low(self) -> float:
        """Multiply-adds in low nodes as a share of all that could be counted, 0 to 1."""
        return sum(d.macs for d in self.eval if d.low) / max(self.total_macs(), 1)

    def total_macs(self) -> int:
        """All multiply-adds that could be counted, with those of what stays eager."""
        return self.eager_macs + sum(d.macs for d in self.eval)

    def to_frame(self, mode: str = Mode.EVAL) -> pd.DataFrame:
        """One row a node of the graph of `mode` ("eval" or "train"), one column a field, and some
        that follow from those; `reason` is the whole one."""
        import pandas as pd

        decisions = self.eval if mode == Mode.EVAL else self.train
        columns = [*Decision.__dataclass_fields__, "low", "input_dtypes", "rewrite"]
        derived = (
            {"reason": d.why, "low": d.low, "input_dtypes": d.input_dtypes, "rewrite": d.rewrite}
            for d in decisions
        )
        rows = [vars(d) | more for d, more in zip(decisions, derived, strict=True)]
        return pd.DataFrame(rows, columns=columns)

    def to_toml(self) -> str:
        """The plan as a rules file with one `[[rule]]` a decided node; `--rules plan.toml` gives it
        back. See `saved_plan`."""
        from amp_convert.plan.saved_plan import plan_toml

        return plan_toml(self)

    def autocast(self, model: nn.Module | None = None) -> EagerPlan:
        """Apply this plan to `model` as it is, as `torch.autocast` applies its lists: a context,
        or a decorator of a function.

            with mixed.plan.autocast(model):
                model.generate(ids)

        Any shape, method, control flow and hook runs in the plan's precision, operation by
        operation. A call that is no node of the plan takes the rule for its operator; the context
        counts these (`unplanned`). `model` is what was converted; without it, the module that is
        called first is taken for it. The model gives what it gave in FP32, in those dtypes.
        """
        from amp_convert.plan.saved_plan import eager_plan, plan_toml
        from amp_convert.rules.load import rules_of_text

        return eager_plan(rules_of_text(plan_toml(self), "the plan"), "the plan", model)
