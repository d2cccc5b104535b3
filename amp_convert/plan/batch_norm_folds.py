"""Which BatchNorms can go into the weights of the product before them, for inference.

By its running statistics a BatchNorm multiplies each channel and adds to it, and so does the layer
before it once its weight w and bias b are multiplied beforehand (`folded_weights`):

    g (w x + b - m) / √(v + eps) + h  =  (s w) x + s (b - m) + h,   s = g / √(v + eps)

with the running mean m and variance v, the weight g and bias h of the BatchNorm.

One rounding and one pass over the activations are saved. But s w may leave a dtype's range where w
does not (a channel of nearly no variance, or of a tiny gain), so the guards of weights look at what
would be stored, channel by channel. They look again at the weights that a model is frozen with.
Folded is only where both compute in one low dtype, nothing else reads what is between them, and all
tensors are the model's own; see `rewrite.fold_batch_norm` for how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx

from amp_convert.capture.captured import Region
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.plan.guards import Operand, Site
from amp_convert.plan.guards.weight_range import WeightRange, WeightTiny
from amp_convert.plan.plan import BatchNormFold, Decision
from amp_convert.profile.calibrate import Range
from amp_convert.rules.rule import GuardLimits

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
"""How a trace calls it. Its arguments: input, g, h, m, v, momentum, eps."""
CHANNEL = {
    aten.conv1d.default: 0, aten.conv2d.default: 0, aten.conv3d.default: 0,
    aten.conv1d.padding: 0, aten.conv2d.padding: 0, aten.conv3d.padding: 0,
    aten.linear.default: 0,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
}  # fmt: skip
"""The products that can take a BatchNorm in, and the dimension of their output channels in the
weight. Their arguments begin with input, weight, bias."""
_LIMITS = GuardLimits()
"""Of the guards, whatever a rules file says of other weights: no rule has decided about these, and
a plan that is given back switches its guards off."""
TINY = torch.finfo(torch.float16).tiny
_GROUPS = 6
"""The place of `groups` among the arguments of a transposed convolution."""

Call = Callable[..., Any]
"""Calls an operator on tensors, or puts the call into a graph."""


def folded_weights(
    call: Call,
    product: tuple[Any, Any],
    norm: tuple[Any, Any, Any, Any],
    eps: float,
    shape: list[int],
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Any]:
    """The weight and bias of a product that does its BatchNorm's work, in `dtype`.

    `product` are its w and b, `norm` are g, h, m and v; b, g and h may be None.
    `shape` is that of a channel's factor beside the weight.
    """

    def wide(tensor: Any) -> Any:
        return None if tensor is None else call(aten._to_copy.default, tensor, dtype=dtype)

    weight, bias = map(wide, product)
    gain, offset, mean, variance = map(wide, norm)
    scale = call(aten.rsqrt.default, call(aten.add.Scalar, variance, eps))
    if gain is not None:
        scale = call(aten.mul.Tensor, scale, gain)
    centred = call(aten.neg.default, mean) if bias is None else call(aten.sub.Tensor, bias, mean)
    shift = call(aten.mul.Tensor, centred, scale)
    if offset is not None:
        shift = call(aten.add.Tensor, shift, offset)
    return call(aten.mul.Tensor, weight, call(aten.view.default, scale, shape)), shift


def factor_shape(product: fx.Node, dims: int) -> list[int]:
    """The shape of the channels' factors beside a weight of so many dimensions."""
    channel = CHANNEL[product.target]  # type: ignore[index]
    return [-1 if dim == channel else 1 for dim in range(dims)]


def batch_norm_folds(region: Region, decisions: Mapping[str, Decision]) -> Iterator[BatchNormFold]:
    """Each BatchNorm behind a product, and whether it is folded; `decisions` by node identity."""
    graph = region.graphs[Mode.EVAL]
    norms = graph.graph_module.graph.find_nodes(op="call_function", target=BATCH_NORM)
    pairs = [(n.args[0], n) for n in norms if _is_product(n.args[0])]
    if pairs and devices.has_values(region.module):
        folds = _Folds(region, decisions)
        for product, norm in pairs:
            product_id, norm_id = (graph.nodes[node.name].identity for node in (product, norm))
            reason = folds.why_not(product, norm)
            yield BatchNormFold(product_id, norm_id, reason)


def _is_product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in CHANNEL


class _Folds:
    """What is known of the eval graph of a region, and why a pair in it is not folded."""

    def __init__(self, region: Region, decisions: Mapping[str, Decision]) -> None:
        graph = region.graphs[Mode.EVAL]
        self._values = region.traces[Mode.EVAL].values
        self._planned = {name: decisions[info.identity] for name, info in graph.nodes.items()}
        held = zip(
            graph.graph_module.graph.find_nodes(op="placeholder"),
            graph.signature.inputs,
            region.runner(Mode.EVAL).tensors(),
            strict=True,
        )
        self._own: dict[Any, torch.Tensor] = {}
        self._names: dict[Any, str] = {}
        for node, spec, tensor in held:
            if tensor is not None and not spec.mutated:
                self._own[node], self._names[node] = tensor.detach(), region.qualified(spec.target)

    def why_not(self, product: fx.Node, norm: fx.Node) -> str:
        """Why a pair is not folded, "" where it is."""
        first, second = self._planned[product.name], self._planned[norm.name]
        if not (first.low and first.precision == second.precision):
            return "the two do not compute in one low dtype"
        if list(product.users) != [norm]:
            return "something else reads what the product gives"
        if any(p.rewrites or p.output_dtype is not None for p in (first, second)):
            return "a rewrite of the plan stands between them"
        if any(p.dtype is not None and p.argument == "input" for p in second.inputs):
            return "a cast stands between them"
        tensors = [*product.args[1:3], *norm.args[1:5]]
        if not all(t is None or t in self._own for t in tensors):
            return "its tensors are not all the model's own"
        weight = product.args[1]
        assert isinstance(weight, fx.Node)
        if list(weight.users) != [product]:
            return "its weight is read elsewhere as well, and would be stored twice"
        if len(self._values[product.name].shape) != self._own[weight].dim():
            return "the BatchNorm's channels are not those of the product"
        groups = product.args[_GROUPS] if len(product.args) > _GROUPS else 1
        if CHANNEL[product.target] and groups != 1:  # type: ignore[index]
            return "a transposed convolution in groups has no dimension of its output channels"
        return self._what_guards_say(product, norm, first)

    def _what_guards_say(self, product: fx.Node, norm: fx.Node, planned: Decision) -> str:
        """What the guards of weights say of those that would be stored."""
        weight, bias = product.args[1], product.args[2] if len(product.args) > 2 else None
        gain, offset, mean, variance = (self._own.get(a) for a in norm.args[1:5])
        folded = folded_weights(
            lambda op, *args, **kwargs: op(*args, **kwargs),
            (self._own[weight], self._own.get(bias)),
            (gain, offset, mean, variance),
            cast(float, norm.args[6]),
            factor_shape(product, self._own[weight].dim()),
            torch.float32,  # a weight may be as large as all the rest
        )
        said = (f"{self._names[weight]} times its BatchNorm's factor", "of its BatchNorm's offset")
        operands = [
            Operand(argument, Range.of(value, is_weight=True), tuple(value.shape), weight=what)
            for argument, value, what in zip(("weight", "bias"), folded, said, strict=True)
        ]
        low = from_name(planned.precision)
        finding = WeightRange().find(Site(planned.op, operands=operands), _LIMITS, low)
        # A whole channel may vanish among others. The bias is nothing beside a channel that is not
        # tiny, and is as small as it where it is.
        channel = CHANNEL[product.target]  # type: ignore[index]
        rows = folded[0].movedim(channel, 0).flatten(1)
        shares = torch.stack([(rows.abs() < TINY) & (rows != 0), rows != 0]).sum(2).double()
        worst = int((shares[0] / shares[1].clamp(min=1)).argmax())
        if finding is None:
            tiny = Operand("weight", Range.of(rows[worst], is_weight=True), weight=said[0])
            site = Site(planned.op, operands=[tiny])
            finding = WeightTiny().find(site, _LIMITS, low)
        if finding is None:
            return ""
        return f"{finding.reason}: {finding.evidence} (guard {finding.guard})"
