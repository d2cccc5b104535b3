"""The library's functions: the stages of a run, for models that live in a program instead of a
file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amp_convert import pipeline
from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Budget
from amp_convert.capture.regions import capture
from amp_convert.capture.sizes.said_sizes import Said
from amp_convert.core import device as devices
from amp_convert.core.errors import UsageError
from amp_convert.core.files import digests
from amp_convert.core.number_formats import LOW_DTYPES, name_of
from amp_convert.eager import EagerPlan
from amp_convert.loading.model_file import Case, as_call, kind_of
from amp_convert.loading.read_settings import given_settings, make_settings
from amp_convert.loading.together import agreed
from amp_convert.onnx_file.write import export_onnx as export_onnx
from amp_convert.pipeline import Run
from amp_convert.plan.plan import Plan
from amp_convert.plan.saved_plan import eager_plan
from amp_convert.prepare import SHAPES_SEEN, fitting_batches
from amp_convert.profile.calibrate import profile
from amp_convert.report.files import write_report
from amp_convert.report.folder import check_writable, workspace
from amp_convert.report.sections.audit import AuditRow, audit_rows
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rules
from amp_convert.validate.inference.compare import compare as compare_batches
from amp_convert.validate.inference.results import Divergence

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
Batches = Iterable[tuple[Any, Any]] | Callable[[], Iterable[tuple[Any, Any]]]
"""Pairs of (inputs, target), or a function that gives them anew at each call."""
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
    dynamic: Said | None = None,
) -> ConvertedModel:
    """`model` in mixed precision, as an `nn.Module` that takes and returns what `model` does.

    `args` are example inputs: a tensor, a tuple of positional ones, or a dict of keywords (then
    without `kwargs`). `calibration` gives inputs of the same forms, one a batch, whose value ranges
    the guards look at; by default the example inputs. Dimensions in which the first of them differ
    from the example inputs may vary in the result, as may the first of each tensor, and those that
    `dynamic` names, such as `{"input_ids": {1: "length"}}`. `dtype` is
    `torch.float16` or `torch.bfloat16`. The result shares the model's parameters, buffers and
    submodules; its training mode is the model's. Without `train` it is for inference only, made in
    about half the time, and in eval mode, as the submodules then are. The device is the model's
    own. A call of other sizes or another structure runs operation by operation, under the plan.

    Raises UsageError for wrong rules, dtype or kwargs, ModelError for inputs that do not fit,
    UnsupportedModelError when no part of the model can be captured.
    """
    if dtype not in LOW_DTYPES:
        raise UsageError(f"{dtype} is not a low dtype", mend="Use torch.float16 or torch.bfloat16.")
    loaded = _rules(rules)
    positional, keywords = _call(args, kwargs)
    batches: Iterator[Any] = iter([(positional, keywords)])
    if calibration is not None:
        batches = (as_call(batch, "calibration") for batch in calibration)
    first = list(islice(batches, SHAPES_SEEN))
    captured = capture(model, positional, keywords, train=train, others=first, dynamic=dynamic)
    stats = profile(
        captured,
        fitting_batches(captured, chain(first, batches), "calibration"),
        [dtype] if loaded.uses_trials else [],
        probes=loaded.uses_probes,
    )
    mixed = convert_captured(captured, loaded, stats, dtype)
    return mixed if train else mixed.eval()


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


def check(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    rules: RulesLike = "default",
    *,
    eval_batches: Batches | None = None,
    metrics: Callable[[Any, Any], dict[str, float]] | None = None,
    lower_is_better: Iterable[str] = (),
    train_batches: Callable[[int], Iterable[tuple[Any, Any]]] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    initial_model: Callable[[int], nn.Module] | None = None,
    dynamic: Said | None = None,
    name: str = "",
    out: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """The whole job of `amp-convert model.py`, without a file: convert `model`, hold it against
    FP32 in inference and, where there are `train_batches` and a `loss`, in training, and judge it.

    `args` and `kwargs` are example inputs as in `convert`; the other functions are those of a model
    file. `eval_batches` may also be a list or a data loader of (inputs, target) pairs, but nothing
    that can be gone through only once. `out` is a folder to write the report to, and is needed for
    `onnx=True`. `settings` are those of the command, such as `steps=200` or `tolerance=0.01`.
    With `baseline="FILE"` the result is gated, too: see `Run.gated`. The model stays on its device.
    Progress goes to the log of "amp_convert".

    Raises UsageError for wrong settings, ModelError for what is wrong with the model, its inputs or
    functions, UnsupportedModelError when no part of the model can be captured.
    """
    if isinstance(rules, Rules):
        raise UsageError("check() takes rules by name", mend="Give presets or files.")
    _require_values(model)
    names = [rules] if isinstance(rules, str | PathLike) else rules
    if "device" in settings:
        raise UsageError("check() runs where the model is", mend="Move the model instead.")
    given = given_settings(settings)
    made = make_settings(
        dtype=name_of(dtype),
        rules=[fspath(each) for each in names],
        device=str(devices.of_model(model)),
        out=fspath(out) if out is not None else None,
        **given,
    )
    chosen = agreed(made, given)
    positional, keywords = _call(args, kwargs)
    case = Case(
        name=name or type(model).__name__,
        source="",
        digest=digests.of_model(model),
        model=model,
        args=positional,
        kwargs=keywords,
        eval_batches=_repeatable(eval_batches),
        metrics=metrics,
        lower_is_better=frozenset(lower_is_better),
        train_batches=train_batches,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        initial_model=initial_model,
        dynamic=dynamic,
    )
    if chosen.out is None:
        return pipeline.check(case, chosen)
    folder = Path(chosen.out)
    check_writable(folder)
    with workspace(folder) as work:
        run = pipeline.check(case, chosen, work=work)
        write_report(folder, run.report, run.plan.to_toml(), run.files)
    pipeline.clean_up(run, chosen)
    return run


def _call(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UsageError(
            f"kwargs is {kind_of(kwargs)}, no mapping of names to inputs",
            mend="Give several inputs as one tuple: args=(x, y).",
        )
    positional, keywords = as_call(args, "args")
    return positional, keywords | dict(kwargs or {})


def _repeatable(batches: Batches | None) -> Callable[[], Iterable[Any]] | None:
    """Batches as a function that gives them anew at each call."""
    if batches is None or callable(batches):
        return batches
    if isinstance(batches, Iterator):
        mend = "Give a list, a data loader, or a function that gives them anew."
        raise UsageError("eval_batches can be gone through only once", mend=mend)
    return lambda: batches


def _require_values(model: nn.Module) -> None:
    if not devices.has_values(model):
        raise UsageError(
            "the model's tensors hold no values that could be compared",
            mend="Move it to a real device and convert it there.",
        )


def autocast(plan: Plan | str | PathLike[str], model: nn.Module | None = None) -> EagerPlan:
    """Apply a plan to `model` as it is, as `torch.autocast` applies its lists: a context, or a
    decorator. `plan` is a `Plan`, or the path of a saved one (the plan.toml of a report). See
    `Plan.autocast`; without `model`, the module that is called first is taken for it.

    Raises UsageError for a file that is no saved plan.
    """
    if isinstance(plan, Plan):
        return plan.autocast(model)
    path = fspath(plan)
    return eager_plan(load_rules([path]), path, model)


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
    _require_values(model)
    mixed.heed_hooks()
    divergence = compare_batches(mixed, ((*as_call(b, "batches"), None) for b in batches))
    if not divergence.batches:
        raise UsageError("there are no batches to compare on", mend="Give at least one.")
    return divergence


def error_budget(
    mixed: ConvertedModel,
    inputs: Any,
    *,
    vectors: int | None = None,
    seed: int = 0,
    floor: bool = True,
) -> Budget:
    """Which node's rounding the error of `mixed` comes from, for one batch.

    `inputs` are a tensor, a tuple of positional inputs or a dict of keywords. There are `vectors`
    backward passes through the FP32 model, by default 8, and up to 32 for few samples; the same
    `seed` gives the same budget. With `floor` each node is measured in FP64 too: what FP32 owes.
    Raises UsageError for a model without values, UnsupportedModelError where the gradients of the
    batch would not fit into memory, or the model fails with gradients on.
    """
    _require_values(mixed.captured.model)
    mixed.heed_hooks()
    args, kwargs = as_call(inputs, "inputs")
    return attribute(mixed, args, kwargs, vectors=vectors, seed=seed, floor=floor)


def _rules(rules: RulesLike) -> Rules:
    if isinstance(rules, Rules):
        return rules
    names = [rules] if isinstance(rules, str | PathLike) else rules
    return load_rules([fspath(name) for name in names])
