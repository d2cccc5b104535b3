"""Powers of two that keep products in range, so that they need not retreat to FP32. Pure.

A *region* starts at a product whose result is too large for the low dtype, goes on through
operators that pass a factor on (relu, pooling, views), and ends at operators that can take the
factor back. Inside, values are held times 2**-k. Two kinds, each a rewrite of its own:

- `scale_scores`: a matrix product of two activations, up to the multiplication or division by a
  number (or a tensor of one). The first operand is multiplied by 2**-k before the product, and the
  number by 2**k (or divided): the usual advice, to scale the query instead of the scores.
- `rescale_layers`: a linear layer or a convolution, up to the next ones. The first layer's weight
  and bias are multiplied by 2**-k, the weights of the next by 2**k. Frozen, it costs nothing. Only
  in the eval graph: in training, the gradients of the next weights would leave the range.

A region is given up where keeping it in FP32 is more accurate than any factor: where calibration
saw that rounding one of its values throws a later result off notably (see `rounding_trials`), and
where scores are large after they are scaled.

Only exponents move, so the digits are those that a dtype of the same precision and unlimited range
would give, but for values that become subnormal. So a region is given up when most of a weight
would, or when the largest magnitude of what is multiplied by 2**-k would come under `SMALLEST`:
above it, rounding a subnormal is at most an eighth of the rounding error of a number 32 times
smaller than the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from amp_convert.capture.captured import Value
from amp_convert.core.number_formats import unit_roundoff
from amp_convert.core.op_facts import OpFacts, facts_of
from amp_convert.plan.dtype_flow import tensor_arguments
from amp_convert.plan.evidence import Evidence
from amp_convert.plan.plan import RewriteKind
from amp_convert.profile.rounding_trials import NOTABLE
from amp_convert.rules.rule_set import Rewrites

SMALLEST = 2.0**-7
TINY_SHARE = 0.5
"""Above this share of subnormal or vanishing values a weight is not multiplied."""
SCORE_ERROR = 0.01
"""How far the largest scaled score may be rounded: larger ones are better kept in FP32."""
NEEDED, HEADROOM = 2.0, 8.0
"""A result whose maximum times `NEEDED` leaves the range gets a factor that leaves this `HEADROOM`,
and one that leaves it on inputs unlike those of calibration a factor that just brings it back.
Fixed, whatever a rules file asks of its guards: a saved plan, which has none, scales alike."""


@dataclass(frozen=True)
class Scaling:
    """One node's part in a region: factors, all powers of two.

    Its result is held times `result`. `operands` has the factors for its tensor arguments by
    position among them, `number` that of its number argument. `rewrite` is the region's kind.
    """

    rewrite: RewriteKind | None
    result: float = 1.0
    operands: Mapping[int, float] = field(default_factory=dict)
    number: float = 1.0


UNSCALED = Scaling(None)


class Rescaler:
    """Finds the regions of one graph.

    `values` are the recorded values, `ops` has the short name of every call.
    """

    def __init__(
        self,
        graph: fx.Graph,
        values: Mapping[str, Any],
        ops: Mapping[str, str],
        evidence: Evidence,
        rewrites: Rewrites,
    ) -> None:
        self._graph, self._values, self._ops, self._evidence = graph, values, ops, evidence
        scaling = (RewriteKind.SCALE_SCORES, RewriteKind.RESCALE_LAYERS)
        self._on = {kind for kind in scaling if getattr(rewrites, kind)}

    def find(self, is_low: Callable[[fx.Node], bool], dtype: torch.dtype) -> dict[str, Scaling]:
        """The scaling of every node in a region, and of those that end one, by FX name.

        A region starts at each low product whose calibrated maximum times `NEEDED` is beyond the
        dtype's largest number.
        """
        scales: dict[fx.Node, float] = {}
        kinds: dict[fx.Node, RewriteKind] = {}
        for node in self._graph.nodes:
            kind = self._kind(node)
            if kind is None or kind not in self._on or not is_low(node):
                continue
            scale = self._needed(node, dtype)
            region = self._region(node, kind) if scale < 1 else None
            if region is None or any(map(self._is_sensitive, region)):
                continue
            if kind is RewriteKind.SCALE_SCORES and not self._are_small(region, dtype):
                continue
            if not self._fits(node, region, scale, scales, dtype):
                continue
            for member in region:
                scales[member], kinds[member] = scale, kind
        found = {}
        for node in self._graph.nodes:
            sources = [n for n in node.all_input_nodes if n in scales]
            if node in scales or sources:
                kind = kinds[node] if node in kinds else kinds[sources[0]]
                found[node.name] = self._scaling(node, scales, kind)
        return found

    def _kind(self, node: fx.Node) -> RewriteKind | None:
        if self._layer_weight(node) is not None:
            return RewriteKind.RESCALE_LAYERS
        return RewriteKind.SCALE_SCORES if self._is_product(node) else None

    def _needed(self, node: fx.Node, dtype: torch.dtype) -> float:
        """The power of two that brings a result into range: 1 where it is, or is not finite."""
        seen = self._evidence.range(node)
        if seen is None or not math.isfinite(seen.abs_max):
            return 1.0
        largest = torch.finfo(dtype).max
        excess = seen.abs_max * HEADROOM if seen.abs_max * NEEDED > largest else 0.0
        if seen.probed is not None:
            excess = max(excess, seen.probed.abs_max)
        return 2.0 ** -math.ceil(math.log2(excess / largest)) if excess > largest else 1.0

    def _region(self, source: fx.Node, kind: RewriteKind) -> list[fx.Node] | None:
        """The nodes whose values are held scaled; None where a reader cannot take it."""
        region, pending = [source], [source]
        while pending:
            value = pending.pop()
            for user in value.users:
                if user in region:
                    continue
                if self._passes(user):
                    region.append(user)
                    pending.append(user)
                elif not self._ends(user, value, kind):
                    return None
        return region

    def _is_sensitive(self, node: fx.Node) -> bool:
        growth = self._evidence.growth(node)
        return growth is not None and not growth.result < NOTABLE

    def _are_small(self, region: list[fx.Node], dtype: torch.dtype) -> bool:
        """Whether scores, once scaled, may be rounded."""
        ends = {user for member in region for user in member.users} - set(region)
        for end in ends:
            seen = self._evidence.range(end)
            if seen is None or not seen.abs_max * NEEDED <= torch.finfo(dtype).max:
                return False
            if not abs(seen.maximum) * unit_roundoff(dtype) <= SCORE_ERROR:
                return False
        return True

    def _passes(self, node: fx.Node) -> bool:
        single = isinstance(self._values.get(node.name), Value)
        return single and self._facts(node).keeps_factors and len(list(self._reads(node))) == 1

    def _ends(self, user: fx.Node, value: fx.Node, kind: RewriteKind) -> bool:
        """Whether a reader can take the factor back."""
        facts = self._facts(user)
        if kind is RewriteKind.SCALE_SCORES:
            if not facts.factor or len(user.args) != 2 or user.kwargs:
                return False
            return user.args[0] is value and self._is_number(user.args[1])
        if facts.weights is None or self._layer_weight(user) is None:
            return False
        readers = [name for name, node in self._reads(user) if node is value]
        return readers == [facts.weights[0]]

    def _is_number(self, argument: Any) -> bool:
        """Whether an argument is a number, or a constant tensor that holds one."""
        if isinstance(argument, fx.Node):
            value = self._values.get(argument.name)
            single = isinstance(value, Value) and math.prod(value.shape) == 1
            return single and self._is_constant(argument)
        return isinstance(argument, int | float) and argument != 0

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return bool(self._evidence.weight(node))
        return all(map(self._is_constant, node.all_input_nodes))

    def _layer_weight(self, node: fx.Node) -> fx.Node | None:
        """The weight of a layer, if it is one and that is a parameter."""
        weights = self._facts(node).weights
        found = [n for a, n in self._reads(node) if weights and a == weights[1]]
        return found[0] if found and self._evidence.weight(found[0]) else None

    def _is_product(self, node: fx.Node) -> bool:
        """Whether a node multiplies two matrices, and does nothing else."""
        facts, given = self._facts(node), {name for name, _ in self._reads(node)}
        return bool(facts.contracted) and given in ({"self", "other"}, {"self", "mat2"})

    def _facts(self, node: fx.Node) -> OpFacts:
        return facts_of(self._ops.get(node.name, ""))

    def _reads(self, node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
        return tensor_arguments(node, self._values)

    def _fits(
        self,
        source: fx.Node,
        region: list[fx.Node],
        scale: float,
        scales: Mapping[fx.Node, float],
        dtype: torch.dtype,
    ) -> bool:
        """Whether what is multiplied stays in range, from below and from above."""
        trial = {**scales, **dict.fromkeys(region, scale)}
        concerned = {source, *(user for member in region for user in member.users)}
        limits = torch.finfo(dtype)
        smallest = SMALLEST if dtype == torch.float16 else limits.tiny
        for node in concerned:
            scaling = self._scaling(node, trial, None)
            arguments = [n for _, n in self._reads(node)]
            for index, factor in scaling.operands.items():
                seen = self._evidence.range(arguments[index])
                if seen is None or not seen.abs_max * factor * NEEDED <= limits.max:
                    return False
                is_bias = node.op == "call_function" and index == self._bias_index(node)
                if factor < 1 and not is_bias and seen.abs_max * factor < smallest:
                    return False
                if dtype == torch.float16 and (seen.scaled(factor).tiny_share or 0) > TINY_SHARE:
                    return False
            number = next((a for a in node.args if isinstance(a, int | float)), 1.0)
            if (
                scaling.number != 1
                and not limits.tiny <= abs(number * scaling.number) <= limits.max
            ):
                return False
        return True

    def _bias_index(self, node: fx.Node) -> int | None:
        weights = self._facts(node).weights
        names = [name for name, _ in self._reads(node)]
        return names.index(weights[2]) if weights and weights[2] in names else None

    def _scaling(
        self, node: fx.Node, scales: Mapping[fx.Node, float], kind: RewriteKind | None
    ) -> Scaling:
        """The factors that give `node` its own scale, given those of what it reads."""
        facts, own = self._facts(node), scales.get(node, 1.0)
        arguments = list(self._reads(node))
        read = {name: scales.get(source, 1.0) for name, source in arguments}
        factors: dict[str, float] = {}
        number = 1.0
        if facts.weights is not None and self._layer_weight(node) is not None:
            data, weight, bias = facts.weights
            factors = {weight: own / read[data], bias: own}
        elif self._is_product(node):
            factors = {arguments[0][0]: own}
        elif facts.factor:
            taken = read[arguments[0][0]]
            back = 1 / taken if facts.name == "aten.mul" else taken
            factors = {name: back for name, _ in arguments[1:]}
            number = 1.0 if factors else back
        operands = dict(_by_position(arguments, factors))
        return Scaling(kind, own, operands, number)


def _by_position(
    arguments: list[tuple[str, fx.Node]], factors: Mapping[str, float]
) -> Iterator[tuple[int, float]]:
    for index, (name, _) in enumerate(arguments):
        if factors.get(name, 1.0) != 1.0:
            yield index, factors[name]
