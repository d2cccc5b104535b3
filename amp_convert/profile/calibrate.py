"""Calibration: what values does every node of the FP32 graph really take?

The captured graphs run over calibration batches in FP32, and each value is reduced to its range as
soon as it exists. A NaN or infinity is counted, never dropped: a range that was seen with one
cannot be called safe. In passing it is tried how far rounding the values would throw the next ones
off (see `rounding_trials`), for which a bounded number of activations is kept. Where inputs are
larger than any that calibration saw, the values are as large as `range_probes` find them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import UNTAKEN, OneBranch
from amp_convert.capture.captured import Captured, Region
from amp_convert.capture.graph_signature import Source
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import LOW_DTYPES, is_float_tensor
from amp_convert.core.progress import OnNode, unwatched
from amp_convert.core.random_state import preserved_rng
from amp_convert.core.tensor_errors import CHUNK
from amp_convert.profile.growth import Growth
from amp_convert.profile.range_probes import Extremes, probed_extremes
from amp_convert.profile.rounding_trials import Trials, keep_window

_SPAN = 24
"""How many powers of two up and down the share of tiny weights is known for."""
Growths = dict[torch.dtype, dict[str, Growth]]


@dataclass(frozen=True)
class Range:
    """The range of one value over all calibration batches.

    `abs_max` is the largest finite or infinite magnitude seen, `maximum` the largest value with its
    sign; both are NaN if any element was NaN. `tiny_share`, measured for parameters and buffers
    only, is the share of nonzero values under 2**-14, FP16's smallest normal number; `under` has
    that share for 2**-38 to 2**10, so that it is known after `scaled`. `integral` is
    whether it counts: it was made from integers or ranges alone, or is a buffer, and every value
    was an integer. `lowest_row` is the smallest maximum of a row (last axis), measured where there
    are values below -1e3, as in masks: a mask of -1e9 in a row without any other value counts.
    `probed` is the range of its finite values on inputs unlike those of calibration, where such
    were tried.
    """

    abs_max: float
    maximum: float
    tiny_share: float | None = None
    integral: bool = False
    lowest_row: float = math.inf
    under: tuple[float, ...] = ()
    probed: Range | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, *, is_weight: bool = False, may_count: bool = False) -> Range:
        """The range of a non-empty floating point tensor; `may_count` if it may be integral, and
        the tiny shares if it `is_weight`."""
        under = _shares_under(tensor) if is_weight else ()
        tiny_share = under[_SPAN] if is_weight else None
        low, high = map(float, torch.aminmax(tensor.detach()))
        if math.isnan(low) or math.isnan(high):
            return cls(math.nan, math.nan, tiny_share, under=under)
        size = max(-low, high, 0.0)
        # FP32 itself counts no further than 2**24: what is larger is a mask value, not a count.
        integral = may_count and size <= 2**24 and _is_whole(tensor)
        lowest_row = (
            float(tensor.detach().amax(-1).min()) if low < -1e3 and tensor.dim() else math.inf
        )
        return cls(size, high, tiny_share, integral, lowest_row, under)

    @property
    def masks_whole_rows(self) -> bool:
        """Whether some row is all mask: in FP32 every value of -1e9 + score is the same there, with
        a smaller mask the scores show again."""
        return self.lowest_row < -1e3

    def text(self, batches: int) -> str:
        """The range as evidence in a report."""
        return f"abs max {self.abs_max:.5g} in {batches} batch{'' if batches == 1 else 'es'}"

    def scaled(self, factor: float) -> Range:
        """The range of the values times a power of two, or nearly one."""
        if factor == 1:
            return self
        tiny_share = self.tiny_share
        if self.under:
            shift = min(max(round(math.log2(factor)), -_SPAN), _SPAN)
            tiny_share = self.under[_SPAN - shift]
        size, maximum = self.abs_max * factor, self.maximum * factor
        probed = self.probed.scaled(factor) if self.probed is not None else None
        return Range(size, maximum, tiny_share, lowest_row=self.lowest_row * factor, probed=probed)

    def merged(self, other: Range) -> Range:
        """The range of both; NaN wins over everything."""
        probed = self.probed or other.probed
        if self.probed is not None and other.probed is not None:
            probed = self.probed.merged(other.probed)
        if math.isnan(self.abs_max) or math.isnan(other.abs_max):
            return Range(math.nan, math.nan, self.tiny_share, under=self.under, probed=probed)
        return Range(
            max(self.abs_max, other.abs_max),
            max(self.maximum, other.maximum),
            self.tiny_share,
            self.integral and other.integral,
            min(self.lowest_row, other.lowest_row),
            self.under,
            probed,
        )


@dataclass(frozen=True)
class RangeStats:
    """Ranges by node identity (for parameters and buffers: by their name), and their basis.

    `batches` is how many batches they rest on; 0 when there were no values to measure. `growths`
    has, for each low dtype that was tried, how rounding errors grow around each node.
    """

    batches: int
    ranges: Mapping[str, Range] = field(repr=False)
    growths: Mapping[torch.dtype, Mapping[str, Growth]] = field(default_factory=dict, repr=False)


def no_evidence() -> RangeStats:
    """What is known of a model without values (meta device)."""
    return RangeStats(0, {})


def profile(
    captured: Captured,
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    dtypes: Sequence[torch.dtype] = LOW_DTYPES,
    *,
    probes: bool = True,
    on_node: OnNode = unwatched,
) -> RangeStats:
    """Run the eval graphs in FP32 over `batches` of (args, kwargs); keep ranges, and how errors
    grow that come of rounding to each of `dtypes`. With `probes` the first batch is also tried with
    larger values than it has. `on_node` is told of each node that was looked at."""
    if not devices.has_values(captured.model):
        return no_evidence()
    ranges: dict[str, Range] = {}
    growths: Growths = {dtype: {} for dtype in dtypes}
    extremes: Extremes = {}
    count = 0
    device = captured.device
    with torch.no_grad(), devices.exact_fp32(device), preserved_rng(device):
        for args, kwargs in batches:
            count += 1
            if probes and count == 1:
                extremes = probed_extremes(captured, args, kwargs)
            for region, call in captured.calls(args, kwargs):
                _profile_call(region, call, ranges, growths, on_node)
    for name in extremes.keys() & ranges.keys():
        ranges[name] = replace(ranges[name], probed=Range(*extremes[name]))
    return RangeStats(count, ranges, growths)


def _profile_call(
    region: Region,
    call: tuple[Sequence[Any], Mapping[str, Any]],
    ranges: dict[str, Range],
    growths: Growths,
    on_node: OnNode,
) -> None:
    runner = region.runner(Mode.EVAL)
    inputs = runner.inputs(*call)
    infos = region.graphs[Mode.EVAL].nodes
    for spec, value in zip(runner.signature.inputs, inputs, strict=True):
        name = region.qualified(spec.target)
        if spec.source is not Source.USER and _measurable(value) and name not in ranges:
            may_count = spec.source is not Source.PARAMETER
            ranges[name] = Range.of(value, is_weight=True, may_count=may_count)
    for given, value in runner.signature.users(inputs):
        if _measurable(value):
            _merge(ranges, region.input_key(given.path), Range.of(value))
    counting = {
        node
        for node, spec in runner.signature.placeholders(runner.graph_module.graph).items()
        if spec.source is not Source.USER
        and (seen := ranges.get(region.qualified(spec.target))) is not None
        and seen.integral
    }
    values = region.traces[Mode.EVAL].values
    profiler = _Profiler(
        runner.graph_module, infos, values, ranges, growths, counting, is_whole=not region.path
    )
    profiler.on_node = on_node
    profiler.run(*inputs, enable_io_processing=False)


class _Profiler(OneBranch):
    """Reduces each value to its range as it is made.

    What is made from integer tensors alone, and from what counts itself, may count.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        infos: Mapping[str, NodeInfo],
        values: Mapping[str, Any],
        ranges: dict[str, Range],
        growths: Growths,
        counting: set[fx.Node],
        *,
        is_whole: bool,
    ) -> None:
        super().__init__(graph_module)
        self.user_to_last_uses = keep_window(graph_module.graph, self.user_to_last_uses)
        self._names = {name: info.identity for name, info in infos.items()}
        self._ranges, self._growths, self._counting = ranges, growths, counting
        self._is_whole = is_whole
        self.on_node: OnNode = unwatched
        self._done, self._nodes = 0, len(graph_module.graph.nodes)
        labels = {n: f"{i.short_op} in {i.layer or 'the model itself'}" for n, i in infos.items()}
        self._trials = {d: Trials(graph_module.graph, labels, values, d) for d in growths}

    def run_node(self, n: fx.Node) -> Any:
        result = self._looked_at(n)
        self._done += 1
        self.on_node(self._done, self._nodes)
        return result

    def _looked_at(self, n: fx.Node) -> Any:
        sources = [s for s in n.all_input_nodes if _has_float(self.env[s])]
        may_count = all(source in self._counting for source in sources)
        result = super().run_node(n)
        if result is UNTAKEN:
            return result
        name = self._names.get(n.name)
        if name is not None:
            for leaf in pytree.tree_leaves(result):
                if _measurable(leaf):
                    seen = Range.of(leaf, may_count=may_count)
                    _merge(self._ranges, name, seen)
                    if seen.integral:
                        self._counting.add(n)
        # What a part of the model gives is no output of the model.
        if name is not None or (n.op == "output" and self._is_whole):
            for dtype, trials in self._trials.items():
                known = self._growths[dtype]
                for node, growth in trials.of(n, self.env, result):
                    name = self._names[node.name]
                    known[name] = growth.merged(known.get(name, growth))
        return result


def _has_float(value: Any) -> bool:
    return any(is_float_tensor(leaf) for leaf in pytree.tree_leaves(value))


def _merge(ranges: dict[str, Range], name: str, seen: Range) -> None:
    ranges[name] = seen.merged(ranges.get(name, seen))


def _measurable(value: object) -> TypeGuard[torch.Tensor]:
    return is_float_tensor(value) and value.layout is torch.strided and value.numel() > 0


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether every value is a whole number."""
    return all(torch.equal(part, part.round()) for part in tensor.detach().reshape(-1).split(CHUNK))


def _shares_under(tensor: torch.Tensor) -> tuple[float, ...]:
    """The shares of nonzero values under 2**(-14 - _SPAN), ..., 2**-14, ..., 2**(-14 + _SPAN)."""
    lowest = -14 - _SPAN
    counts = torch.zeros(2 * _SPAN + 2, dtype=torch.int64)
    for part in tensor.detach().reshape(-1).split(CHUNK):
        magnitude = part.abs()
        # frexp gives e with a magnitude in [2**(e - 1), 2**e): it is under 2**n when e <= n.
        exponents = torch.frexp(magnitude[magnitude > 0]).exponent
        found = (exponents.clamp(lowest, lowest + 2 * _SPAN + 1) - lowest).long()
        counts += torch.bincount(found, minlength=len(counts)).cpu()
    shares = counts.cumsum(0).double() / max(int(counts.sum()), 1)
    return tuple(shares[: 2 * _SPAN + 1].tolist())
