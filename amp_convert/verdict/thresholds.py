"""The numbers that a verdict holds evidence to, and their defaults for each low dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from amp_convert.core.errors import UsageError
from amp_convert.core.number_formats import LOW_NAMES, from_name, unit_roundoff

# (relative L2 error, cosine)
_OUTPUT_LIMITS = {"float16": (2e-2, 0.999), "bfloat16": (1.6e-1, 0.99)}
# (relative L2 error of all gradients of a step, relative difference of the loss at the end).
# Measured with the default rules on the twelve models of tests/zoo.py, on random batches, at their
# first weights: gradients differ by at most 0.019 in FP16 (native autocast: 0.046) and 0.094 in
# BF16 (0.163), and after 50 steps of AdamW the loss by 0.00013 and 0.001, where no step was left
# out. examples/digits_cnn.py: 0.009 and 0.021; 0.0002 and 0.0003.
_TRAINING_LIMITS = {"float16": (1e-1, 1e-2), "bfloat16": (3e-1, 2e-2)}
# Measured likewise, in the layer that loses most: 0.005 in either dtype at a loss scale that FP16
# bears; without one, 0.44 (Mamba) and 1 (Whisper) in FP16, and 0.016 at most in the others.
_MOST_ZEROED = 1e-1
RESOLVED = 2.0
"""How many standard errors a difference of metrics has to be to be told from luck."""
LEAST_WORK = 0.01
"""A plan with less of the work than this in low precision is no conversion."""
# A cosine is computed in floating point, so equal vectors can miss 1 by this much on either side.
COSINE_SLACK = 1e-6


@dataclass(frozen=True)
class Thresholds:
    """What the outputs and metrics are held to; all are dimensionless.

    `dtype` is the low one. `agreement` is the share of equal elements in integer and boolean
    outputs. `autocast_factor` bounds our error over native autocast's, and `metric_tolerance` the
    loss in a metric relative to its FP32 value. In training, `gradient_rel_l2` bounds the error of
    one step's gradients all together, `layer_gradient_rel_l2` that of one layer's,
    `gradient_zeroed` the share of a layer's that are zero where FP32's are
    not, and `loss_tolerance` the difference of the loss at the end. `min_speedup` is how many times
    as fast as FP32 the frozen model has to be, 0 where nothing was asked.

    Raises UsageError for an unknown dtype, and for a number that is negative or not finite: it
    would let anything pass.
    """

    dtype: str
    output_rel_l2: float
    cosine: float
    autocast_factor: float = 3.0
    agreement: float = 0.99
    metric_tolerance: float = 0.01
    fidelity_rel_l2: float = 1e-6
    gradient_rel_l2: float = 1e-1
    layer_gradient_rel_l2: float = 5e-1
    gradient_zeroed: float = _MOST_ZEROED
    loss_tolerance: float = 1e-2
    min_speedup: float = 0.0

    def __post_init__(self) -> None:
        rounding_unit(self.dtype)
        for name, value in vars(self).items():
            if name != "dtype":
                require_finite(name, value, at_least=0.0)

    @classmethod
    def for_dtype(
        cls,
        dtype: str,
        *,
        output_rel_l2: float | None = None,
        metric_tolerance: float = 0.01,
        min_speedup: float | None = None,
    ) -> Thresholds:
        """The defaults for "float16" or "bfloat16".

        A given `output_rel_l2` also loosens the cosine to what an error of that size can reach,
        sqrt(1 - r²), so that one number is enough to accept a less exact model. Raises UsageError
        for another dtype.
        """
        rounding_unit(dtype)
        rel_l2, cosine = _OUTPUT_LIMITS[dtype]
        if output_rel_l2 is not None:
            require_finite("output_rel_l2", output_rel_l2, at_least=0.0)
            rel_l2 = output_rel_l2
            cosine = min(cosine, math.sqrt(max(0.0, 1 - rel_l2**2)))
        gradients, loss = _TRAINING_LIMITS[dtype]
        return cls(
            dtype,
            rel_l2,
            cosine,
            metric_tolerance=metric_tolerance,
            gradient_rel_l2=gradients,
            loss_tolerance=loss,
            min_speedup=min_speedup or 0.0,
        )

    @property
    def output_max_abs(self) -> float:
        """Limit of the largest absolute error over the largest FP32 magnitude of the output.

        Five times the relative L2 limit r: in a Gaussian error of size r, spread evenly, the
        largest of a million elements lies near 5 r times the output's RMS, which is never above its
        largest magnitude. Only an error that gathers in a few elements goes beyond. The cap keeps a
        loose r from allowing an error of half the largest value.
        """
        return min(5 * self.output_rel_l2, 0.5)

    def exact(self) -> Thresholds:
        """The same thresholds with nothing allowed in the outputs, gradients and losses."""
        return replace(
            self,
            output_rel_l2=0.0,
            cosine=1 - COSINE_SLACK,
            agreement=1.0,
            gradient_rel_l2=0.0,
            gradient_zeroed=0.0,
            loss_tolerance=0.0,
        )


def rounding_unit(dtype: str) -> float:
    """The largest relative error of one rounding to `dtype`. Raises UsageError for no low dtype."""
    if dtype not in LOW_NAMES:
        known = " and ".join(LOW_NAMES)
        raise UsageError(f"{dtype!r} is not a low dtype", mend=f"Use {known}.")
    return unit_roundoff(from_name(dtype))


def metric_limit(
    reference: float, tolerance: float, *, lower_is_better: bool, spread: float = 0.0
) -> float:
    """The worst value of a metric that still holds against `reference`.

    The tolerance is relative to |reference|; for a metric that takes both signs, whose value may be
    near to 0 by chance, to its `spread` over batches where that is larger.
    """
    allowance = tolerance * max(abs(reference), spread)
    return reference + allowance if lower_is_better else reference - allowance


def metric_holds(value: float, limit: float, *, lower_is_better: bool) -> bool:
    """Whether a metric is no worse than `limit`; a value or limit that is not finite never is."""
    if not (math.isfinite(value) and math.isfinite(limit)):
        return False
    return value <= limit if lower_is_better else value >= limit


def require_finite(name: str, value: float, *, at_least: float) -> None:
    """Raises UsageError unless `value` is a finite number of at least `at_least`."""
    if not (math.isfinite(value) and value >= at_least):
        raise UsageError(f"{name} is {value}", mend=f"Give a finite number from {at_least:g} up.")
