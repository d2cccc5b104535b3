"""What each node's own rounding does to its result, and the FP32 graph that can be differentiated.

Both graphs run in step (see `validate.inference.lockstep`), the FP32 one with gradients on. A
node's error is its mixed result less what FP32 makes of the *same* inputs: those that a low node
hands on are rounded for both. So the rounding of a value counts once, at the node that made it, and
that of a weight, or of an FP32 value on its way into a low node, at the node that reads it.

The error of FP32 itself is its result less that of the same operator in FP64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.core import choices
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.op_facts import Family, facts_of, facts_of_target
from amp_convert.plan.plan import Decision
from amp_convert.rewrite.insert_casts import Rewritten, held
from amp_convert.validate.inference import lockstep
from amp_convert.validate.inference.lockstep import NodeValues


@dataclass(eq=False)
class Site:
    """One floating point result of a node: the FP32 value, whose gradient is the adjoint, and the
    errors of that shape, None for none: of the mixed operator, of FP32 itself, and of a cast to low
    precision alone. `node` is its identity, `part` numbers it among the node's results, and `call`
    the calls of a part of the model that is called more than once."""

    node: str
    part: int
    value: torch.Tensor
    error: torch.Tensor | None
    floor: torch.Tensor | None = None
    cast: torch.Tensor | None = None
    call: int = 0


@dataclass(eq=False)
class LocalErrors:
    """What running both graphs gave: the sites, by order of execution, and the flat outputs.
    `ranked_by` are the nearest nodes with an error of their own, by identity, that a node which
    ranks, and chooses others for rounded values, ranks by."""

    sites: list[Site] = field(default_factory=list)
    ranked_by: list[str] = field(default_factory=list)
    reference: Sequence[Any] = ()
    mixed: Sequence[Any] = ()


def local_errors(
    rewritten: Rewritten,
    inputs: Sequence[Any],
    device: torch.device,
    *,
    floor: bool,
    casts: bool = False,
) -> LocalErrors:
    """Run `rewritten` beside its FP32 graph on flat `inputs`; with `floor`, measure FP32, too, with
    `casts` what rounding each FP32 value that is to be low would do."""
    return _Measuring(rewritten, device, floor=floor, casts=casts).run(inputs)


class _Measuring:
    def __init__(
        self, rewritten: Rewritten, device: torch.device, *, floor: bool, casts: bool
    ) -> None:
        self._rewritten, self._device = rewritten, device
        self._floor, self._casts = floor, casts
        self._decisions: Mapping[str, Decision] = rewritten.decisions
        self._found = LocalErrors()
        self._ranked: list[fx.Node] = []

    def run(self, inputs: Sequence[Any]) -> LocalErrors:
        self._found.reference, self._found.mixed = lockstep.run(
            self._rewritten,
            inputs,
            inputs,
            self._visit,
            lambda node: self._decisions[node.name].low,
            self._device,
            differentiable=True,
        )
        self._found.ranked_by = self._ranked_by()
        return self._found

    def _ranked_by(self) -> list[str]:
        erring = {site.node for site in self._found.sites if site.error is not None}
        found: dict[str, None] = {}
        for ranking in self._ranked:
            pending, seen = [*ranking.all_input_nodes], set[fx.Node]()
            while pending:
                node = pending.pop(0)
                if node in seen:
                    continue
                seen.add(node)
                decision = self._decisions.get(node.name)
                if decision is not None and decision.node in erring:
                    found[decision.node] = None
                else:
                    pending += node.all_input_nodes
        return list(found)

    def _visit(self, step: NodeValues) -> None:
        name = step.node.name
        if step.ranked is not None and choices.changed(
            step.node, step.ranked, step.reference, step.accumulated
        ):
            self._ranked.append(step.node)
        if facts_of(self._decisions[name].op).is_a(Family.UNWRITTEN):
            return
        values = _leaves(step.reference)
        errors = self._errors(step, len(values))
        floors = self._floors(step, len(values)) if self._floor else [None] * len(values)
        for part, (value, error, floor) in enumerate(zip(values, errors, floors, strict=True)):
            cast = self._cast(step.node, value) if self._casts else None
            if error is None and floor is None and cast is None:
                continue
            if not value.requires_grad:
                value.requires_grad_()
            identity = self._decisions[name].node
            self._found.sites.append(Site(identity, part, value, error, floor, cast))

    def _errors(self, step: NodeValues, count: int) -> list[torch.Tensor | None]:
        """The error of each result, None where it is 0 throughout."""
        if step.local is None:
            return [None] * count
        wanted = step.reference
        if step.again is not None and any(map(self._is_low, step.node.all_input_nodes)):
            wanted = step.again(self._as_handed_on)
        decision = self._decisions[step.node.name]
        pairs = list(zip(_leaves(wanted), _leaves(step.local), strict=False))
        found = [_difference(have, held(want, decision), decision.scale) for want, have in pairs]
        return [*found, *[None] * count][:count]

    def _is_low(self, source: fx.Node) -> bool:
        """Whether the mixed graph holds the value of a node in fewer bits than FP32."""
        holder = self._rewritten.values.get(source.name)
        dtype = None if holder is None else holder.meta.get("dtype")
        return source.name in self._decisions and dtype is not None and dtype.itemsize < 4

    def _as_handed_on(self, source: fx.Node, value: Any) -> Any:
        """A value as a low node hands it on, in FP32 again."""
        if not is_float_tensor(value) or not self._is_low(source):
            return value
        decision = self._decisions[source.name]
        low = self._rewritten.values[source.name].meta["dtype"]
        rounded = held(value, decision).to(low).to(value.dtype)
        return rounded if decision.scale == 1 else rounded / decision.scale

    def _cast(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        if not self._is_low(node):
            return None
        return _difference(self._as_handed_on(node, value.detach()), value.detach(), 1.0)

    def _floors(self, step: NodeValues, count: int) -> list[torch.Tensor | None]:
        """The error of FP32 itself; None where there is none, or no kernel that tells."""
        moves = facts_of_target(step.node.target).is_a(Family.SHAPE, Family.COPY, Family.PART)
        if step.again is None or moves:
            return [None] * count
        try:
            exact = step.again(_in_fp64)
        except (RuntimeError, NotImplementedError):
            return [None] * count
        pairs = list(zip(_leaves(exact), _leaves(step.reference), strict=False))
        found = [_difference(have, want, 1.0) for want, have in pairs]
        return [*found, *[None] * count][:count]


def _in_fp64(_: fx.Node, value: Any) -> Any:
    return value.double() if is_float_tensor(value) else value


def _difference(have: torch.Tensor, want: torch.Tensor, scale: float) -> torch.Tensor | None:
    """`have` less `want`, in FP32; equal infinities differ by 0. None where nothing differs."""
    if have.shape != want.shape:
        return None
    wide = torch.promote_types(have.dtype, want.dtype)
    have, want = have.to(wide), want.to(wide)
    error = torch.where(have == want, torch.zeros_like(have), have - want).float()
    error = error if scale == 1 else error / scale
    return error if bool(error.count_nonzero()) else None


def _leaves(value: Any) -> list[torch.Tensor]:
    """The floating point results that are not empty. Complex ones are left out: they are never
    low."""
    return [leaf for leaf in pytree.tree_leaves(value) if is_float_tensor(leaf) and leaf.numel()]
