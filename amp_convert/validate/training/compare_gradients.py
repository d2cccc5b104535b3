"""ConvertedModel -> `GradientParity`: one training step's gradients held against FP32's.

Same weights, same batch, same random numbers; five steps, forward and backward, and none of an
optimizer (see `gradient_step`):

1. The eager FP32 model. It is run first, so that whatever is wrong with the batch, the loss or the
   FP32 gradients is said before anything is compared.
2. The captured FP32 graph, the reference, whose activation gradients are reduced to histograms of
   exponents on the way. Its parameter gradients are held against the eager model's as well: a
   reference is checked, not trusted.
3. The eager FP32 model with every weight rounded to the low dtype, once. How far its gradients part
   from FP32's is what the model itself makes of rounding: in deep networks with BatchNorm that can
   be most of a gradient at the first weights, and no fault of a conversion's. Then with every
   weight moved by one ULP: a layer whose gradients part by that is noise in FP32 already, such as
   a bias before a BatchNorm.
4. The mixed model, with the loss multiplied by the loss scale, and the gradients divided by it.

The loss is computed from outputs in the original's dtypes in all of them. Errors are summed in
FP64, a chunk at a time, and added up over a layer's parameters and over all.

A model that was captured in parts is run as it is, with each captured part replaced by its FP32
graph in step 2, as it is by its mixed graph in step 4. Activation gradients are then those inside
the captured parts alone; parameter gradients are complete.

The recommended loss scale rests on the gradients of all weights and all activations, whether the
plan keeps them in FP32 or not: that is on the safe side, and the same for every plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.errors import ModelError
from amp_convert.core.exponent_histogram import TINIEST, Exponents, log2, recommend_scale
from amp_convert.core.tensor_errors import ErrorSums, chunks, larger
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.gradient_results import (
    ActivationGradient,
    GradientDifference,
    GradientParity,
    GradientRange,
    LayerGradient,
    ParameterGradient,
)
from amp_convert.validate.training.gradient_step import Loss, StepTrace, TrainStep


def compare_gradients(
    converted: ConvertedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    target: Any,
    loss: Loss,
    *,
    scale: float = 1.0,
    backoff: float | None = None,
    path: str = "",
) -> GradientParity:
    """Run one training step of both models on one batch, without updating anything, and measure.

    `scale` is the loss scale of the mixed model, a power of two: typically 2**16 for FP16 and 1 for
    BF16. With a `backoff` factor below 1 it is lowered by that, to a power of two, for as long as
    the mixed gradients are not finite, as a dynamic loss scale would be. `path` is the file that
    `loss` stands in, for messages. Training flags, buffers, `.grad` of the parameters, the batch
    and the random state are afterwards as they were.

    Raises UsageError for another scale; UnsupportedModelError for a model without a train graph;
    ModelError when the batch does not fit the model, and when the loss fails, is no differentiable
    tensor of one element, or has a value or FP32 gradients that are not finite.
    """
    log2(scale)
    step = TrainStep(converted, (tuple(args), dict(kwargs), target), loss, path)
    eager = step.eager()
    watched = GradientProbe(converted.captured)
    reference = step.run(watched, "FP32")
    difference = _largest_difference(eager.gradients, reference.gradients)
    drawn = tuple(eager.rng_state.drawn_outside_torch(reference.rng_state))
    del eager  # never three sets of gradients at a time
    rounded, noise = _apart(step.rounded, reference), _apart(step.nudged, reference)
    mixed = step.run(converted, "mixed", scale)
    while backoff is not None and scale > 1 and not _finite(mixed):
        scale = max(scale * 2.0 ** math.floor(math.log2(backoff)), 1.0)
        del mixed
        mixed = step.run(converted, "mixed", scale)
    totals = _Totals(reference, mixed, scale)
    for name, parameter in step.parameters.items():
        totals.add(name, tuple(parameter.shape))
    activations, by_layer = Exponents(), dict[str, Exponents]()
    for info, seen in watched.seen.values():
        activations.merge(seen)
        by_layer.setdefault(info.layer, Exponents()).merge(seen)
    return GradientParity(
        dtype=converted.plan.dtype,
        scale=float(scale),
        loss_fp32=reference.loss,
        loss_mixed=mixed.loss,
        reference_rel_l2=difference,
        same_random_numbers=reference.rng_state.same(mixed.rng_state),
        total=GradientDifference(**totals.sums.fields()),
        parameters=tuple(totals.rows),
        layers=tuple(
            dataclasses.replace(
                _layer(layer, totals.layers.get(layer, _Sums()), by_layer.get(layer), scale),
                noise_rel_l2=noise.layers.get(layer),
                rounded_rel_l2=rounded.layers.get(layer),
            )
            for layer in dict.fromkeys((*totals.layers, *by_layer))
        ),
        activations=tuple(_activation(i, e, scale) for i, e in watched.seen.values() if e.elements),
        weight_range=GradientRange.of(totals.weights, scale),
        activation_range=GradientRange.of(activations, scale),
        recommended=recommend_scale([totals.weights, activations], reference.loss),
        without_gradient=tuple(totals.without),
        only_fp32=tuple(totals.only_fp32),
        only_mixed=tuple(totals.only_mixed),
        rounded_rel_l2=rounded.total,
        drawn_outside=drawn,
    )


class _Totals:
    """Rows and sums over the parameters, as they are added one by one."""

    def __init__(self, reference: StepTrace, mixed: StepTrace, scale: float) -> None:
        self._reference, self._mixed, self._scale = reference.gradients, mixed.gradients, scale
        self.rows: list[ParameterGradient] = []
        self.layers: dict[str, _Sums] = {}
        self.sums, self.weights = _Sums(), Exponents()
        self.without: list[str] = []
        self.only_fp32: list[str] = []
        self.only_mixed: list[str] = []

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Take in both gradients of a parameter, and let go of them."""
        want, have = self._reference.pop(name), self._mixed.pop(name)
        if want is None and have is None:
            self.without.append(name)
            return
        sums, layer = _Sums(), _layer_of(name)
        if want is not None:
            self.weights.add(want)
        if want is None or have is None:
            (self.only_mixed if want is None else self.only_fp32).append(name)
        sums.add(want, have, self._scale)
        self.sums.merge(sums)
        self.layers.setdefault(layer, _Sums()).merge(sums)
        row = ParameterGradient(**sums.fields(), name=name, layer=layer, shape=shape)
        self.rows.append(row)


def _layer(name: str, sums: _Sums, seen: Exponents | None, scale: float) -> LayerGradient:
    found = (seen or Exponents()).histogram()
    return LayerGradient(
        **sums.fields(),
        layer=name,
        grad_underflow_fraction=found.share_under(TINIEST),
        scaled_grad_underflow_fraction=found.share_under(TINIEST, scale),
    )


def _activation(info: NodeInfo, seen: Exponents, scale: float) -> ActivationGradient:
    found = seen.histogram()
    return ActivationGradient(
        node=info.identity,
        layer=info.layer,
        op=info.op,
        elements=found.elements,
        abs_max=found.abs_max,
        nonfinite=found.nonfinite,
        grad_underflow_fraction=found.share_under(TINIEST),
        scaled_grad_underflow_fraction=found.share_under(TINIEST, scale),
    )


def _largest_difference(
    eager: Mapping[str, torch.Tensor | None], reference: Mapping[str, torch.Tensor | None]
) -> float:
    worst = 0.0
    for name, want in eager.items():
        have = reference[name]
        if want is None or have is None:
            worst = worst if want is have else math.inf
            continue
        sums = ErrorSums()
        sums.add(want, have)
        worst = larger(worst, sums.rel_l2)
    return worst


@dataclass(frozen=True)
class _Apart:
    """The relative L2 difference of FP32's gradients from those of other weights: of all together,
    and by layer; None without any."""

    total: float | None
    layers: Mapping[str, float]


def _apart(other: Callable[[], StepTrace], reference: StepTrace) -> _Apart:
    """How far the gradients of another step lie from FP32's; nothing where the loss refuses what
    its weights give."""
    try:
        found = other()
    except ModelError:
        return _Apart(None, {})
    total, layers = _Sums(), dict[str, _Sums]()
    for name, want in reference.gradients.items():
        have = found.gradients.pop(name)
        if want is not None and have is not None:
            sums = _Sums()
            sums.errors.add(want, have)
            total.merge(sums)
            layers.setdefault(_layer_of(name), _Sums()).merge(sums)
    whole = total.errors.rel_l2 if total.errors.elements else None
    return _Apart(whole, {layer: sums.errors.rel_l2 for layer, sums in layers.items()})


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _finite(trace: StepTrace) -> bool:
    return all(g is None or bool(torch.isfinite(g).all()) for g in trace.gradients.values())


@dataclass
class _Sums:
    """The sums of some parameters' gradients."""

    errors: ErrorSums = field(default_factory=ErrorSums)
    nonzero: int = 0
    zeroed: int = 0

    def add(self, want: torch.Tensor | None, have: torch.Tensor | None, scale: float) -> None:
        """Take in a parameter's gradients, the mixed one still scaled; None where there is none."""
        if want is not None and have is not None:
            have = have / scale if scale != 1 else have
            self.errors.add(want, have)
            for one, other in chunks(want, have):
                self.nonzero += int(torch.count_nonzero(one))
                if int(torch.count_nonzero(other)) < other.numel():
                    self.zeroed += int(((other == 0) & (one != 0)).sum())
            return
        given = want if want is not None else have
        assert given is not None
        self.errors.add_incomparable(given.numel())
        if want is None:
            self.errors.nonfinite += int((~torch.isfinite(given)).sum())
        else:  # the parameter does not learn: all that there was is lost
            lost = int(torch.count_nonzero(want))
            self.nonzero, self.zeroed = self.nonzero + lost, self.zeroed + lost

    def merge(self, other: _Sums) -> None:
        mine, theirs = self.errors, other.errors
        for name in ("elements", "difference", "reference", "product", "nonfinite"):
            setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
        mine.max_abs = larger(mine.max_abs, theirs.max_abs)
        mine.ref_abs_max = larger(mine.ref_abs_max, theirs.ref_abs_max)
        self.nonzero += other.nonzero
        self.zeroed += other.zeroed

    def fields(self) -> dict[str, Any]:
        """The fields of a `GradientDifference`."""
        errors, measured = self.errors, self.errors.elements > 0
        return {
            "elements": errors.elements,
            "rel_l2": errors.rel_l2 if measured else None,
            "cosine": errors.cosine if measured else None,
            "max_abs_err": errors.max_abs if measured else None,
            "ref_abs_max": errors.ref_abs_max if measured else None,
            "zeroed_share": self.zeroed / self.nonzero if self.nonzero else None,
            "nonfinite": errors.nonfinite,
        }
