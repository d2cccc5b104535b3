"""`GradientParity`: what one step's gradients, held against FP32's, showed. Plain data.

See `compare_gradients` for how it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.core.exponent_histogram import (
    SMALLEST_NORMAL,
    TINIEST,
    ExponentHistogram,
    Exponents,
    ScaleAdvice,
)


@dataclass(frozen=True)
class GradientDifference:
    """The unscaled gradients of the mixed model against FP32's, over `elements` of them.

    `zeroed_share` is the share of the nonzero FP32 gradients that are zero in the mixed model.
    `nonfinite` counts infinities and NaN in the mixed model; with any of them, no error is finite.
    NaN stands for an error against a gradient that one of the models does not have. None where
    there is nothing to measure.
    """

    elements: int
    rel_l2: float | None
    cosine: float | None
    max_abs_err: float | None
    ref_abs_max: float | None
    zeroed_share: float | None
    nonfinite: int


@dataclass(frozen=True)
class ParameterGradient(GradientDifference):
    """The error of one parameter's gradient; a shared parameter has one row, by its first name."""

    name: str
    layer: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ActivationGradient:
    """The FP32 gradient with respect to the results of one node.

    `grad_underflow_fraction` is the share of its nonzero elements under 2**-24, and `scaled_...` of
    those times the loss scale; None where all are zero.
    """

    node: str
    layer: str
    op: str
    elements: int
    abs_max: float
    nonfinite: int
    grad_underflow_fraction: float | None
    scaled_grad_underflow_fraction: float | None


@dataclass(frozen=True)
class LayerGradient(GradientDifference):
    """The error of all of a layer's parameter gradients together, and how many of its nonzero FP32
    activation gradients are under 2**-24, unscaled and scaled (None without any).

    `noise_rel_l2` is what FP32's own gradients of the layer differ by once its weights are moved by
    one ULP, `rounded_rel_l2` once they are rounded to the low dtype; None where that was not
    measured.
    """

    layer: str
    grad_underflow_fraction: float | None
    scaled_grad_underflow_fraction: float | None
    noise_rel_l2: float | None = None
    rounded_rel_l2: float | None = None


@dataclass(frozen=True)
class GradientRange:
    """The FP32 gradients of all weights or of all activations: histogram of their exponents, and
    the shares of the nonzero ones under 2**-24 (underflow) and 2**-14 (subnormal, and underflow),
    unscaled and multiplied by the loss scale."""

    histogram: ExponentHistogram
    underflow_fraction: float | None
    subnormal_fraction: float | None
    scaled_underflow_fraction: float | None
    scaled_subnormal_fraction: float | None

    @classmethod
    def of(cls, seen: Exponents, scale: float) -> GradientRange:
        found = seen.histogram()
        shares = [found.share_under(e, s) for s in (1, scale) for e in (TINIEST, SMALLEST_NORMAL)]
        return cls(found, *shares)


@dataclass(frozen=True)
class GradientParity:
    """What one step backward through both models showed. Plain data.

    `scale` is the loss scale of the mixed model, `reference_rel_l2` the largest relative L2
    difference of a parameter's gradient between the captured FP32 graph, which is the reference,
    and the eager FP32 model. `same_random_numbers` is whether both models left the random state
    alike: if not, dropout hit other elements. `layers` has layers with parameters first, and then
    those that have activations only. `without_gradient` names the parameters that have none in
    either model, which have no row; `only_fp32` and `only_mixed` those that have one in a single
    model. Parameters that do not require gradients are left out. `rounded_rel_l2` is the relative
    L2 difference from FP32's gradients, all together, of those from rounded weights; None where
    that was not measured. `drawn_outside` names the generators outside of PyTorch ("Python",
    "NumPy") whose numbers the eager model draws, and its graph does not.
    """

    dtype: str
    scale: float
    loss_fp32: float
    loss_mixed: float
    reference_rel_l2: float
    same_random_numbers: bool
    total: GradientDifference
    parameters: tuple[ParameterGradient, ...]
    layers: tuple[LayerGradient, ...]
    activations: tuple[ActivationGradient, ...]
    weight_range: GradientRange
    activation_range: GradientRange
    recommended: ScaleAdvice
    without_gradient: tuple[str, ...]
    only_fp32: tuple[str, ...]
    only_mixed: tuple[str, ...]
    rounded_rel_l2: float | None = None
    drawn_outside: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the gradients whatever the tolerance, a sentence each."""
        only = "has a gradient in the {} model only"
        return (
            *(f"{name} {only.format('FP32')}" for name in self.only_fp32),
            *(f"{name} {only.format('mixed')}" for name in self.only_mixed),
            *(
                f"{row.name}: {row.nonfinite} of {row.elements} gradients are not finite in the "
                f"mixed model, at a loss scale of {self.scale:g}"
                for row in self.parameters
                if row.nonfinite
            ),
        )
