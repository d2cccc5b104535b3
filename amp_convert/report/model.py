"""What one run found, as one frozen value that every writer takes and nothing else.

`RunReport` embeds the dataclasses of the stages unchanged, so a writer and the gate read the same
names as the stage that measured them. It goes to strict JSON and back: numbers that JSON lacks are
written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from amp_convert.attribute.results import Budget
from amp_convert.capture.captured import FixedSizes, Uncaptured
from amp_convert.capture.fidelity import Fidelity
from amp_convert.onnx_file.write import OnnxModel
from amp_convert.plan.costs import Island, StoredTwice
from amp_convert.plan.plan import BatchNormFold, Plan
from amp_convert.report.records import NodeRecord
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.validate.compiled.results import CompiledParity
from amp_convert.validate.inference.results import Divergence
from amp_convert.validate.onnx.results import OnnxParity
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.verdict import Verdict, verdict_of

SCHEMA_VERSION: Literal[1] = 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Section(BaseModel):
    """Base of the report's parts: immutable, strict about its keys, strict JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelInfo(Section):
    """Which model ran: `digest` is the model file's hash, `parameters` a count of numbers."""

    name: str
    source: str
    digest: str
    model_class: str
    parameters: int


class Environment(Section):
    """Where it ran. `tf32` is whether the FP32 arm used TF32, None where that does not apply."""

    python: str
    torch: str
    platform: str
    processor: str
    threads: int
    device: str
    device_name: str
    device_reason: str
    tf32: bool | None
    dtype: str


class Unchecked(Section):
    """A stage that did not run, and why."""

    status: Literal["unchecked"] = "unchecked"
    reason: str


class PlanSection(Section):
    """The eval plan: what it adds up to, and every decision in graph order.

    `nodes` counts those that there was something to decide about. Shares are fractions of 1:
    `share_nodes_low` of these nodes, `share_macs_low` of the multiply-adds. `casts` counts those of
    activations and of weights, `borders` the edges on which the dtype changes, `islands` are the
    FP32 regions and their costs, the dearest first, `stored_twice` the weights that a
    frozen model holds in FP32 and in low precision. `batch_norm_folds` says of each BatchNorm
    behind a product whether it can go into the weights before it.
    """

    dtype: str
    device: str
    rules: tuple[str, ...]
    painting: str
    calibration_batches: int
    nodes: int
    low_nodes: int
    share_nodes_low: float
    share_macs_low: float
    casts: int
    borders: int
    unknown_ops: dict[str, int]
    uncaptured: tuple[Uncaptured, ...]
    unmatched_rules: tuple[str, ...]
    decisions: tuple[NodeRecord, ...]
    islands: tuple[Island, ...] = ()
    stored_twice: tuple[StoredTwice, ...] = ()
    batch_norm_folds: tuple[BatchNormFold, ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> PlanSection:
        """The section for `plan`."""
        return cls(
            dtype=plan.dtype,
            device=plan.device,
            rules=plan.rules,
            painting=plan.painting,
            calibration_batches=plan.calibration_batches,
            nodes=plan.decided_nodes(),
            low_nodes=plan.low_nodes(),
            share_nodes_low=plan.share_nodes_low(),
            share_macs_low=plan.share_macs_low(),
            casts=plan.eval_casts.activations + plan.eval_casts.weights,
            borders=plan.eval_casts.borders,
            unknown_ops=plan.unknown_ops(),
            uncaptured=plan.uncaptured,
            unmatched_rules=plan.unmatched_rules,
            decisions=tuple(map(NodeRecord.of, plan.eval)),
            islands=plan.islands,
            stored_twice=plan.stored_twice,
            batch_norm_folds=plan.batch_norm_folds,
        )


class Judged(Section):
    """By what the verdict was given: a gate holds later runs to no less.

    `limits` are all tolerances by name (see `Thresholds`), `batches` those whose outputs were seen,
    with `samples` in all;
    `steps` and `seeds` those that were trained, 0 without training, and `margin` the one of a test
    over seeds.
    """

    limits: dict[str, float]
    batches: int
    samples: int
    steps: int = 0
    seeds: int = 0
    margin: float | None = None


class OnnxSection(Section):
    """The exported file, and what running it showed. Paths are relative to the report folder."""

    model: OnnxModel
    parity: OnnxParity


class RunReport(Section):
    """Everything a run says. `created` is an ISO 8601 time in UTC; `attribution` is None where it
    was not asked for, or where nothing was converted."""

    schema_version: Literal[1] = SCHEMA_VERSION
    amp_convert: str
    model: ModelInfo
    created: str
    verdict: Verdict
    environment: Environment
    fidelity: tuple[Fidelity, ...]
    plan: PlanSection
    inference: Divergence | None
    training: TrainingParity | Unchecked
    onnx: OnnxSection | Unchecked
    compiled: CompiledParity | Unchecked = Unchecked(reason="--compile was not given")
    archive: ArchiveParity | Unchecked = Unchecked(reason="--save was not given")
    attribution: Budget | Unchecked | None = None
    fixed_sizes: tuple[FixedSizes, ...] = ()
    judged: Judged | None = None

    @field_validator("verdict")
    @classmethod
    def _verdict_of_checks(cls, verdict: Verdict) -> Verdict:
        # The status is what the checks add up to, whatever a file says.
        # A check's value may be text, so pydantic cannot tell "NaN" the text from the number.
        def number(value: float | str | None) -> float | str | None:
            return _NON_FINITE.get(value, value) if isinstance(value, str) else value

        checks = (
            replace(check, value=number(check.value), threshold=number(check.threshold))
            for check in verdict.checks
        )
        return verdict_of(checks)
