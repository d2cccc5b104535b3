"""What a report says of one node of the plan: a record of its own, so that what planning keeps may
change and the report's keys stay."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.plan.plan import Decision, DecisionKind, RewriteKind


@dataclass(frozen=True)
class NodeRecord:
    """What was decided about one node, by which rule, and on what evidence.

    `node` is its stable identity, `name` its FX name, `op` the operator without overload, `module`
    the class around it, `location` the user's file and line. `category` is allow, infer, deny or
    clear, "unknown" when no rule names the op, or "none" when the node has no FP32 input to decide
    about; `kind` says what had the last word. `low` says whether it computes in (for a lookup:
    delivers) the low dtype, and `precision` in which number format; `dtype` is that of its first
    tensor result. `macs` are multiply-adds for the example inputs.

    `reason` is the whole sentence, rewrites included, and `rewrite` that part of it. Where a guard
    fired, `guard` is its name, `measured` the value that it saw and `limit` what that was held to.
    `follows` is the node that keeps this one in FP32, where that is the reason.

    The casts: `input_dtypes` has an entry a tensor argument, `output_dtype` is for the result: the
    dtype to cast to, or None. `output_dtypes` are those that the node's consumers see. `clamp` is
    the value that finite FP32 inputs and number arguments below it are raised to before they become
    low, or None. The result is held times `scale`; `input_scales` has the factor for each tensor
    argument, and is empty where all are 1; `number_scale` is that of a number argument. All are
    powers of two.
    """

    node: str
    name: str
    layer: str
    module: str
    op: str
    location: str
    category: str
    dtype: str
    rule: str
    reason: str
    source: str
    evidence: str
    low: bool
    macs: int
    input_dtypes: tuple[str | None, ...]
    output_dtype: str | None
    output_dtypes: tuple[str | None, ...]
    rewrite: str = ""
    clamp: float | None = None
    scale: float = 1.0
    input_scales: tuple[float, ...] = ()
    number_scale: float = 1.0
    kind: DecisionKind = DecisionKind.RULE
    precision: str = ""
    guard: str = ""
    measured: float | None = None
    limit: float | None = None
    rewrites: tuple[RewriteKind, ...] = ()
    follows: str = ""

    @classmethod
    def of(cls, decision: Decision) -> NodeRecord:
        """The record of a decision."""
        scales = tuple(planned.scale for planned in decision.inputs)
        missing = "unknown" if decision.kind is DecisionKind.UNKNOWN else "none"
        return cls(
            node=decision.node,
            name=decision.name,
            layer=decision.layer,
            module=decision.module,
            op=decision.op,
            location=decision.location,
            category=missing if decision.category is None else decision.category.value,
            dtype=decision.dtype,
            rule=decision.rule,
            reason=decision.why,
            source=decision.source,
            evidence=decision.evidence,
            low=decision.low,
            macs=decision.macs,
            input_dtypes=decision.input_dtypes,
            output_dtype=decision.output_dtype,
            output_dtypes=decision.output_dtypes,
            rewrite=decision.rewrite,
            clamp=decision.clamp,
            scale=decision.scale,
            input_scales=scales if any(scale != 1 for scale in scales) else (),
            number_scale=decision.number_scale,
            kind=decision.kind,
            precision=decision.precision,
            guard=decision.guard,
            measured=decision.measured,
            limit=decision.limit,
            rewrites=decision.rewrites,
            follows=decision.follows,
        )

    @property
    def decided(self) -> bool:
        """Whether there was anything to decide."""
        return self.category != "none"
