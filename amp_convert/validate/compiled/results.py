"""What compiling showed. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.validate.inference.results import ArmCost, MetricPair, OutputError


@dataclass(frozen=True)
class OperatorCount:
    """Operators of one name and dtype, in the graphs as they were traced and as they were
    compiled. In training that is forward and backward together."""

    op: str
    dtype: str
    traced: int
    compiled: int


@dataclass(frozen=True)
class CompiledStep:
    """One forward and backward pass of the compiled model in training mode against FP32's.

    `rel_l2` is the relative L2 error of all gradients together, `eager_rel_l2` that of the mixed
    model before it is compiled; `missing` names parameters whose gradients only one of the two has,
    or of which one is not finite.
    """

    loss_fp32: float
    loss: float
    rel_l2: float
    eager_rel_l2: float
    missing: tuple[str, ...]
    ops: tuple[OperatorCount, ...]


@dataclass(frozen=True)
class CompiledParity:
    """The frozen model and a training step under `torch.compile`, held against FP32.

    `outputs` are the errors of the compiled frozen model over `batches`, `metrics` the user's of it
    (as `mixed`), `ops` what its graphs compute in. `forward` are the times of FP32, of autocast, of
    the model all in the low dtype and of the frozen one, each compiled; `training` those of a step
    of FP32, autocast and the mixed model. `seconds` is how long the frozen model's first call took.
    `failure` says why it was not compiled, `no_step` why no `step` was made, "" where they were;
    `step_failed` is whether that was the compiler's doing.
    """

    cuda_graphs: bool
    batches: int
    outputs: tuple[OutputError, ...] = ()
    metrics: tuple[MetricPair, ...] = ()
    ops: tuple[OperatorCount, ...] = ()
    forward: tuple[ArmCost, ...] = ()
    training: tuple[ArmCost, ...] = ()
    seconds: float = 0.0
    step: CompiledStep | None = None
    no_step: str = ""
    step_failed: bool = False
    failure: str = ""
