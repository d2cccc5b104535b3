"""A baseline: what the gate remembers of one run, small enough to commit and to review.

It holds statuses, metrics and each node's precision and errors, keyed by names that survive
recapture; of training, statuses and the number of steps; and by what all that was judged, so that
a later run cannot be held to less. Floats have 4 significant digits and nodes have a line each, so
that a diff shows what changed. Nothing in it belongs to one machine: no paths, no timings. A file
that cannot be trusted (missing, truncated, of another schema version, with unknown or repeated
keys, with numbers that nothing could be worse than) is a UsageError, never an empty baseline.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from amp_convert.core.errors import UsageError
from amp_convert.core.files.atomic_files import write_file
from amp_convert.core.files.reading import parse_json, read_file
from amp_convert.report import SCHEMA_VERSION, RunReport, Unchecked
from amp_convert.report.model import Section
from amp_convert.verdict.verdict import CheckStatus

_Read = TypeVar("_Read", bound=Section)


class BaselineModel(Section):
    """Which model the baseline is of."""

    name: str
    model_class: str


Finite = Annotated[float, Field(allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class BaselineMetric(Section):
    """A user's metric in both arms. `standard_error` is that of their difference, from batch to
    batch."""

    fp32: Finite
    mixed: Finite
    lower_is_better: bool
    standard_error: Error | None = None


class BaselineNode(Section):
    """A node with floating point tensors. Errors are relative L2, None where not measured, or where
    the reference is zero throughout. `place` is its place in the graph."""

    layer: str
    dtype: str
    low: bool
    local_rel_l2: Error | None
    accumulated_rel_l2: Error | None
    place: Count | None = None


class BaselineJudged(Section):
    """By what the run was judged; see `report.model.Judged`."""

    limits: dict[str, Error]
    batches: Count
    samples: Count
    steps: Count
    seeds: Count
    margin: Error | None


class Baseline(Section):
    """The slim form of a report; `device` is a type ("cpu", "cuda"), nodes are by identity.

    `training_steps` is None where nothing was trained, and in baselines from before there was
    training; `judged` and `share_macs_low` in those from before they were kept.
    """

    schema_version: Literal[1]
    kind: Literal["baseline"]
    model: BaselineModel
    dtype: str
    device: str
    rules: tuple[str, ...]
    casts: Count
    metrics: dict[str, BaselineMetric]
    checks: dict[str, CheckStatus]
    nodes: dict[str, BaselineNode]
    training_steps: Count | None = None
    judged: BaselineJudged | None = None
    share_macs_low: Share | None = None


def baseline_of(report: RunReport) -> Baseline:
    """The slim form of `report`, whatever its verdict. Equal reports give equal baselines. Nothing
    is checked: what is no number stays, and is for the gate to find."""
    plan, inference, trained = report.plan, report.inference, report.training
    measured = {row.node: row for row in inference.nodes} if inference else {}
    nodes = {}
    for place, decision in enumerate(plan.decisions):
        if not decision.decided:
            continue
        row = measured.get(decision.node)
        nodes[decision.node] = BaselineNode.model_construct(
            place=place,
            layer=decision.layer,
            dtype=decision.dtype,
            low=decision.low,
            local_rel_l2=_rounded(row.local_rel_l2) if row else None,
            accumulated_rel_l2=_rounded(row.accumulated_rel_l2) if row else None,
        )
    judged = report.judged
    return Baseline.model_construct(
        schema_version=SCHEMA_VERSION,
        kind="baseline",
        model=BaselineModel(name=report.model.name, model_class=report.model.model_class),
        dtype=plan.dtype,
        device=plan.device.partition(":")[0],
        rules=tuple(os.path.basename(rule) for rule in plan.rules),
        casts=plan.casts,
        metrics={
            pair.name: BaselineMetric.model_construct(
                standard_error=_rounded(pair.standard_error),
                fp32=_round(pair.fp32),
                mixed=_round(pair.mixed),
                lower_is_better=pair.lower_is_better,
            )
            for pair in (inference.metrics if inference else ())
        },
        checks={check.name: check.status for check in report.verdict.checks},
        nodes=nodes,
        training_steps=None if isinstance(trained, Unchecked) else trained.run.steps,
        judged=None if judged is None else BaselineJudged.model_construct(**dict(judged)),
        share_macs_low=_round(plan.share_macs_low),
    )


def baseline_text(baseline: Baseline) -> str:
    """The baseline as strict JSON: sorted keys, one entry a line two levels deep."""
    lines = []
    held = baseline.model_dump(mode="json")
    for node in held["nodes"].values():
        for which in ("local_rel_l2", "accumulated_rel_l2"):
            if node[which] is not None and not math.isfinite(float(node[which])):
                node[which] = None  # relative to zeros: nothing could be worse
    for key, value in sorted(held.items()):
        if isinstance(value, dict) and value:
            entries = (f"    {_compact(k)}: {_compact(v)}" for k, v in sorted(value.items()))
            lines.append(f"  {_compact(key)}: {{\n" + ",\n".join(entries) + "\n  }")
        else:
            lines.append(f"  {_compact(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_report(path: Path) -> RunReport:
    """A report.json. Raises UsageError when it is missing, damaged, or something else."""
    document = _versioned(path, "report")
    if document.get("kind") == "baseline":
        mend = "Give the report.json of a run; baselines go after --baseline."
        raise UsageError(f"{path} is a baseline, not a report", mend=mend)
    return _validated(RunReport, document, path, "report")


def load_baseline(path: Path) -> Baseline:
    """A baseline, or a full report.json in its slim form. Raises UsageError as `load_report`."""
    document = _versioned(path, "baseline")
    if document.get("kind") == "baseline":
        return _validated(Baseline, document, path, "baseline")
    if "kind" in document or "verdict" not in document:
        mend = "Give a file that --update wrote, or a report.json."
        raise UsageError(f"{path} is neither a baseline nor a report", mend=mend)
    slim = baseline_of(_validated(RunReport, document, path, "report"))
    return _validated(Baseline, json.loads(baseline_text(slim)), path, "baseline")


def write_baseline(report: RunReport, path: Path) -> Baseline:
    """Write the baseline of `report` to `path`: whole, or not at all.

    Raises UsageError when the report's verdict is not pass, since its failures would then be what
    later runs are held to; when `path` holds anything but a baseline, since that may be a file of
    the user's; and when it cannot be written.
    """
    if report.verdict.status != "pass":
        what = f"a report whose verdict is {report.verdict.status} cannot become a baseline"
        raise UsageError(what, mend="Mend what it found, run again, then update.")
    if os.path.lexists(path) and _document(path, "baseline").get("kind") != "baseline":
        mend = "Choose another path, or remove that file."
        raise UsageError(f"{path} is not a baseline, so it is not overwritten", mend=mend)
    baseline = baseline_of(report)
    try:
        write_file(path, baseline_text(baseline))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return baseline


def _document(path: Path, what: str) -> Mapping[str, Any]:
    """The JSON object in `path`."""
    try:
        document = parse_json(read_file(path))
    except FileNotFoundError:
        mend = "Run with --update to write it." if what == "baseline" else ""
        raise UsageError(f"there is no {what} at {path}", mend=mend) from None
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValueError as error:
        mend = "It may be truncated: restore it, or remove it and write it anew."
        raise UsageError(f"{path} is not a {what}: {error}", mend=mend) from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a {what}: it holds no JSON object")
    return document


def _versioned(path: Path, what: str) -> Mapping[str, Any]:
    """The JSON object in `path`, of this schema version."""
    document = _document(path, what)
    version = document.get("schema_version")
    if version is None:
        raise UsageError(f"{path} is not a {what}: it has no schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UsageError(
            f"{path} has schema version {version}, this amp-convert reads version {SCHEMA_VERSION}",
            mend=f"Write the {what} anew with this version.",
        )
    return document


def _validated(kind: type[_Read], document: Mapping[str, Any], path: Path, what: str) -> _Read:
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        message = f"{path} is not a valid {what}: {where}: {first['msg']}{more}"
        raise UsageError(message, mend=f"Write the {what} anew with this version.") from error


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _rounded(value: float | None) -> float | None:
    return None if value is None else _round(value)


def _round(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else value
