"""The library's functions: the stages of a run, for models that live in a program instead of a
file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amp_convert.capture.regions import capture
from amp_convert.core import device as devices
from amp_convert.core.errors import UsageError
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.loading.model_file import as_call
from amp_convert.onnx_file.write import export_onnx as export_onnx
from amp_convert.plan.plan import Plan
from amp_convert.profile.calibrate import profile
from amp_convert.report.sections.audit import AuditRow, audit_rows
from amp_convert.rewrite.converted_model import ConvertedModel, convert_captured
from amp_convert.rules.rule_set import Rules, load_rules
from amp_convert.validate.inference.compare import compare as compare_batches
from amp_convert.validate.inference.results import Divergence

if TYPE_CHECKING:
    import pandas as pd

RulesLike = str | PathLike[str] | Rules | Sequence[str | PathLike[str]]
"""A preset's name, a rules file, several of them in order, or rules already loaded."""


@dataclass(frozen=True)
class Audit:
    """Which layers stay FP32, and why. `plan` has the decision about every node."""

    plan: Plan

    def rows(self) -> list[AuditRow]:
        """One row a layer and reason, in the order in which the layers run."""
        return audit_rows(self.plan)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table; `ops` is text such as "aten.softmax (2)"."""
        import pandas as pd

        columns = list(AuditRow.__dataclass_fields__)
        rows = [
            vars(row) | {"ops": ", ".join(f"{op} ({n})" for op, n in row.ops)}
            for row in self.rows()
        ]
        return pd.DataFrame(rows, columns=columns)


def convert(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    rules: RulesLike = "default",
    calibration: Iterable[Any] | None = None,
    *,
    train: bool = True,
) -> ConvertedModel:
    """`model` in mixed precision, as an `nn.Module` that takes and returns what `model` does.

    `args` are example inputs: a tensor, a tuple of positional ones, or a dict of keywords (then
    without `kwargs`). `calibration` gives inputs of the same forms, one a batch, whose value ranges
    the guards look at; by default the example inputs. `dtype` is `torch.float16` or
    `torch.bfloat16`. Without `train` the result is for inference only, and is made in about half
    the time. The result shares the model's parameters and buffers; its training mode is the
    model's. The device is the model's own.

    Raises UsageError for wrong rules or dtype, ModelError for inputs that do not fit,
    UnsupportedModelError when no part of the model can be captured.
    """
    if dtype not in LOW_DTYPES:
        raise UsageError(f"{dtype} is not a low dtype", mend="Use torch.float16 or torch.bfloat16.")
    loaded = _rules(rules)
    positional, keywords = as_call(args, "args")
    keywords |= kwargs or {}
    captured = capture(model, positional, keywords, train=train)
    batches: Iterable[Any] = [(positional, keywords)]
    if calibration is not None:
        batches = (as_call(batch, "calibration") for batch in calibration)
    return convert_captured(captured, loaded, profile(captured, batches, [dtype]), dtype)


def audit(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    rules: RulesLike = "default",
    calibration: Iterable[Any] | None = None,
) -> Audit:
    """Which layers of `model` would stay FP32, and why. Arguments as `convert`."""
    return Audit(convert(model, args, kwargs, dtype, rules, calibration).plan)


def compare(model: nn.Module, mixed: ConvertedModel, batches: Iterable[Any]) -> Divergence:
    """Hold `mixed` against the FP32 `model` that it was converted from, node by node.

    `batches` gives inputs, one a batch: a tensor, a tuple of positional inputs or a dict of
    keywords. Both run in eval mode on the weights that they share. Raises UsageError when `mixed`
    was made from another model, or when there is no batch.
    """
    if mixed.captured.model is not model:
        raise UsageError(
            "the two models do not belong together",
            mend="Pass the very model that was given to convert().",
        )
    if not devices.has_values(model):
        raise UsageError(
            "the model's tensors hold no values that could be compared",
            mend="Move it to a real device and convert it there.",
        )
    divergence = compare_batches(mixed, ((*as_call(b, "batches"), None) for b in batches))
    if not divergence.batches:
        raise UsageError("there are no batches to compare on", mend="Give at least one.")
    return divergence


def _rules(rules: RulesLike) -> Rules:
    if isinstance(rules, Rules):
        return rules
    names = [rules] if isinstance(rules, str | PathLike) else rules
    return load_rules([fspath(name) for name in names])
